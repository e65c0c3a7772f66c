"""Position tables: fixed ones, the grid that a table is of, and tables moved to another grid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor

from patchmine.backbones.description import Description
from patchmine.errors import UserError

RELATIVE = "relative_position_bias_table"  # BEiT's name for a table of distances
SHARED = f"rel_pos_bias.{RELATIVE}"  # the one of all blocks, where it is not one in each
_CLASS_ROWS = 3  # of such a table, at its end: class to patch, patch to class, class to itself


def sincos_table(width: int, size: tuple[int, ...]) -> Float[Tensor, "L D"]:
    """Float32 for a grid of (rows, columns) in raster order, as in every MAE file."""
    if len(size) != 2:
        raise ValueError(f"a sine-cosine table of rows and columns was asked for a grid of {size}")
    if width % 4:
        raise ValueError(f"a sine-cosine position table needs a width that 4 divides, got {width}")
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # (width / 4,)
    axes = [torch.arange(side, dtype=torch.float64) for side in size]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (columns, rows)]  # (L, width / 4) each
    parts = [part for angle in angles for part in (angle.sin(), angle.cos())]
    return torch.cat(parts, dim=1).float()


def interleaved_table(width: int, count: int) -> Float[Tensor, "L D"]:
    """Float32, VideoMAE's table: sine and cosine of the flattened index in turn."""
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000.0 ** (-2 * (channel // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * rate  # (count, width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def fixed_table(width: int, size: tuple[int, ...]) -> Float[Tensor, "L D"]:
    """What a decoder adds: MAE's for rows and columns, VideoMAE's for clips."""
    if len(size) == 2:
        return sincos_table(width, size)
    return interleaved_table(width, math.prod(size))


def num_rows(table: Tensor, grid: Sequence[int], num_prefix: int) -> int:
    """Rows of a table of this kind for ``grid``: absolute (1, P + L, D), or BEiT's distances."""
    if table.ndim == 3:
        return num_prefix + math.prod(grid)
    return math.prod(2 * side - 1 for side in grid) + _CLASS_ROWS


def move_positions(
    table: Tensor, source: tuple[int, int], wanted: tuple[int, int], num_prefix: int = 1
) -> Tensor:
    """The table of the grid ``source`` = (rows, columns) for the grid ``wanted``.

    The one way in which stored positions come to another image size, whoever opens them.  Grids are
    compared and never counts: 8x8 and 4x16 have as many patches and other places.

    Of (1, P + L, D) the first P = ``num_prefix`` rows stay and ``resample_abs_pos_embed`` of timm
    moves the others; of BEiT's distances ((2 rows - 1) (2 columns - 1) + 3, H) the last three stay
    and ``resize_rel_pos_bias_table`` of timm moves the others.
    """
    if table.shape[-2] != num_rows(table, source, num_prefix):
        raise ValueError(
            f"a table of {table.shape[-2]} rows is not one of {source[0]}x{source[1]} patches, "
            f"{num_rows(table, source, num_prefix)} rows"
        )
    if source == wanted:
        return table
    if table.ndim == 3:
        return resample_abs_pos_embed(
            table, list(wanted), list(source), num_prefix_tokens=num_prefix
        )
    return torch.cat([move_distances(table[:-_CLASS_ROWS], source, wanted), table[-_CLASS_ROWS:]])


def move_distances(table: Tensor, source: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Distances ((2 rows - 1) (2 columns - 1), H) of a grid or a window for another one."""
    # Told apart by head and axis, since flat ones are taken for squares by older versions of timm.
    distances = table.T.reshape(-1, *(2 * side - 1 for side in source))
    shape = (len(distances), 2 * wanted[0] - 1, 2 * wanted[1] - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm indexes
        moved = resize_rel_pos_bias_table(distances, wanted, shape)
    return moved.flatten(1).T


def is_position_table(name: str) -> bool:
    """Whether a tensor of an encoder is a table that `move_positions` takes."""
    return name == "pos_embed" or name.endswith(RELATIVE)


def move_all_positions(
    tensors: Mapping[str, Tensor], source: tuple[int, int], wanted: tuple[int, int], num_prefix: int
) -> tuple[dict[str, Tensor], list[str]]:
    """An encoder's tensors with every table moved, and what was moved, for a report."""
    moved, report = dict(tensors), []
    for name in filter(is_position_table, tensors if source != wanted else ()):
        moved[name] = move_positions(tensors[name], source, wanted, num_prefix)
        report.append(f"{name} from {source[0]}x{source[1]} to {wanted[0]}x{wanted[1]} patches")
    return moved, report


def give_each_its_own(
    tensors: Mapping[str, Tensor], names: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """An encoder's tensors for one that has tensors ``names``, and what was done, for a report.

    Where all blocks share one table of distances and there each has its own, each gets a copy, so
    that the two compute the same (SimMIM's fine-tuning).
    """
    tables = [name for name in names if name.endswith(f".attn.{RELATIVE}")]
    have_own = any(name in tensors for name in tables)
    if SHARED not in tensors or SHARED in names or not tables or have_own:
        return dict(tensors), []
    rest = {name: tensor for name, tensor in tensors.items() if name != SHARED}
    copies = {name: tensors[SHARED].clone() for name in tables}
    return rest | copies, [f"blocks.*.attn.{RELATIVE} from the shared table"]


def grids_of(count: int) -> list[tuple[int, int]]:
    """Every (rows, columns) with ``count`` patches, fewest rows first."""
    sides = [rows for rows in range(1, math.isqrt(count) + 1) if count % rows == 0]
    found = {(rows, count // rows) for rows in sides} | {(count // rows, rows) for rows in sides}
    return sorted(found)


def grid_of_fixed_table(table: Float[Tensor, "L D"]) -> tuple[int, int] | None:
    """The grid whose `sincos_table` the rows (L, D) are; None where they are learned."""
    count, width = table.shape
    if width % 4 or count > 2**16:
        return None
    for grid in grids_of(count):
        if torch.allclose(table.float(), sincos_table(width, grid), rtol=0, atol=1e-3):
            return grid
    return None


class SourceGrid(NamedTuple):
    """The grid of a stored table, its rows of no patch, and what was assumed, if anything."""

    grid: tuple[int, int]
    num_prefix: int
    note: str = ""


def _prefix_at(table: Tensor, grid: tuple[int, int], prefix_rows: Sequence[int]) -> int | None:
    """Rows of no patch in a table of that grid; None where the table is of another."""
    rows = table.shape[-2]
    return next((n for n in prefix_rows if num_rows(table, grid, n) == rows), None)


def source_grid(
    table: Tensor,
    prefix_rows: Sequence[int],
    patch: tuple[int, int],
    source: str,
    known: Description,
    source_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> SourceGrid:
    """The grid of a position table, (1, P + L, D) or BEiT's, from what knows it best.

    In this order: the user's ``source_size``, what lies beside the file, the table itself where it
    is MAE's fixed one, a square, and ``image_size``, which it is wanted at.  ``prefix_rows`` are
    values that P may have, the likeliest first.  UserError where all that leaves it open.
    """
    doubtful = () if known.certain else (known.source,)
    for size, who in ((source_size, "source_size"), (known.image_size, known.source)):
        if size is None:
            continue
        grid = (size[0] // patch[0], size[1] // patch[1])
        prefix = _prefix_at(table, grid, prefix_rows)
        why = f"which patches of {patch[0]}x{patch[1]} do not fill"
        if size == (grid[0] * patch[0], grid[1] * patch[1]):
            if prefix is not None:
                return SourceGrid(grid, prefix)
            why = (
                f"{grid[0]}x{grid[1]} patches, but its position table has {table.shape[-2]} rows "
                f"and not {num_rows(table, grid, prefix_rows[0])}: correct the one that is wrong"
            )
        if who not in doubtful:
            raise UserError(
                f"{source}: {who} says that it was trained at {size[0]}x{size[1]} pixels, {why}"
            )
    for prefix in prefix_rows if table.ndim == 3 else ():
        fixed = grid_of_fixed_table(table[0, prefix:])
        if fixed is not None:
            return SourceGrid(fixed, prefix)
    return _assumed(table, prefix_rows, patch, source, image_size)


def _assumed(
    table: Tensor,
    prefix_rows: Sequence[int],
    patch: tuple[int, int],
    source: str,
    image_size: tuple[int, int] | None,
) -> SourceGrid:
    """A square, or else the grid of ``image_size``, where the table has as many rows."""
    for prefix in prefix_rows:
        side = math.isqrt(max(0, table.shape[-2] - (prefix if table.ndim == 3 else _CLASS_ROWS)))
        side = side if table.ndim == 3 else (side + 1) // 2
        if side > 0 and num_rows(table, (side, side), prefix) == table.shape[-2]:
            if len(grids_of(side * side)) == 1:
                return SourceGrid((side, side), prefix)
            note = (
                f"its positions are taken as those of a square, {side}x{side} patches "
                f"({side * patch[0]}x{side * patch[1]} pixels), because nothing says the image "
                "size; if it was trained at another, give source_size=[height,width]"
            )
            return SourceGrid((side, side), prefix, note)
    if image_size is not None:
        grid = (image_size[0] // patch[0], image_size[1] // patch[1])
        found = _prefix_at(table, grid, prefix_rows)
        if found is not None:
            note = f"its positions are taken as those of image_size, {grid[0]}x{grid[1]} patches"
            return SourceGrid(grid, found, f"{note}, because nothing says what it was trained at")
    count = table.shape[-2] - (prefix_rows[0] if table.ndim == 3 else _CLASS_ROWS)
    what = "patches form" if table.ndim == 3 else f"distances of {RELATIVE} form"
    raise UserError(
        f"{source}: its {count} {what} no square grid: give the image_size that it was trained at "
        "as source_size=[height,width], or keep its config.json beside it"
    )


def resize_positions(
    table: Float[Tensor, "L D"], size: tuple[int, ...], wanted: tuple[int, ...]
) -> Float[Tensor, "M D"]:
    """The table of a grid of ``size`` for the grid ``wanted``, for crops in a training step.

    DINO's rule, which MOKD shares: bicubic at the scale (wanted + 0.1) / size, without
    antialiasing.  The 0.1 moves every sample, a table of deviation 0.15 by up to 0.1.
    """
    if size == wanted:
        return table
    image = table.reshape(1, *size, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    scale = [(new + 0.1) / old for new, old in zip(wanted, size, strict=True)]
    resized = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T  # (L', D)
