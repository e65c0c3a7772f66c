"""What runs on many GPUs need and would take, worked out from counted parts; no GPU is needed.

    python benchmarks/scale.py memory
    python benchmarks/scale.py speed --batch-size 64 --tflops 350 --link 50

``memory``: bytes of weights, gradients, optimizer state, teachers, and of what the backward pass
keeps for each image, counted tensor by tensor on a CPU, which needs 8 GB of memory.  ``speed``: the
share of the time that GPUs compute, from the work of a step at a rate that they keep up, and from
the bytes of the gradients at the speed of the link between machines.  Nothing of it was measured on
GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import RUN_LENGTH, build_method
from patchmine.task import Method
from patchmine.types import Batch, Progress

SIZE = 224
MODELS = {
    "ViT-S/16": ("vit_small_patch16_224", 16),
    "ViT-B/16": ("vit_base_patch16_224", 16),
    "ViT-L/16": ("vit_large_patch16_224", 16),
}
METHODS = ("mae", "hpm")
MIDDLE = Progress(RUN_LENGTH // 2, RUN_LENGTH, 1)
OF_A_MACHINE = 8
FLOAT32 = 4  # bytes


class Counted(NamedTuple):
    """Of a method: numbers that learn and others, bytes kept for the backward pass of an image, and
    an image's operations, forward and backward.
    """

    trained: int
    others: int
    kept: int
    flops: float

    def state(self, shards: int = 1) -> float:
        """Bytes of a process: weights, gradients, both moments of AdamW and teachers."""
        return FLOAT32 * (4 * self.trained + self.others) / shards


def count(model: str, method: str) -> Counted:
    """Make steps with 2 and 4 images: what they differ by grows with the batch."""
    name, patch_size = MODELS[model]
    config = BenchStepSettings(model=name, patch_size=patch_size, image_size=SIZE)
    made = build_method(method, {}, config)
    trained = sum(p.numel() for group in made.param_groups() for _, p in group.params)
    few, many = kept_bytes(made, 2), kept_bytes(made, 4)
    with FlopCounterMode(display=False) as counter:
        loss_of(made, 2).backward()  # type: ignore[no-untyped-call]
    everything = sum(p.numel() for p in made.parameters())
    return Counted(trained, everything - trained, (many - few) // 2, counter.get_total_flops() / 2)


def kept_bytes(method: Method, size: int) -> int:
    """What the backward pass of so many images needs, each tensor once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(method, size)  # holds all of it, so that no memory is used twice
    found = sum(kept.values())
    del loss
    return found


def loss_of(method: Method, size: int) -> Tensor:
    """Of random images in mid-training, in bf16 where a GPU computes so."""
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(size, 4)
    unflipped = torch.zeros(size, dtype=torch.bool)
    batch = Batch([torch.randn(size, 3, SIZE, SIZE)], torch.arange(size), whole, unflipped)
    method.noise.begin(MIDDLE.step, 0, size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return method(batch, MIDDLE)["loss"]


@click.group(help=__doc__)
def main() -> None:
    """Both tables."""


@main.command("memory")
def memory() -> None:
    """Bytes by model and method, alone and shared out."""
    print("| | learn, M | state of one GPU, GB | of 8 (fsdp) | of 64 (fsdp) | per image, MB |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        for method in METHODS:
            found = count(model, method)
            shares = " | ".join(f"{found.state(shards) / 1e9:.2f}" for shards in (1, 8, 64))
            print(
                f"| {model}, {method} | {found.trained / 1e6:,.0f} | {shares} | "
                f"{found.kept / 1e6:,.0f} |"
            )


@main.command("speed")
@click.option("--batch-size", default=64, help="images of one GPU in a step")
@click.option("--tflops", default=350.0, help="rate in bf16 that a GPU keeps up in a step")
@click.option("--link", default=50.0, help="gigabytes a second between two machines, one way")
@click.option(
    "--model",
    "models",
    type=click.Choice(list(MODELS)),
    multiple=True,
    default=("ViT-B/16", "ViT-L/16"),
    help="may be given several times",
)
def speed(batch_size: int, tflops: float, link: float, models: tuple[str, ...]) -> None:
    """Steps and their exchange of gradients, by number of GPUs."""
    print(
        "| | GPUs | step alone, ms | gradients, MB | exchange, ms | efficiency: none hidden | all |"
    )
    print("|---|---|---|---|---|---|---|")
    for model in models:
        for method in METHODS:
            found = count(model, method)
            alone = batch_size * found.flops / (tflops * 1e12)
            size = FLOAT32 * found.trained
            for gpus in (8, 16, 32, 64):
                # A ring passes all but one share twice; inside of a machine it is far faster.
                machines = gpus // OF_A_MACHINE
                exchange = 2 * size * (machines - 1) / machines / (link * 1e9)
                worst, best = alone / (alone + exchange), alone / max(alone, exchange)
                print(
                    f"| {model}, {method} | {gpus} | {1e3 * alone:,.0f} | {size / 1e6:,.0f} | "
                    f"{1e3 * exchange:,.1f} | {worst:.0%} | {best:.0%} |"
                )


if __name__ == "__main__":
    main()
