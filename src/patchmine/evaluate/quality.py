"""How many directions frozen features use: RankMe and the exponent of their spectrum, no labels."""

from __future__ import annotations

import torch
from torch import Tensor

from patchmine.errors import Say, UserError, silent
from patchmine.evaluate.features import Features
from patchmine.evaluate.labelled import everything
from patchmine.evaluate.measure import Result, opened
from patchmine.evaluate.pooled import Items, measure_pooled
from patchmine.evaluate.settings import QualitySettings

_ROWS = 16_384  # rows that are brought to double precision at once
# Ranks that alpha is fitted on.  The first ten are left out and the others weighted as Stringer et
# al. do (Nature 2019); alpha-ReQ leaves the range open.  That the hundredth is the last is our
# choice: behind it the spectra of small runs bend downwards.
_FIRST, _LAST = 11, 100


def evaluate_quality(settings: QualitySettings, say: Say = silent) -> Result:
    """RankMe (Garrido et al. 2023) and alpha (alpha-ReQ, Agrawal et al. 2022) of pooled features.

    Args:
        settings: model and data; labels are not read.
        say: hears about the progress.

    Returns:
        ``rankme``, the effective rank, at most the width; ``alpha``, at which power of the rank the
        eigenvalues of the covariance fall: about 1 in good features, larger where few directions
        hold all of the variance.

    Raises:
        UserError: the model or the data cannot be used, or there are fewer than three images.
    """
    evaluated = opened(settings)
    noun = evaluated.item.noun
    part = everything(evaluated.item.open(settings.data, remote_gb=settings.remote_gb))

    def measured(features: Features) -> Result:
        count, width = features.x.shape
        if count < 3:
            raise UserError(
                f"data has {count} {noun}s that can be read: a spectrum needs 3 or more"
            )
        second, mean = moments(features.x)
        covariance = second - torch.outer(mean, mean)
        found: Result = {"rankme": rankme(second), "alpha": alpha(covariance)}
        if count < width:
            few = f"{count:,} {noun}s are fewer than the width of the features, {width:,}"
            found["notes"] = [f"{few}: the rank is at most that number"]
        return found

    items = Items({noun + "s": part}, f"all {len(part):,} {noun}s of data, without labels")
    return measure_pooled(
        settings, "quality", evaluated, items, measured, say, pooling=settings.pooling
    )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the rows (N, D) of their outer products, (D, D), and of themselves, float64."""
    second = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS].double()
        second.addmm_(rows.T, rows)
        total += rows.sum(0)
    return second / len(x), total / len(x)


def rankme(second: Tensor) -> float:
    """exp of the entropy of the singular values of features with this second moment (D, D)."""
    # Squares of singular values are eigenvalues of the second moment, up to a common factor.
    singular = torch.linalg.eigvalsh(second).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-300) + 1e-7  # the paper's epsilon
    return float(torch.exp(-(share * share.log()).sum()))


def alpha(covariance: Tensor) -> float:
    """Minus the slope of log eigenvalue over log rank, weighted by 1 / rank (Stringer et al.)."""
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)  # largest first
    eigenvalues = eigenvalues[eigenvalues > 1e-12 * eigenvalues[0]]  # the others are rounding
    first = _FIRST if len(eigenvalues) > 2 * _FIRST else 1
    if len(eigenvalues) < 2:
        return 0.0
    y = eigenvalues[first - 1 : _LAST].log()
    rank = torch.arange(first, first + len(y), dtype=y.dtype)
    x, weight = rank.log(), 1 / rank
    x_mean, y_mean = ((weight * each).sum() / weight.sum() for each in (x, y))
    slope = (weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean).square()).sum()
    return -float(slope)
