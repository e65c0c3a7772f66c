"""The patch grid that a stored position table is of: stated somewhere, seen in the table, or else
taken as square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from patchmine.backbones.description import Description
from patchmine.backbones.positions import RELATIVE, grid_of_fixed_table, grids_of
from patchmine.errors import UserError


class SourceGrid(NamedTuple):
    """Rows and columns of patches, the rows of the table that belong to no patch, and what was
    assumed, if anything.
    """

    grid: tuple[int, int]
    num_prefix: int
    note: str = ""


def source_grid(
    table: Tensor,
    prefix_rows: Sequence[int],
    patch: int | tuple[int, int],
    source: str,
    known: Description,
    source_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> SourceGrid:
    """The grid of a position table, from what knows it best.

    In this order: what the user says, what lies beside the file, the table itself where it is MAE's
    fixed one, and for a file that nothing describes a square, or ``image_size`` where its count of
    patches is no square.

    Args:
        table: (1, P + L, D), or BEiT's (distances + 3, H).
        prefix_rows: values that P may have, the likeliest first.
        patch: pixels on a side.
        source: the file, for messages.
        known: what is known about it.
        source_size: (height, width) in pixels that the user says it was trained at.
        image_size: (height, width) that it is wanted at.

    Raises:
        UserError: the rows are not those of the stated size, or form no square where nothing is
        stated.
    """
    sides = (patch, patch) if isinstance(patch, int) else patch
    for size, who in ((source_size, "source_size"), (known.image_size, known.source)):
        doubtful = who == known.source and not known.certain
        if size is not None and (not doubtful or _fits(table, prefix_rows, sides, size)):
            return _stated(table, prefix_rows, sides, size, f"{source}: {who} says")
    for prefix in prefix_rows if table.ndim == 3 else ():
        grid = grid_of_fixed_table(table[0, prefix:])
        if grid is not None:
            return SourceGrid(grid, prefix)
    assumed = _square(table, prefix_rows, sides) or _wanted(table, prefix_rows, sides, image_size)
    if assumed is not None:
        return assumed
    count = _num_places(table, prefix_rows[0])
    what = (
        f"{count} patches form" if table.ndim == 3 else f"the {count} distances of {RELATIVE} form"
    )
    raise UserError(
        f"{source}: {what} no square grid: give the image_size that it was trained at as source_size=[height,width] "
        "(of `patchmine import` and of patchmine.load_encoder), or keep its config.json beside it"
    )


def _square(table: Tensor, prefix_rows: Sequence[int], sides: tuple[int, int]) -> SourceGrid | None:
    for prefix in prefix_rows:
        side = math.isqrt(max(0, _num_places(table, prefix)))
        side = side if table.ndim == 3 else (side + 1) // 2
        if side > 0 and _rows_of(table, (side, side), prefix) == table.shape[-2]:
            return SourceGrid((side, side), prefix, _square_note((side, side), sides))
    return None


def _wanted(
    table: Tensor,
    prefix_rows: Sequence[int],
    sides: tuple[int, int],
    image_size: tuple[int, int] | None,
) -> SourceGrid | None:
    """The grid of ``image_size``, where the table has as many rows."""
    if image_size is None:
        return None
    grid = (image_size[0] // sides[0], image_size[1] // sides[1])
    for prefix in prefix_rows:
        if _rows_of(table, grid, prefix) == table.shape[-2]:
            note = f"its positions are taken as those of image_size, {grid[0]}x{grid[1]} patches"
            return SourceGrid(grid, prefix, f"{note}, because nothing says what it was trained at")
    return None


def _num_places(table: Tensor, num_prefix: int) -> int:
    """Patches, or distances, that the table has rows for."""
    return table.shape[1] - num_prefix if table.ndim == 3 else table.shape[0] - 3


def _rows_of(table: Tensor, grid: tuple[int, int], num_prefix: int) -> int:
    return (
        math.prod(grid) + num_prefix
        if table.ndim == 3
        else (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    )


def _fits(
    table: Tensor, prefix_rows: Sequence[int], sides: tuple[int, int], size: tuple[int, int]
) -> bool:
    """Whether images of that size have as many patches as the table."""
    if any(pixels % side for pixels, side in zip(size, sides, strict=True)):
        return False
    grid = (size[0] // sides[0], size[1] // sides[1])
    return any(_rows_of(table, grid, prefix) == table.shape[-2] for prefix in prefix_rows)


def _stated(
    table: Tensor,
    prefix_rows: Sequence[int],
    sides: tuple[int, int],
    size: tuple[int, int],
    who: str,
) -> SourceGrid:
    shown = "x".join(map(str, size))
    if any(pixels % side for pixels, side in zip(size, sides, strict=True)):
        raise UserError(
            f"{who} that it was trained at {shown} pixels, which patches of {sides[0]}x{sides[1]} do not fill"
        )
    grid = (size[0] // sides[0], size[1] // sides[1])
    for prefix in prefix_rows:
        if _rows_of(table, grid, prefix) == table.shape[-2]:
            return SourceGrid(grid, prefix)
    raise UserError(
        f"{who} that it was trained at {shown} pixels, {grid[0]}x{grid[1]} patches, but its position table has "
        f"{table.shape[-2]} rows and not {_rows_of(table, grid, prefix_rows[0])}: correct the one that is wrong"
    )


def _square_note(grid: tuple[int, int], sides: tuple[int, int]) -> str:
    """What was assumed, where another grid has as many patches."""
    if len(grids_of(math.prod(grid))) == 1:
        return ""
    pixels = f"{grid[0] * sides[0]}x{grid[1] * sides[1]}"
    return (
        f"its positions are taken as those of a square, {grid[0]}x{grid[1]} patches ({pixels} pixels), because nothing "
        "says the image size; if it was trained at another, give source_size=[height,width]"
    )
