"""Trains methods whose rows meet, in one process or two: `distilled.py FOLDER` starts the second
one itself.

Run by test_methods_processes.py.  Rank 0 leaves weights, teachers, centres and the log of each
case, and what batch norms made of unequal shares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from patchmine.backbones.family import build_encoder
from patchmine.methods.mokd import MOKD
from patchmine.methods.scfs import SCFS
from patchmine.models.batch_norm import synchronise_batch_norms
from patchmine.models.processes import num_processes
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.loop import train
from patchmine.train.settings import TrainSettings
from patchmine.types import Batch, Progress

STEPS, IMAGES = 4, 8
CASES = {
    "dino": 1,
    "mokd": 1,
    "mokd-resnet": 1,
    "scfs": 1,
    "scfs-accumulated": 2,
}  # parts of a batch
NORMS = {
    "rows": (nn.BatchNorm1d, (8, 5), {}),
    "maps": (nn.BatchNorm2d, (8, 5, 3, 4), {}),
    "without weights": (nn.BatchNorm2d, (8, 5, 3, 4), {"affine": False}),
    "without running statistics": (nn.BatchNorm1d, (8, 5), {"track_running_stats": False}),
    "cumulative": (nn.BatchNorm2d, (8, 5, 2, 2), {"momentum": None}),
}

VIT = dict(embed_dim=24, depth=2, num_heads=2)
RESNET = dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16], cifar_stem=True)
NARROW = dict(out_dim=20, head_hidden=16, head_bottleneck=8)
STAGES = dict(stage_out_dim=6, stage_hidden=12, stage_bottleneck=8)


def build(name: str) -> Method:
    torch.manual_seed(0)
    vit = build_encoder("vit_tiny_patch16_224", image_size=(16, 16), patch_size=4, model_args=VIT)
    if name == "dino":
        return SCFS(SCFS.Config(stage_weights=0, optimizer="sgd", ema_start=0.9, **NARROW), vit)
    if name.startswith("scfs"):
        resnet = build_encoder("resnet18", image_size=(16, 16), model_args=RESNET)
        return SCFS(SCFS.Config(ema_start=0.9, **NARROW, **STAGES), resnet)
    partner = dict(
        partner_model="vit_tiny_patch16_224", partner_args=VIT | dict(depth=1, patch_size=4)
    )
    if name == "mokd-resnet":
        partner = dict(partner_model="resnet18", partner_args=RESNET)
    options = dict(cross_weight=0.5, partner_cross_weight=1.0, ema_start=0.9, weight_decay_end=None)
    method = MOKD(MOKD.Config(thead_depth=1, thead_heads=2, **NARROW, **partner, **options), vit)
    # AdamW makes a step of full length out of a gradient that is rounding only; nothing else of the
    # groups changes.
    groups = [replace(group, optimizer="sgd") for group in method.param_groups()]
    method.param_groups = lambda: groups  # type: ignore[method-assign]
    return method


def batches(rank: int, processes: int, accumulate: int) -> Iterator[Batch]:
    rows = IMAGES // (processes * accumulate)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(IMAGES, 3, side, side, generator=generator) for side in (16, 16, 8, 8)]
        for micro in range(accumulate):
            first = (micro * processes + rank) * rows
            mine = [view[first : first + rows] for view in views]
            yield Batch(
                mine,
                torch.arange(rows),
                torch.zeros(rows, 4, 4),
                torch.zeros(rows, 4, dtype=torch.bool),
            )


def train_case(engine: Engine, name: str, folder: Path) -> None:
    method, accumulate = build(name), CASES[name]
    settings = TrainSettings(
        batch_size=IMAGES,
        checkpoint_every=100,
        accumulate=accumulate,
        log_every=1,
        blr=0.2 if name.startswith("scfs") else 2.0,  # a ResNet at 2.0 makes much of a rounding
        warmup_epochs=1.0,
    )
    say = lambda text: None  # noqa: E731
    with Log(
        folder / name if engine.is_main else None, total_steps=STEPS, say=say, tensorboard=False
    ) as log:
        share = batches(engine.rank, engine.world_size, accumulate)
        length, keeper = Progress(0, STEPS, 2), Keeper(folder / name / "checkpoints")
        train(method, share, engine, settings, length, keeper=keeper, log=log)
    if engine.is_main:
        save_file(method.state_dict(), folder / name / "weights.safetensors")


def normalise(engine: Engine, name: str) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a batch norm after three batches, of which rank 0
    has three rows.
    """
    kind, shape, options = NORMS[name]
    torch.manual_seed(0)
    norm = kind(shape[1], **options).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    if engine.world_size > 1:
        synchronise_batch_norms(norm)
    mine = (
        slice(None) if engine.world_size == 1 else slice(0, 3) if engine.is_main else slice(3, None)
    )
    for _ in range(3):
        norm.zero_grad()
        rows = torch.randn(shape, dtype=torch.float64) * 3 + 50
        pull = torch.randn(shape, dtype=torch.float64)
        x = rows[mine].requires_grad_()
        y = norm(x)
        (y * pull[mine]).sum().backward()
    made = {"output": y, "grad_x": x.grad}
    weights = {name: parameter.grad for name, parameter in norm.named_parameters()}
    for gradient in weights.values():
        if num_processes() > 1:
            torch.distributed.all_reduce(gradient)
    if norm.track_running_stats:
        made["still"] = norm.eval()(rows[mine])
    return made | weights | dict(norm.named_buffers())


def main(engine: Engine, folder: Path) -> None:
    for name in CASES:
        train_case(engine, name, folder)
    for name in NORMS:
        torch.save(normalise(engine, name), folder / f"{name}-{engine.rank}.pt")


if __name__ == "__main__":
    main(Engine(device="cpu", devices=2), Path(sys.argv[1]))
