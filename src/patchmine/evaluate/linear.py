"""Linear classifiers on frozen features: DINOv2's grid, or MAE's LARS probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchmine.errors import Say, UserError, silent
from patchmine.evaluate.features import Features, Reader, device_of
from patchmine.evaluate.heads import grid_accuracy, train_grid, train_lars
from patchmine.evaluate.labelled import split_by_class
from patchmine.evaluate.measure import Learned, Result, measure, opened, readers_of
from patchmine.evaluate.progress import progress
from patchmine.evaluate.settings import GridSettings, LinearSettings

BLOCKS = 4
MAX_ITERATIONS, MIN_ITERATIONS, EPOCHS = 12_500, 2_000, 100
# MAE's probe sees 90 epochs of 1.28 million images at blr=0.1.  A LARS step changes weights by a
# share of the rate, whatever the gradient, so epochs * blr * images decides how far they can grow;
# below a tenth of MAE's they stay near their start.
_LARS_GROWTH = 90 * 0.1 * 1.28e6


def evaluate_linear(settings: LinearSettings, say: Say = silent) -> Result:
    """A linear classifier on the frozen features, trained on ``data``, reported on the test images.

    ``protocol="dinov2"``: classifiers for every pooling and learning rate are trained at once; only
    the best one on a held-out part is scored on the test images.  ``"mae"``: see `train_lars`.

    Args:
        settings: model, data and protocol.
        say: hears about the progress.

    Returns:
        ``top1`` and ``top5`` in percent, what was chosen, and what was read.

    Raises:
        UserError: the model or the data cannot be used, or settings do not fit together.
    """
    name, blocks, learn = "linear", BLOCKS, partial(learn_grid, settings, say)
    if settings.protocol == "mae":
        name, blocks, learn = "linear-mae", 1, partial(learn_mae, settings, say)
        if settings.warmup_epochs >= settings.epochs:
            warmup = f"warmup_epochs={settings.warmup_epochs}"
            raise UserError(f"{warmup} must be below epochs={settings.epochs}")
    readers = readers_of(settings, opened(settings), blocks, say)
    return measure(settings, {name: learn}, say, readers)[0]


def batch_for(images: int, *, steps: int, least: int, most: int) -> int:
    """The largest power of two in bounds that gives an epoch ``steps`` steps; else all images."""
    power = 2 ** int(math.log2(max(1, images // steps)))
    return min(images, max(least, min(most, power)))


def iterations_for(images: int, batch: int) -> int:
    """100 epochs, but no fewer than 2,000 steps and no more than DINOv2's 12,500."""
    return min(MAX_ITERATIONS, max(MIN_ITERATIONS, EPOCHS * (images // batch)))


@dataclass(frozen=True)
class GridPlan:
    """What classifiers of a grid are trained on, how long, and what they are chosen on."""

    fit: Tensor  # rows of the training features
    choice: Tensor
    batch: int
    iterations: int

    @property
    def told(self) -> Result:
        """What a result says about it."""
        steps = {"iterations": self.iterations, "train_batch": self.batch}
        return {**steps, "trained_on": len(self.fit), "chosen_on": len(self.choice)}


def grid_plan(settings: GridSettings, labels: Tensor) -> GridPlan:
    """The plan for training items with these labels (N,)."""
    fit, choice = map(torch.from_numpy, split_by_class(labels.numpy(), settings.held_out))
    if len(choice) == 0:
        few = f"held_out={settings.held_out:g}, but every class has but one training image"
        raise UserError(f"{few}, so that no classifier can be chosen: give more")
    # DINOv2 has 1,024 for ImageNet; on 20,000 small images 256 gained 3 points over that for the
    # same work.
    usual = batch_for(len(fit), steps=128, least=64, most=1_024)
    batch = min(len(fit), settings.train_batch or usual)
    return GridPlan(fit, choice, batch, settings.iterations or iterations_for(len(fit), batch))


def say_edge(name: str, rates: Sequence[float], best: int, say: Say) -> None:
    """Say where the best rate is the smallest or the largest."""
    if best in (0, len(rates) - 1) and len(rates) > 1:
        say(f"{name}: the best rate, {rates[best]:g}, is at the edge of rates=...; widen them")


def learn_grid(
    settings: GridSettings, say: Say, reader: Reader, train: Features, num_classes: int
) -> Learned:
    """The classifier of the grid that is best on held-out training items."""
    device, name, rates = device_of(settings), reader.evaluated.name, settings.rates
    assert train.labels is not None, "labelled data has labels"
    labels, plan = train.labels, grid_plan(settings, train.labels)
    title = f"{name}: {len(rates) * len(reader.poolings)} classifiers"
    with progress(title, plan.iterations, say) as tick:
        grid = train_grid(
            train.x,
            labels,
            num_classes,
            reader.poolings,
            [rate * plan.batch / 256 for rate in rates],
            rows=plan.fit,
            iterations=plan.iterations,
            batch_size=plan.batch,
            seed=settings.seed,
            device=device,
            tick=tick,
        )
    held_out = grid_accuracy(grid, train.x[plan.choice], labels[plan.choice], device)
    pooling = max(held_out, key=lambda key: float(held_out[key].max()))
    best = int(held_out[pooling].argmax())
    say_edge(name, rates, best, say)
    table = {key: row.tolist() for key, row in held_out.items()}
    told = {
        "chosen": {"pooling": pooling, "rate": rates[best], "held_out_top1": table[pooling][best]},
        "held_out_top1": {
            key: dict(zip(map(str, rates), row, strict=True)) for key, row in table.items()
        },
        "settings": plan.told,
    }

    def scores(rows: Tensor) -> dict[str, Tensor]:
        return {"best": grid.logits(pooling, rows.to(device))[..., best]}

    return Learned(scores, "best", told)


def learn_mae(
    settings: LinearSettings, say: Say, reader: Reader, train: Features, num_classes: int
) -> Learned:
    """MAE's probe on all training items."""
    device, pooling = device_of(settings), reader.choose("cls")
    assert train.labels is not None, "labelled data has labels"
    usual = batch_for(len(train), steps=32, least=64, most=16_384)
    batch = min(len(train), settings.train_batch or usual)
    growth = settings.epochs * settings.blr * len(train)
    if growth < _LARS_GROWTH / 10:
        few = f"{len(train):,} images are few for LARS at blr={settings.blr:g}"
        better = settings.blr * _LARS_GROWTH / growth
        say(f"{few}, which then underfits: try blr={better:.2g}")
    used: dict[str, Any] = settings.model_dump(include={"epochs", "warmup_epochs", "blr"})
    steps = settings.epochs * (len(train) // batch)
    with progress(f"{reader.evaluated.name}: classifier", steps, say) as tick:
        head = train_lars(
            reader.pooled(train.x, pooling),
            train.labels,
            num_classes,
            **used,
            batch_size=batch,
            seed=settings.seed,
            device=device,
            tick=tick,
        )
    return Learned(
        lambda rows: {"head": head(reader.pooled(rows.to(device), pooling))},
        "head",
        {"settings": {"pooling": pooling, **used, "train_batch": batch}},
    )
