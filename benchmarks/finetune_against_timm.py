"""Times steps of fine-tuning in turns with those of a bare loop of timm's parts, of equal settings.

    python benchmarks/finetune_against_timm.py model=vit_small_patch16_224 batch_size=32 repeats=9

Both see the same images in memory: mixup and cutmix, random erasing, soft targets, layer decay,
AdamW.  What is printed is the median over rounds of (our step) / (theirs), and each one's median.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import click
import timm
import timm.optim
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from patchmine.bench.measure import hardware, seconds
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.config.resolve import from_settings, of_kind
from patchmine.config.schema import FinetuneConfig
from patchmine.runs.folder import build_classifier
from patchmine.strict import BatchSize, Count, Device, Strict
from patchmine.train.engine import Engine
from patchmine.train.step import Stepper
from patchmine.training.place import product_of
from patchmine.types import Batch, Progress

CLASSES = 100
LENGTH = Progress(0, 10_000, 1_000)


class RaceSettings(Strict):
    """What is raced."""

    model: str = "vit_small_patch16_224"
    batch_size: BatchSize = 32
    repeats: Count = 7
    warmup: Count = 2
    device: Device = "cpu"


def config_of(race: RaceSettings) -> FinetuneConfig:
    """The settings of both."""
    heavy = dict(mixup=0.8, cutmix=1.0, erase_prob=0.25, layer_decay=0.65, drop_path=0.1)
    config = from_settings(
        data="images",
        model=race.model,
        batch_size=race.batch_size,
        classes=[str(number) for number in range(CLASSES)],
        base={"kind": "classify"},
        **heavy,
    )
    return of_kind(config, FinetuneConfig)


def ours(config: FinetuneConfig, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """A step of the training loop: rates, losses, gradients, update, counting."""
    engine = Engine(device=images.device.type)
    engine.product = product_of(config, engine, None)
    stepper = Stepper(build_classifier(config), engine, config)
    rows = len(images)
    boxes = torch.zeros(rows, 4, dtype=torch.int64)
    boxes[: rows // 4] = torch.tensor([30, 40, 80, 70])  # a quarter, as erase_prob says
    nothing = torch.zeros(rows)
    batch = Batch(
        [images], labels, torch.zeros(rows, 4), nothing.bool(), target=labels, erase=boxes
    ).to(images.device)
    step = iter(range(LENGTH.total_steps))
    stepper.task.train()
    return lambda: stepper.make(LENGTH.at(next(step)), iter([batch]))


def theirs(config: FinetuneConfig, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """The same by timm's parts, as its train.py and MAE's fine-tuning put them together."""
    network = timm.create_model(
        config.model, num_classes=CLASSES, global_pool="avg", drop_path_rate=config.drop_path
    ).to(images.device)
    groups = timm.optim.param_groups_layer_decay(
        network, config.weight_decay, network.no_weight_decay(), layer_decay=config.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=config.betas, fused=True)
    mix = Mixup(0.8, 1.0, label_smoothing=config.label_smoothing, num_classes=CLASSES)
    erase = RandomErasing(0.25, mode="pixel", device=images.device.type)
    loss_of = SoftTargetCrossEntropy()
    network.train()

    def step() -> None:
        mixed, targets = mix(erase(images.clone()), labels)
        optimizer.zero_grad(set_to_none=True)
        loss_of(network(mixed), targets).backward()
        optimizer.step()

    return step


@click.command(help=__doc__)
@click.argument("words", nargs=-1)
def main(words: tuple[str, ...]) -> None:
    """One race."""
    with ended_in_words():
        race = read_words(RaceSettings, list(words), command="finetune_against_timm.py")
        config, device = config_of(race), torch.device(race.device)
        torch.manual_seed(0)
        images = torch.randn(race.batch_size, config.channels, *config.image_size, device=device)
        labels = torch.randint(CLASSES, (race.batch_size,), device=device)
        steps = {"patchmine": ours(config, images, labels), "timm": theirs(config, images, labels)}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(race.warmup + race.repeats):
            for name, step in steps.items():
                spent = seconds(step, device)
                if number >= race.warmup:
                    taken[name].append(spent)
        ratios = [a / b for a, b in zip(*taken.values(), strict=True)]
        print(hardware(device))
        for name, each in taken.items():
            print(f"{name}: {1e3 * statistics.median(each):.0f} ms a step of {race.batch_size}")
        print(f"patchmine / timm, median of {len(ratios)} rounds: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
