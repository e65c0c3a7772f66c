"""Classes and masks that queries propose: what they cost, what is learned of them, what they say.

The costs and losses of Mask2Former (arXiv 2112.01527) on label maps: a class that an image shows is
one mask.  N are images, or images at several depths; points are (x, y) in [0, 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NO_CLASS = 0.1  # weight of a query that is to say nothing, beside 1
_LEAST = 1e-6  # of a class at a pixel, so that its logarithm is finite


def values_at(
    maps: Float[Tensor, "N C h w"], points: Float[Tensor, "N P 2"]
) -> Float[Tensor, "N C P"]:
    """Bilinear between the places of the maps, as a map is enlarged."""
    # The same points for all channels of an image: one look-up serves them all.  Published are
    # zeros around the maps, by which masks are never sure at the edges of a crop.
    grid = 2 * points[:, None] - 1
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0]


def pixels_at(maps: Tensor, points: Float[Tensor, "N P 2"]) -> Tensor:
    """(N, H, W) -> (N, P): of the pixel that a point lies in."""
    height, width = maps.shape[1:]
    column = (points[..., 0] * width).long().clamp_max(width - 1)
    row = (points[..., 1] * height).long().clamp_max(height - 1)
    return maps.flatten(1).gather(1, row * width + column)


def classes_shown(
    labels: Int[Tensor, "N H W"], known: Bool[Tensor, "N H W"], num_classes: int
) -> Bool[Tensor, "N K"]:
    """Which classes each image has a known pixel of."""
    counts = labels.new_zeros(len(labels), num_classes)
    return counts.scatter_add(1, labels.flatten(1), known.flatten(1).long()) > 0


def pair_costs(
    classes: Float[Tensor, "N Q C"],
    logits: Float[Tensor, "N Q P"],
    labels: Int[Tensor, "N P"],
    known: Bool[Tensor, "N P"],
) -> Float[Tensor, "N Q K"]:
    """What it would cost that a query stood for a class, C = K + 1: the weighted sum of three.

    Args:
        classes: scores before softmax, the last of no class.
        logits: of the masks, at points.
        labels: classes from 0 at these points.
        known: points that are of some class; the others do not count.
    """
    truth = F.one_hot(labels, classes.shape[2] - 1) * known[..., None]
    truth = truth.to(logits.dtype)  # (N, P, K)
    counted = known[:, None].to(logits.dtype)  # (N, 1, P)
    # Cross entropy of x is softplus(x) - x where the truth is 1, and softplus(x) elsewhere.
    entropy = (F.softplus(logits) * counted).sum(2, keepdim=True) - logits @ truth
    entropy = entropy / counted.sum(2, keepdim=True).clamp_min(1)
    shares = logits.sigmoid() * counted
    both = shares.sum(2, keepdim=True) + truth.sum(1, keepdim=True)
    dice = 1 - (2 * shares @ truth + 1) / (both + 1)
    right = classes.softmax(2)[..., :-1]
    return MASK_WEIGHT * entropy + DICE_WEIGHT * dice - CLASS_WEIGHT * right


def class_losses(
    classes: Float[Tensor, "N Q C"], matched: Int[Tensor, "N K"]
) -> Float[Tensor, "N"]:
    """Weighted cross entropy: a query is to say the class that it was matched with, or no class.

    Args:
        classes: scores before softmax, C = K + 1.
        matched: the query of each class, -1 for classes without one.
    """
    images, queries, last = classes.shape[0], classes.shape[1], classes.shape[2] - 1
    # Classes without a query write to one place more, which is cut off.
    place = torch.where(matched < 0, queries, matched)
    every = torch.arange(last, device=matched.device).expand(images, -1)
    target = matched.new_full((images, queries + 1), last).scatter(1, place, every)[:, :-1]
    weights = torch.where(target == last, NO_CLASS, 1.0)
    each = F.cross_entropy(classes.transpose(1, 2), target, reduction="none")
    return (weights * each).sum(1) / weights.sum(1)


def uncertain_points(
    logits: Float[Tensor, "N K M"], known: Bool[Tensor, "N M"], count: int
) -> Int[Tensor, "N K P"]:
    """Of candidates, the last quarter of ``count`` and the most uncertain of the others.

    PointRend's choice (arXiv 1912.08193): three quarters of the points lie where a mask is least
    sure, and they are the closest to 0 of three times ``count`` candidates.
    """
    random = count // 4
    rest = logits.shape[2] - random
    doubt = (-logits[..., :rest].detach().abs()).masked_fill(~known[:, None, :rest], -torch.inf)
    chosen = doubt.topk(count - random, dim=2).indices
    last = torch.arange(rest, rest + random, device=logits.device)
    return torch.cat([chosen, last.expand(*chosen.shape[:2], -1)], dim=2)


def mask_losses(
    logits: Float[Tensor, "N Q M"],
    labels: Int[Tensor, "N M"],
    known: Bool[Tensor, "N M"],
    matched: Int[Tensor, "N K"],
    count: int,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Cross entropy and 1 - Dice of each image: means over its matched masks.

    Args:
        logits: of the masks, at candidates for points.
        labels: classes from 0 at the same candidates.
        known: candidates that are of some class; the others do not count.
        matched: the query of each class, -1 for classes without one.
        count: points of each mask that are learned from, see `uncertain_points`.
    """
    width = logits.shape[2]
    own = logits.gather(1, matched.clamp_min(0)[..., None].expand(-1, -1, width))  # (N, K, M)
    index = uncertain_points(own, known, count)
    classes = torch.arange(matched.shape[1], device=matched.device)[:, None]
    truth = (labels[:, None] == classes).to(own.dtype).gather(2, index)  # (N, K, P)
    counted = known[:, None].expand_as(own).gather(2, index).to(own.dtype)
    own = own.gather(2, index)
    each = F.binary_cross_entropy_with_logits(own, truth, reduction="none")
    entropy = (each * counted).sum(2) / counted.sum(2).clamp_min(1)  # (N, K)
    shares, truth = own.sigmoid() * counted, truth * counted
    dice = 1 - (2 * (shares * truth).sum(2) + 1) / (shares.sum(2) + truth.sum(2) + 1)
    real = (matched >= 0).to(own.dtype)
    masks = real.sum(1).clamp_min(1)
    return (entropy * real).sum(1) / masks, (dice * real).sum(1) / masks


def class_scores(
    classes: Float[Tensor, "N Q C"], masks: Float[Tensor, "N Q *P"]
) -> Float[Tensor, "N K *P"]:
    """Scores of classes, at pixels or points: what their softmax is, is the share of each class.

    The sum over queries of the probability of a class times that of the mask (arXiv 2107.06278), as
    a logarithm, C = K + 1.
    """
    shares = classes.softmax(2)[..., :-1]
    sums = torch.einsum("nqk,nq...->nk...", shares, masks.sigmoid())
    return sums.clamp_min(_LEAST).log()
