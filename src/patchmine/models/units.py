"""Mask units: squares of several patches that are hidden together."""

from __future__ import annotations

import math

from patchmine.errors import UserError
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


def _by(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))
