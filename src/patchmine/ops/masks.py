"""Masks from noise, and from noise that a difficulty has bent.

Counts are fixed on the host; nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchmine.types import Grid, Mask


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """V, how many patches stay: ``int(L * (1 - r))``, truncated on binary floats as every published
    run did.
    """
    return int(num_patches * (1 - mask_ratio))


def count_positions(grid: Grid, mask_ratio: float) -> int:
    """How many places of rows and columns stay: of an image `count_visible`, of a clip ``L_s -
    int(L_s * r)``.

    VideoMAE truncates the masked count where MAE truncates the visible one (TubeMaskingGenerator):
    of 196 places it leaves 20 at 90 % where MAE's rule leaves 19.
    """
    if len(grid.size) == 2:
        return count_visible(grid.num_patches, mask_ratio)
    return grid.num_positions - int(mask_ratio * grid.num_positions)


def tubes(mask: Mask, grid: Grid) -> Mask:
    """A mask of places (B, rows * columns) repeated at every time of a clip; a mask of all patches
    stays as it is.
    """
    slots = grid.num_patches // mask.num_patches
    if slots == 1:
        return mask
    start = (
        torch.arange(slots, device=mask.visible.device)[:, None] * mask.num_patches
    )  # (slots, 1)
    visible, masked = (
        (index[:, None, :] + start).flatten(1) for index in (mask.visible, mask.masked)
    )
    return Mask(visible, masked, grid.num_patches)


def lowest_visible(noise: Tensor, num_visible: int) -> Mask:
    """The ``num_visible`` patches of lowest noise (B, L) stay visible, the rest is masked (MAE,
    random_masking).

    Both index tensors come in raster order, which changes nothing but the order of summation.
    """
    order = noise.argsort(dim=1, stable=True)
    visible = order[:, :num_visible].sort(dim=1).values
    masked = order[:, num_visible:].sort(dim=1).values
    return Mask(visible, masked, noise.shape[1])


def hard_masked(noise: Tensor, difficulty: Tensor, num_hard: int, num_visible: int) -> Mask:
    """The ``num_hard`` patches of greatest difficulty (B, L) are masked; the visible ones are drawn
    among the others.

    The visible set is a uniform subset of what is not hard (HPM, generate_mask; docs/methods/hpm.md). Difficulties are compared in float32 with a stable sort, since bfloat16 ties would
    be broken differently from run to run.
    """
    if num_hard == 0:
        return lowest_visible(noise, num_visible)
    hardest = difficulty.float().argsort(dim=1, stable=True)[:, -num_hard:]
    return lowest_visible(noise.scatter(1, hardest, float("inf")), num_visible)


def expand_units(units: Tensor, grid: Grid, per_unit: tuple[int, ...]) -> Tensor:
    """The patches inside each image's ``units`` (B, n), raster order: (B, n * patches in a unit)
    int64.

    A unit is a block of ``per_unit`` patches, one number for each axis of the grid, each of which
    divides the grid's; units are numbered in raster order too.
    """
    split = [
        part
        for size, step in zip(grid.size, per_unit, strict=True)
        for part in (size // step, step)
    ]
    numbers = torch.arange(grid.num_patches, device=units.device).reshape(
        split
    )  # (u0, s0, u1, s1, ...)
    inside = numbers.permute(*range(0, len(split), 2), *range(1, len(split), 2)).reshape(
        -1, math.prod(per_unit)
    )
    return inside[units].flatten(1).sort(dim=1).values


def sum_in_units(values: Tensor, grid: Grid, per_unit: tuple[int, ...]) -> Tensor:
    """The sum of a number of each patch over every unit of ``per_unit`` patches: (B, L) -> (B,
    units).
    """
    split = [
        part
        for size, step in zip(grid.size, per_unit, strict=True)
        for part in (size // step, step)
    ]
    inside = tuple(range(2, 1 + len(split), 2))
    return values.reshape(len(values), *split).sum(dim=inside).flatten(1)


def weighted_order(weights: Tensor, noise: Tensor) -> Tensor:
    """A draw without replacement with chances in proportion to ``weights``: (B, L), (B, L) -> (B,
    L) int64.

    ``noise`` is uniform in [0, 1).  With q = -log(1 - noise), which is exponential, the patches are
    sorted by falling weight / q; that is `torch.multinomial` with L draws (docs/methods/amt.md).  Patches without weight come last, in random order.
    """
    weights = weights.float()
    # Below every positive score, whose logarithm is above -20 and whose noise adds between -3 and
    # 17.
    logits = torch.where(weights > 1e-6, weights.clamp(min=1e-6).log(), -50.0)
    return (logits - (-torch.log1p(-noise)).log()).argsort(dim=1, descending=True, stable=True)
