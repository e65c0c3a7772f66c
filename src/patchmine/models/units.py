"""Mask units: squares of several patches that are hidden together, in pixels or in patches."""

from __future__ import annotations

import math

from patchmine.errors import UserError
from patchmine.ops.masks import count_positions
from patchmine.types import Grid


def patches_per_unit(grid: Grid, mask_unit: int | None) -> tuple[int, ...]:
    """Patches along each side of a mask unit that fills the image; of two patches for None."""
    per_unit = tuple(2 if mask_unit is None else mask_unit // step for step in grid.patch)
    sides = tuple(count * step for count, step in zip(per_unit, grid.patch, strict=True))
    if mask_unit is not None and sides != (mask_unit,) * len(sides):
        step = math.lcm(*grid.patch)
        wrong = f"method.mask_unit={mask_unit} is not a multiple of the patch, {_by(grid.patch)}"
        remedy = f"try method.mask_unit={max(step, round(mask_unit / step) * step)}"
        raise UserError(f"{wrong} pixels: {remedy}")
    if any(size % count for size, count in zip(grid.size, per_unit, strict=True)):
        image = tuple(size * step for size, step in zip(grid.size, grid.patch, strict=True))
        given = "null, two patches," if mask_unit is None else str(mask_unit)
        wrong = f"makes units of {_by(sides)} pixels, which do not fill image_size={_by(image)}"
        remedy = f"try method.mask_unit={math.lcm(*grid.patch)}, or another image_size"
        raise UserError(f"method.mask_unit={given} {wrong}: {remedy}")
    return per_unit


def block_grid(grid: Grid, mask_block: int) -> Grid:
    """The grid whose patches are squares of ``mask_block`` x ``mask_block`` patches.

    Raises:
        UserError: they do not fill the rows and columns.
    """
    rows, columns = grid.size[-2:]
    if rows % mask_block or columns % mask_block:
        fitting = math.gcd(rows, columns)
        nearest = max(n for n in range(1, fitting + 1) if fitting % n == 0 and n <= mask_block)
        wrong = f"blocks of {_by((mask_block,) * 2)} patches do not fill {_by((rows, columns))}"
        remedy = f"try method.mask_block={nearest}, or another image_size"
        raise UserError(f"method.mask_block={mask_block}: {wrong}: {remedy}")
    patch = (*grid.patch[:-2], *(mask_block * side for side in grid.patch[-2:]))
    return Grid((*grid.size[:-2], rows // mask_block, columns // mask_block), patch)


def count_visible_blocks(blocks: Grid, mask_block: int, mask_ratio: float) -> int:
    """How many blocks of a time slot stay visible; single patches are checked with the decoder.

    Raises:
        UserError: none, or all.
    """
    count, total = count_positions(blocks, mask_ratio), blocks.num_positions
    if mask_block > 1 and count in (0, total):
        wrong = f"leaves {count} of {total} blocks of method.mask_block={mask_block} visible"
        remedy = "try a smaller method.mask_block or another method.mask_ratio"
        raise UserError(f"method.mask_ratio={mask_ratio} {wrong}: {remedy}")
    return count


def _by(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))
