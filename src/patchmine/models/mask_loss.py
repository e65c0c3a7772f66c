"""What a network learns that proposes masks: a match, and three losses at points."""

from __future__ import annotations

import torch
from torch import Tensor

from patchmine.models.eomt import Proposals
from patchmine.models.matching import match
from patchmine.ops import mask_queries as ops
from patchmine.types import Losses

_MOST_POINTS = 112 * 112  # of a mask, that are learned from
_CANDIDATES = 3  # for each of these points


def num_points(masks: Tensor) -> int:
    """Points of each mask that are learned from: as many as it has places, up to 12,544."""
    return min(_MOST_POINTS, masks.shape[-2] * masks.shape[-1])


def num_candidates(masks: Tensor) -> int:
    """Points that these are chosen from, see `mask_queries.uncertain_points`."""
    return _CANDIDATES * num_points(masks) + num_points(masks) // 4


def query_losses(proposals: Proposals, labels: Tensor, known: Tensor, points: Tensor) -> Losses:
    """The sum over depths of class, mask and Dice losses, each depth matched by itself.

    Points and not whole masks: they see labels as fine as these are, at the edges above all, and
    need the memory of the coarser maps.  Every number is a mean over images of what each image
    says by itself, so that a batch may be divided among processes; published is the mean over all
    masks of a batch.

    Args:
        proposals: at S depths.
        labels: (B, H, W) classes from 0, anything where they are not known.
        known: (B, H, W).
        points: (B, M, 2) uniform numbers, M = `num_candidates`.

    Returns:
        ``loss``; and of the last depth ``class``, ``mask``, ``dice`` without their weights, and
        ``accuracy``, the percentage of points that are given the right class.
    """
    depths, count = len(proposals.classes), num_points(proposals.masks)
    classes = proposals.classes.float().flatten(0, 1)  # (S * B, Q, K + 1)
    masks = proposals.masks.float().flatten(0, 1)  # (S * B, Q, h, w)
    shown = ops.classes_shown(labels, known, classes.shape[2] - 1)
    labels, known = ops.pixels_at(labels, points), ops.pixels_at(known, points)  # (B, M)
    points, labels, known, shown = (
        each.repeat(depths, *[1] * (each.ndim - 1)) for each in (points, labels, known, shown)
    )
    with torch.autocast(masks.device.type, enabled=False):
        logits = ops.values_at(masks, points)  # (S * B, Q, M)
        few = (logits[..., :count], labels[:, :count], known[:, :count])
        with torch.no_grad():
            costs = ops.pair_costs(classes, *few)
        matched = match(costs, shown)
        class_loss = ops.class_losses(classes, matched)
        mask_loss, dice_loss = ops.mask_losses(logits, labels, known, matched, count)
        each = ops.CLASS_WEIGHT * class_loss
        each = each + ops.MASK_WEIGHT * mask_loss + ops.DICE_WEIGHT * dice_loss  # (S * B,)
    last = len(each) // depths
    told = {"class": class_loss, "mask": mask_loss, "dice": dice_loss}
    losses = {name: loss[-last:].detach().mean() for name, loss in told.items()}
    with torch.no_grad():
        found = ops.class_scores(classes[-last:], few[0][-last:]).argmax(1)
        right = (found == few[1][-last:]) & few[2][-last:]
        losses["accuracy"] = 100 * (right.sum(1) / few[2][-last:].sum(1).clamp_min(1)).mean()
    return {"loss": depths * each.mean(), **losses}
