"""Linear classifiers on frozen features: DINOv2's grid of learning rates and poolings, or MAE's
single LARS probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from patchmine.errors import UserError
from patchmine.evaluate.features import Features, Reader
from patchmine.evaluate.heads import accuracy, grid_accuracy, train_grid, train_lars
from patchmine.evaluate.labelled import split_by_class
from patchmine.evaluate.measure import Result, measure, reading_of
from patchmine.evaluate.progress import Say, progress, silent
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
    the best one on a held-out part is scored on the test images.  ``"mae"``: see ``train_lars``.

    Args:
        settings: target, data and protocol.
        say: hears about the progress.

    Returns:
        ``top1`` and ``top5`` in percent, what was chosen, and what was read.

    Raises:
        UserError: the target or the data cannot be used, or settings do not fit together.
    """
    if settings.protocol == "mae":
        if settings.warmup_epochs >= settings.epochs:
            raise UserError(
                f"warmup_epochs={settings.warmup_epochs} must be below epochs={settings.epochs}"
            )
        return measure(settings, "linear-mae", lambda *given: _mae(settings, say, *given), say)
    return measure(
        settings, "linear", lambda *given: _dinov2(settings, say, *given), say, blocks=BLOCKS
    )


def batch_for(images: int, *, steps: int, least: int, most: int) -> int:
    """The largest power of two with which an epoch of ``images`` has ``steps`` steps, kept between
    ``least`` and ``most``.

    All images at once where they are fewer than that.
    """
    power = 2 ** int(math.log2(max(1, images // steps)))
    return min(images, max(least, min(most, power)))


def iterations_for(images: int, batch: int) -> int:
    """100 epochs, but no fewer than 2,000 steps and no more than DINOv2's 12,500."""
    return min(MAX_ITERATIONS, max(MIN_ITERATIONS, EPOCHS * (images // batch)))


def _dinov2(
    settings: LinearSettings,
    say: Say,
    reader: Reader,
    train: Features,
    test: Features,
    num_classes: int,
) -> Result:
    classify, told = best_of_grid(settings, say, reader, train, num_classes)
    found = accuracy(
        lambda rows: classify(rows)[..., None], test.x, _known(test), reading_of(settings).place()
    )
    top1, top5 = found[0].tolist()
    return {"top1": top1, "top5": top5, **told}


def best_of_grid(
    settings: GridSettings, say: Say, reader: Reader, train: Features, num_classes: int
) -> tuple[Callable[[Tensor], Tensor], Result]:
    """The classifier, rows (B, S, D) -> logits (B, C), that is best on held-out rows of ``train``;
    how it was chosen.

    The rows must lie on the device that the settings name.
    """
    device = reading_of(settings).place()
    labels = _known(train)
    fit, choice = (
        torch.from_numpy(part) for part in split_by_class(labels.numpy(), settings.held_out)
    )
    if len(choice) == 0:
        raise UserError(
            "every class has but one training image, so that no classifier can be chosen: give more"
        )
    # DINOv2 has 1,024 for ImageNet; on 20,000 small images 256 gained 3 points over that for the
    # same work.
    batch = min(
        len(fit), settings.train_batch or batch_for(len(fit), steps=128, least=64, most=1_024)
    )
    iterations = settings.iterations or iterations_for(len(fit), batch)
    with progress(
        f"{reader.target.name}: {len(settings.rates) * len(reader.poolings)} classifiers",
        iterations,
        say,
    ) as tick:
        grid = train_grid(
            train.x,
            labels,
            num_classes,
            reader.poolings,
            [rate * batch / 256 for rate in settings.rates],
            rows=fit,
            iterations=iterations,
            batch_size=batch,
            seed=settings.seed,
            device=device,
            tick=lambda: tick(1),
        )
    held_out = grid_accuracy(grid, train.x[choice], labels[choice], device)
    pooling = max(held_out, key=lambda name: float(held_out[name][:, 0].max()))
    chosen = int(held_out[pooling][:, 0].argmax())
    if chosen in (0, len(settings.rates) - 1) and len(settings.rates) > 1:
        say(
            f"{reader.target.name}: the best rate, {settings.rates[chosen]:g}, is at the edge of rates=...; widen them"
        )
    told = {
        "chosen": {
            "pooling": pooling,
            "rate": settings.rates[chosen],
            "held_out_top1": float(held_out[pooling][chosen, 0]),
        },
        "held_out_top1": {
            name: dict(zip(map(str, settings.rates), scores[:, 0].tolist(), strict=True))
            for name, scores in held_out.items()
        },
        "settings": {
            "iterations": iterations,
            "train_batch": batch,
            "trained_on": len(fit),
            "chosen_on": len(choice),
        },
    }
    return lambda rows: grid.logits(pooling, rows)[..., chosen], told


def _mae(
    settings: LinearSettings,
    say: Say,
    reader: Reader,
    train: Features,
    test: Features,
    num_classes: int,
) -> Result:
    device = reading_of(settings).place()
    pooling = reader.choose("cls")
    columns = reader.poolings[pooling]
    batch = min(
        len(train), settings.train_batch or batch_for(len(train), steps=32, least=64, most=16_384)
    )
    growth = settings.epochs * settings.blr * len(train)
    if growth < _LARS_GROWTH / 10:
        blr = settings.blr * _LARS_GROWTH / growth
        say(
            f"{len(train):,} images are few for LARS at blr={settings.blr:g}, which then underfits: try blr={blr:.2g}"
        )
    with progress(
        f"{reader.target.name}: classifier", settings.epochs * (len(train) // batch), say
    ) as tick:
        head = train_lars(
            train.x[:, columns].flatten(1),
            _known(train),
            num_classes,
            epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            batch_size=batch,
            blr=settings.blr,
            seed=settings.seed,
            device=device,
            tick=lambda: tick(1),
        )
    found = accuracy(
        lambda rows: head(rows)[..., None], test.x[:, columns].flatten(1), _known(test), device
    )
    top1, top5 = found[0].tolist()
    used = {
        "epochs": settings.epochs,
        "warmup_epochs": settings.warmup_epochs,
        "blr": settings.blr,
        "train_batch": batch,
    }
    return {"top1": top1, "top5": top5, "settings": {"pooling": pooling, **used}}


def _known(features: Features) -> Tensor:
    assert features.labels is not None, "labelled data has labels"
    return features.labels
