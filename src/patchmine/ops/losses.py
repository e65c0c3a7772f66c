"""Losses per patch, and HPM's two ways to learn which patches are hard.

All in float32, whatever autocast does around them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from patchmine.ops.patches import standardised_by

RANK_EPS = (
    1e-6  # HPM, forward_learning_loss; it also kills the gradient of pairs that are far apart
)

# Pairs held in memory at one time by the ranking loss: 16 MiB of float32 a tensor, however long the
# sequences are.
PAIRS_AT_ONCE = 1 << 22


def squared_error(
    prediction: Float[Tensor, "*rows P"], target: Float[Tensor, "*rows P"]
) -> Float[Tensor, "*rows"]:
    """Mean squared error of each patch, whose P numbers are on the last axis."""
    return (prediction.float() - target.float()).square().mean(dim=-1)


def absolute_error(
    prediction: Float[Tensor, "*rows P"], target: Float[Tensor, "*rows P"]
) -> Float[Tensor, "*rows"]:
    """Mean absolute error of each patch, whose P numbers are on the last axis."""
    return (prediction.float() - target.float()).abs().mean(dim=-1)


def masked_absolute_error(
    prediction: Float[Tensor, "B M P"], target: Float[Tensor, "B M P"], channels: int
) -> Float[Tensor, ""]:
    """Mean absolute error over the pixels of masked patches: (B, M, P), (B, M, P) -> ().

    As models/simmim.py: pixels of one channel are counted, 1e-5 is added to them, and the channels
    divide afterwards.  No masked patch at all gives 0.
    """
    pixels = prediction.numel() // channels
    return (prediction.float() - target.float()).abs().sum() / (pixels + 1e-5) / channels


def direction_error(
    prediction: Float[Tensor, "B M D"], target: Float[Tensor, "B M D"]
) -> Float[Tensor, "B M"]:
    """``2 - 2 cos`` of each patch, summed over channels: (B, M, D), (B, M, D) -> (B, M) (HPM)."""
    prediction = F.normalize(prediction.float(), dim=-1, eps=1e-12)
    target = F.normalize(target.float(), dim=-1, eps=1e-12)
    return (prediction - target).square().sum(dim=-1)


def absolute_difficulty_loss(
    predicted: Float[Tensor, "B M"],
    error: Float[Tensor, "B M"],
    counts: Bool[Tensor, "B M"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared distance to errors standardised in each image: (B, M), (B, M) -> ().

    Patches that do not count have a distance of 0; None: all count.
    """
    error = error.detach().float()
    if counts is not None:
        distance = predicted.float() - standardised_by(error, counts)
        return distance.where(counts, 0.0).square().mean()
    variance, mean = torch.var_mean(error, dim=1, keepdim=True, correction=1)
    return (predicted.float() - (error - mean) / (variance + 1e-6).sqrt()).square().mean()


def relative_difficulty_loss(
    predicted: Float[Tensor, "B M"],
    error: Float[Tensor, "B M"],
    counts: Bool[Tensor, "B M"] | None = None,
) -> Float[Tensor, ""]:
    """Mean of ``-log(sigmoid(p_a - p_b) + 1e-6)`` over pairs with error_a > error_b, ().

    Args:
        predicted: (B, M), difficulty of the masked patches of each image.
        error: (B, M), their true errors, which take no gradient; pairs of equal error do not count.
        counts: (B, M), patches whose pairs with others have a loss, which is 0 for other pairs;
            None: all.

    Each pair is visited once and the gradient is worked out with the loss (docs/methods/hpm.md).
    """
    return _PairwiseRanking.apply(predicted, error, counts)


class _PairwiseRanking(torch.autograd.Function):
    """Loss and gradient in one sweep over blocks of pairs; saves (B, M) numbers for backward."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, error: Tensor, counts: Tensor | None) -> Tensor:
        if counts is not None:
            error = error.where(counts, torch.nan)  # is larger than nothing, and nothing than it
        # Sorted by falling error, every ordered pair (a, b) has a before b: only blocks on and
        # above the diagonal are visited.
        error, order = error.float().sort(dim=1, descending=True)
        score = predicted.float().gather(1, order)
        batch, length = score.shape
        rows = max(1, min(length // 4, PAIRS_AT_ONCE // (batch * length)))
        total = score.new_zeros(())
        pairs = score.new_zeros(())
        slope = torch.zeros_like(score)
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            share = torch.sigmoid(
                score[:, start:stop, None] - score[:, None, start:]
            )  # (B, rows, M - start)
            ordered = error[:, start:stop, None] > error[:, None, start:]
            pairs += ordered.sum()
            total -= torch.where(ordered, torch.log(share + RANK_EPS), 0.0).sum()
            pull = torch.where(ordered, share * (1 - share) / (share + RANK_EPS), 0.0)
            slope[:, start:stop] -= pull.sum(dim=2)
            slope[:, start:] += pull.sum(dim=1)
        if counts is not None:
            number = counts.sum(dim=1)
            pairs += batch * length * (length - 1) // 2 - (number * (number - 1) // 2).sum()
        pairs = pairs.clamp(min=1)
        ctx.save_for_backward(torch.empty_like(slope).scatter_(1, order, slope / pairs))
        ctx.dtype = predicted.dtype
        return total / pairs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0]).to(ctx.dtype), None, None


def balanced_weights(counts: Tensor) -> Tensor:
    """(K,) weights by which classes of ``counts`` (K,) images all count the same, 1 on average."""
    counts = counts.float()
    return counts.sum() / (len(counts) * counts.clamp_min(1))
