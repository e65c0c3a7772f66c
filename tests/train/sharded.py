"""Trains tiny methods with divided weights; run by test_train_sharded.py as
`sharded.py FOLDER SHARDING STEPS METHOD ...`, by one process or by several as torchrun starts them.

Each run goes on from its newest checkpoint.  Rank 0 leaves the weights; every process the bytes of
parameters, gradients and optimizer state that it holds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from patchmine.backbones.family import build_encoder
from patchmine.errors import UserError
from patchmine.methods import METHODS, method_class
from patchmine.ops.shards import own_part
from patchmine.task import Method
from patchmine.train import loop
from patchmine.train.checkpoint import list_checkpoints, load_newest
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.loop import Hooks, train
from patchmine.train.optim import optimizer_tensors
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, Losses, Progress

IMAGES, STEPS, PER_EPOCH = 8, 4, 2
VIT = dict(embed_dim=24, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
RESNET = dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16], cifar_stem=True)
NARROW = dict(out_dim=20, head_hidden=16, head_bottleneck=8, thead_depth=1, thead_heads=2)
CASES: dict[str, dict[str, Any]] = {
    "mae": DECODER,
    "hpm": DECODER | dict(clip_grad=0.5),
    "amt": DECODER | dict(start_epoch=1, refresh_every=1),
    "mokd": NARROW | dict(partner_model="resnet18", partner_args=RESNET, drop_path=0.2),
}


def build(name: str) -> Method:
    torch.manual_seed(0)
    vit = build_encoder("vit_tiny_patch16_224", image_size=(16, 16), patch_size=4, model_args=VIT)
    settings = METHODS[name](**CASES[name])
    return method_class(settings)(settings, vit)


def batch_of(step: int, rows: slice, *, views: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    sides = (16, 16, 8, 8)[:views]
    images = [torch.randn(IMAGES, 3, side, side, generator=generator)[rows] for side in sides]
    count = len(images[0])
    boxes, flips = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.zeros(count, dtype=torch.bool)
    if views > 1:
        boxes, flips = boxes.repeat(views, 1), flips[:, None].repeat(1, views)
    return Batch(images, torch.arange(IMAGES)[rows], boxes.repeat(count, *[1] * boxes.ndim), flips)


class Plain:
    """The whole training set, of which each process sees its share: unequal ones."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __len__(self) -> int:
        return IMAGES

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.engine.rank, 5, self.engine.world_size):
            yield batch_of(100, slice(number, number + 1), views=1)


def with_gaps(batch: Batch) -> Batch:
    """The more images stand before one in the data, the less of it is there; of the last nothing."""
    rows = torch.arange(16)[:, None]
    known = rows >= 16 * batch.index[:, None, None, None] / (IMAGES - 1)
    return replace(batch, known=known.expand_as(batch.views[0]))


def micro_batches(
    engine: Engine, name: str, first: int, accumulate: int, gaps: bool = False
) -> Iterator[Batch]:
    rows = IMAGES // (engine.world_size * accumulate)
    for step in range(first, STEPS):
        for micro in range(accumulate):
            row = (micro * engine.world_size + engine.rank) * rows
            batch = batch_of(step, slice(row, row + rows), views=4 if name == "mokd" else 1)
            yield with_gaps(batch) if gaps else batch


def spoil(_: Method, inputs: tuple[Batch, Progress], losses: Losses) -> None:
    """In the process that has the last image: no finite loss in step 1, a finite one without a
    finite gradient in step 2.
    """
    batch, progress = inputs
    if IMAGES - 1 not in batch.index:
        return
    if progress.step == 1:
        losses["loss"] = losses["loss"] * torch.nan
    if progress.step == 2:
        losses["loss"] = losses["loss"] * 1.0
        losses["loss"].register_hook(lambda gradient: gradient * torch.inf)


def held_bytes(stepper: Stepper) -> int:
    """Of parameters, gradients and optimizer state in this process."""
    weights = [*stepper.task.parameters()]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    state = optimizer_tensors(stepper.optimizers).values()
    return sum(own_part(tensor).nbytes for tensor in [*weights, *gradients, *state])


def train_case(engine: Engine, folder: Path, name: str, last: int, **given: Any) -> None:
    method, out, held = build(name), folder / name, []
    accumulate, gaps = given.pop("accumulate", 1), bool(given.pop("gaps", False))
    if given.pop("spoilt", False):
        method.register_forward_hook(spoil)  # its copy has it too
    values: dict[str, Any] = dict(batch_size=IMAGES, log_every=1, blr=0.1, warmup_epochs=1.0)
    settings = TrainSettings(
        **values, checkpoint_every=1, keep_checkpoints=20, accumulate=accumulate, **given
    )
    checkpoints = out / "checkpoints"
    start = load_newest(checkpoints, print) if list_checkpoints(checkpoints) else None
    first = 0 if start is None else start.step

    class Noting(Stepper):
        """Notes what is held after each part of a batch and each step, and stops behind the last."""

        def _add_gradient(self, batch: Batch, progress: Progress, micro: int) -> None:
            super()._add_gradient(batch, progress, micro)
            held.append(held_bytes(self))

        def make(self, progress: Progress, batches: Iterator[Batch]) -> Batch:
            done = super().make(progress, batches)
            held.append(held_bytes(self))
            if progress.step + 1 == last < STEPS:
                os.kill(os.getpid(), signal.SIGTERM)
            return done

    loop.Stepper = Noting  # type: ignore[misc]
    plain, say = Plain(engine), lambda text: None
    hooks = Hooks(before_epoch=lambda now: method.begin_epoch(now, plain))
    with Log(
        out if engine.is_main else None,
        total_steps=STEPS,
        first_step=first,
        say=say,
        tensorboard=False,
    ) as log:
        batches = micro_batches(engine, name, first, accumulate, gaps)
        length, keeper = Progress(0, STEPS, PER_EPOCH), Keeper(checkpoints, start)
        try:
            train(method, batches, engine, settings, length, keeper=keeper, log=log, hooks=hooks)
        except SystemExit:
            if last == STEPS:
                raise
    (out / f"held-{engine.rank}.json").write_text(json.dumps(max(held, default=0)))
    if engine.is_main and last == STEPS:
        save_file(method.state_dict(), out / "weights.safetensors")


def main(folder: Path, sharding: str, last: int, names: list[str]) -> None:
    nodes = 2 if sharding == "hybrid" else 1
    engine = Engine(device="cpu", num_nodes=nodes, sharding=sharding)  # type: ignore[arg-type]
    with engine.together():
        for name in names:
            base, _, given = name.partition("+")
            extra = {
                key: (int(value) if value.isdigit() else value)
                for key, value in (pair.split("=") for pair in given.split("+") if pair)
            }
            train_case(engine, folder / given if given else folder, base, last, **extra)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    except UserError as error:  # as the command line does
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
