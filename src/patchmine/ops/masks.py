"""Masks from noise, and from noise that a difficulty has bent; counts are fixed on the host."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchmine.types import Grid, Mask


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """V, how many patches stay: ``int(L * (1 - r))``, truncated as every published run did."""
    return int(num_patches * (1 - mask_ratio))


def count_positions(grid: Grid, mask_ratio: float) -> int:
    """How many places stay: of an image `count_visible`, of a clip ``L_s - int(L_s * r)``.

    VideoMAE truncates the masked count (TubeMaskingGenerator): of 196 places it leaves 20 at 90 %.
    """
    if len(grid.size) == 2:
        return count_visible(grid.num_patches, mask_ratio)
    return grid.num_positions - int(mask_ratio * grid.num_positions)


def tubes(mask: Mask, grid: Grid) -> Mask:
    """A mask of places (B, rows * columns) at every time of a clip; one of all patches stays."""
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


def fill_blocks(mask: Mask, grid: Grid, block: int) -> Mask:
    """A mask of square blocks as one of their places; ``block`` places along a side.

    ``mask`` numbers the blocks of one time slot in raster order, what comes back its places.
    """
    if block == 1:
        return mask
    places = Grid(grid.size[-2:], grid.patch[-2:])
    visible, masked = (
        expand_units(index, places, (block, block)) for index in (mask.visible, mask.masked)
    )
    return Mask(visible, masked, places.num_patches)


def keep_masked(mask: Mask, noise: Float[Tensor, "B M"], count: int) -> Mask:
    """The mask with the ``count`` masked patches of lowest noise (B, M); the rest is in neither."""
    chosen = noise.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    return Mask(mask.visible, mask.masked.gather(1, chosen), mask.num_patches)


def lowest_visible(noise: Float[Tensor, "B L"], num_visible: int) -> Mask:
    """The patches of lowest noise (B, L) stay visible, both parts in raster order (MAE)."""
    order = noise.argsort(dim=1, stable=True)
    visible = order[:, :num_visible].sort(dim=1).values
    masked = order[:, num_visible:].sort(dim=1).values
    return Mask(visible, masked, noise.shape[1])


def hard_masked(
    noise: Float[Tensor, "B L"], difficulty: Float[Tensor, "B L"], num_hard: int, num_visible: int
) -> Mask:
    """The ``num_hard`` most difficult patches are masked, the visible ones drawn from the rest.

    Difficulties are compared in float32 by a stable sort (HPM, generate_mask; docs/methods/hpm.md).
    """
    if num_hard == 0:
        return lowest_visible(noise, num_visible)
    hardest = difficulty.float().argsort(dim=1, stable=True)[:, -num_hard:]
    return lowest_visible(noise.scatter(1, hardest, float("inf")), num_visible)


def expand_units(
    units: Int[Tensor, "B n"], grid: Grid, per_unit: tuple[int, ...]
) -> Int[Tensor, "B patches"]:
    """The patches inside each image's ``units`` (B, n): (B, n * patches in a unit), raster order.

    A unit is a block of ``per_unit`` patches along each axis of the grid, numbered in raster order.
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


def sum_in_units(
    values: Float[Tensor, "B L"], grid: Grid, per_unit: tuple[int, ...]
) -> Float[Tensor, "B units"]:
    """Sums of a number of each patch over units of ``per_unit`` patches: (B, L) -> (B, units)."""
    split = [
        part
        for size, step in zip(grid.size, per_unit, strict=True)
        for part in (size // step, step)
    ]
    inside = tuple(range(2, 1 + len(split), 2))
    return values.reshape(len(values), *split).sum(dim=inside).flatten(1)


def weighted_order(
    weights: Float[Tensor, "B L"], noise: Float[Tensor, "B L"]
) -> Int[Tensor, "B L"]:
    """A draw without replacement with chances in proportion to weights: (B, L), (B, L) -> (B, L).

    ``noise`` is uniform in [0, 1); equal to `torch.multinomial` with L draws (docs/methods/amt.md).
    Patches without weight come last, in random order.
    """
    weights = weights.float()
    # Below every positive score, whose logarithm is above -20 and whose noise adds between -3 and
    # 17.
    logits = torch.where(weights > 1e-6, weights.clamp(min=1e-6).log(), -50.0)
    return (logits - (-torch.log1p(-noise)).log()).argsort(dim=1, descending=True, stable=True)
