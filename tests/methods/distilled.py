"""Trains DINO (as SCFS makes it) or MOKD in one process or two: `distilled.py NAME FOLDER N`.

Run by test_methods_processes.py.  Rank 0 leaves its weights, teachers and centres.  Backbones without batch norm, so
that two processes can agree with one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from patchmine.method import Method
from patchmine.methods.mokd import MOKD
from patchmine.methods.scfs import SCFS
from patchmine.models.vit import build_encoder
from patchmine.ops.schedules import LrSchedule
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import train
from patchmine.train.step import TrainSettings
from patchmine.types import Batch

STEPS, IMAGES = 4, 8


VIT = dict(embed_dim=24, depth=2, num_heads=2)
NARROW = dict(out_dim=20, head_hidden=16, head_bottleneck=8)


def build(name: str) -> Method:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", image_size=(16, 16), patch_size=4, model_args=VIT)
    if name == "dino":
        return SCFS(SCFS.Config(stage_weights=0, optimizer="sgd", ema_start=0.9, **NARROW), encoder)
    partner = dict(partner_model="vit_tiny_patch16_224", partner_args=VIT | dict(depth=1, patch_size=4))
    options = dict(cross_weight=0.5, partner_cross_weight=1.0, ema_start=0.9, weight_decay_end=None)
    method = MOKD(MOKD.Config(thead_depth=1, thead_heads=2, **NARROW, **partner, **options), encoder)
    # AdamW makes a step of full length out of a gradient that is rounding only; nothing else of the groups changes.
    groups = [replace(group, optimizer="sgd") for group in method.param_groups()]
    method.param_groups = lambda: groups  # type: ignore[method-assign]
    return method


def batches(rank: int, processes: int) -> Iterator[Batch]:
    rows = IMAGES // processes
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(IMAGES, 3, side, side, generator=generator) for side in (16, 16, 8, 8)]
        mine = [view[rank * rows : (rank + 1) * rows] for view in views]
        yield Batch(mine, torch.arange(rows), torch.zeros(rows, 4, 4), torch.zeros(rows, 4, dtype=torch.bool))


def main(name: str, folder: Path, processes: int) -> None:
    engine = Engine(device="cpu", devices=processes)
    method = build(name)
    settings = TrainSettings(
        total_steps=STEPS,
        steps_per_epoch=2,
        batch_size=IMAGES,
        checkpoint_every=100,
        blr=2.0,
        schedule=LrSchedule(warmup_epochs=1.0),
    )
    say = lambda text: None  # noqa: E731
    with Log(folder if engine.is_main else None, total_steps=STEPS, say=say, tensorboard=False) as log:
        share = batches(engine.rank, engine.world_size)
        train(method, share, engine, settings, folder=folder / "checkpoints", log=log)
    if engine.is_main:
        save_file(method.state_dict(), folder / "weights.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
