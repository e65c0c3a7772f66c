"""What a map of difficulty says: its order in each image, and whether it follows the picture.

Patches that a map does not score are -inf in it; they count nowhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def ranks(values: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Place of each number among those of its row, from 0 (least): (B, L) -> float32 (B, L)."""
    return values.argsort(dim=1, stable=True).argsort(dim=1).float()


def rank_correlation(one: Float[Tensor, "B L"], other: Float[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Spearman's rank correlation in each image, its mean over images: (B, L), (B, L) -> ().

    Args:
        one: (B, L); patches that are -inf in it do not count.
        other: (B, L), finite.
    """
    scored = one.isfinite()
    # What does not count comes first in both orders, so the ranks of the rest are those among
    # themselves but for a constant.
    first, second = ranks(one), ranks(other.where(scored, -torch.inf))
    weights = scored.float()
    first, second = _centred(first, weights), _centred(second, weights)
    product = (first * second).sum(dim=1)
    lengths = first.square().sum(dim=1) * second.square().sum(dim=1)
    return (product / lengths.clamp(min=1e-12).sqrt()).mean()


def position_share(maps: Float[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Share of the variance within images that the position alone explains: (B, L) -> ().

    Each image's map is brought to mean 0 and deviation 1.  Corrected for the number of images
    (adjusted R squared), so that maps of noise give 0 in the mean, which may be undercut.  One
    image tells nothing, and gives 0.
    """
    weights = maps.isfinite().float()
    values = _centred(maps.float(), weights)
    deviation = (values.square().sum(dim=1, keepdim=True) / _count(weights, dim=1)).sqrt()
    values = values / deviation.clamp(min=1e-12)
    means = (values * weights).sum(dim=0, keepdim=True) / _count(weights, dim=0)  # (1, L)
    images, positions = maps.shape
    if images == 1:
        return values.new_zeros(())
    total = weights.sum()
    rest = ((values - means).square() * weights).sum() / (total - positions).clamp(min=1)
    whole = values.square().sum() / (total - images).clamp(min=1)
    return 1 - rest / whole.clamp(min=1e-12)


def _centred(values: Tensor, weights: Tensor) -> Tensor:
    """Numbers without the mean of their row, 0 where the weight is 0."""
    values = values.where(weights > 0, 0.0)
    mean = values.sum(dim=1, keepdim=True) / _count(weights, dim=1)
    return (values - mean) * weights


def _count(weights: Tensor, dim: int) -> Tensor:
    return weights.sum(dim=dim, keepdim=True).clamp(min=1)
