"""A method that one can check by eye: noise, an averaged copy in its state, two optimizers,
clipping, a late start.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from patchmine.task import Task
from patchmine.types import Batch, Losses, ParamGroup, Progress


class Toy(Task):
    """Predicts an image from a copy with holes; a slowly moving teacher gives a second target."""

    encoder: nn.Linear
    teacher: nn.Linear

    def __init__(self, *, nan_steps: tuple[int, ...] = (), nan_rank: int | None = None) -> None:
        super().__init__(None)
        torch.manual_seed(0)
        self.encoder = nn.Linear(12, 8)
        self.decoder = nn.Sequential(nn.GELU(), nn.Linear(8, 12))
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("epochs_begun", torch.zeros((), dtype=torch.int64))
        self.nan_steps, self.nan_rank = nan_steps, nan_rank

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0].flatten(1)  # (B, 12)
        holes = self.noise.uniform(len(batch), 12, device=images.device) < 0.5
        latent = self.encoder(images.masked_fill(holes, 0.0))  # (B, 8)
        pixels = (self.decoder(latent) - images).square().mean()
        copied = (latent - self.teacher(images)).square().mean()
        loss = pixels + 0.1 * copied
        spoilt = self.nan_rank is None or self.nan_rank * len(batch) == self.noise._first_row
        if progress.step in self.nan_steps and spoilt:
            loss = loss * torch.nan
        return {"loss": loss, "pixels": pixels}

    def after_step(self, progress: Progress) -> None:
        with torch.no_grad():
            for mine, theirs in zip(
                self.teacher.parameters(), self.encoder.parameters(), strict=True
            ):
                mine.lerp_(theirs, 0.05)

    def begin_epoch(self, progress: Progress) -> None:
        self.epochs_begun += 1

    def param_groups(self) -> list[ParamGroup]:
        encoder = [(f"encoder.{name}", p) for name, p in self.encoder.named_parameters()]
        decoder = [(f"decoder.{name}", p) for name, p in self.decoder.named_parameters()]
        return [
            ParamGroup(encoder, clip_norm=0.5),
            ParamGroup(
                decoder,
                optimizer="sgd",
                blr=2.0,
                min_lr=0.02,
                weight_decay=0.01,
                weight_decay_end=0.1,
                decay_all=True,
                clip_norm=0.1,
                clip_each=True,
                frozen_until=1,
            ),
        ]


def toy_batches(
    start: int,
    total: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
) -> Iterator[Batch]:
    """This process's micro-batches of random 3x2x2 images; the global batch is a function of the
    step.
    """
    rows = batch_size // (world_size * accumulate)
    for step in range(start, total):
        images = torch.randn(batch_size, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        for micro in range(accumulate):
            first = (micro * world_size + rank) * rows
            mine = slice(first, first + rows)
            index = torch.arange(batch_size)[mine]
            yield Batch(
                [images[mine]], index, torch.ones(rows, 4), torch.zeros(rows, dtype=torch.bool)
            )
