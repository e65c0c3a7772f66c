"""Losses of semantic segmentation, pixel by pixel or image by image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def pixel_losses(
    scores: Float[Tensor, "B K H W"], labels: Int[Tensor, "B H W"]
) -> Float[Tensor, "B H W"]:
    """Cross entropy of every pixel."""
    return F.cross_entropy(scores, labels, reduction="none")


def focal_losses(losses: Float[Tensor, "B H W"], gamma: float) -> Float[Tensor, "B H W"]:
    """Cross entropies with what is right already made small: ``(1 - p) ** gamma`` (1708.02002)."""
    return (1 - (-losses).exp()).clamp_min(0) ** gamma * losses


def dice_losses(
    scores: Float[Tensor, "B K H W"], labels: Int[Tensor, "B H W"], known: Bool[Tensor, "B H W"]
) -> Float[Tensor, "B"]:
    """1 - Dice of each image: the mean over the classes that it shows (arXiv 1606.04797)."""
    shares = scores.softmax(1) * known[:, None]  # (B, K, H, W)
    truth = F.one_hot(labels, scores.shape[1]).movedim(-1, 1) * known[:, None]
    common = (shares * truth).sum((2, 3))
    both = (shares.square() + truth).sum((2, 3))
    dice = 2 * common / both.clamp_min(torch.finfo(both.dtype).eps)  # (B, K)
    shown = truth.sum((2, 3)) > 0
    return 1 - (dice * shown).sum(1) / shown.sum(1).clamp_min(1)
