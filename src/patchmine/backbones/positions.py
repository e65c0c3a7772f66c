"""Position tables: fixed ones of sines and cosines, tables moved to another grid, and which grid a
table is of.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor

RELATIVE = "relative_position_bias_table"  # BEiT's name for a table of distances
_CLASS_ROWS = (
    3  # of such a table, behind its distances: class to patch, patch to class, class to itself
)


def sincos_table(width: int, size: tuple[int, ...]) -> Tensor:
    """(L, width) float32 for a grid of ``size`` = (rows, columns), raster order, computed in
    float64.

    The first half of the channels encodes the *column*, the second the row, as in every published
    MAE checkpoint (spec mae.md, section 3; the reference calls the first half ``emb_h`` but its
    mesh puts the column first).

    Raises ValueError when four does not divide ``width``, or the grid has other than two axes.
    """
    if len(size) != 2:
        raise ValueError(f"a sine-cosine table of rows and columns was asked for a grid of {size}")
    if width % 4:
        raise ValueError(f"a sine-cosine position table needs a width that 4 divides, got {width}")
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # (width / 4,)
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * omega for axis in (columns, rows)]  # two of (L, width / 4)
    return torch.cat(
        [part for angle in angles for part in (angle.sin(), angle.cos())], dim=1
    ).float()


def interleaved_table(width: int, count: int) -> Tensor:
    """(count, width) float32 for tokens numbered from 0, computed in float64: VideoMAE's
    one-dimensional table.

    Channel j has the angle n / 10000^(2 floor(j / 2) / width) of token n, even channels its sine
    and odd ones its cosine, side by side (spec hpm-video.md, section 3.2); for a grid of space and
    time n is the flattened index.
    """
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000.0 ** (-2 * (channel // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * rate  # (count, width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def fixed_table(width: int, size: tuple[int, ...]) -> Tensor:
    """(L, width), the fixed positions that a decoder adds: MAE's for rows and columns, VideoMAE's
    for clips.
    """
    return (
        sincos_table(width, size) if len(size) == 2 else interleaved_table(width, math.prod(size))
    )


def move_positions(
    table: Tensor, source: tuple[int, int], wanted: tuple[int, int], num_prefix: int = 1
) -> Tensor:
    """The position table of a grid of ``source`` = (rows, columns) for the ``wanted`` grid.

    The one way in which stored positions come to another image size, whoever opens them.  Grids are
    compared and never
    counts: 8x8 and 4x16 have as many patches and other places.

    Args:
        table: (1, P + L, D), added to tokens, of which the first P = ``num_prefix`` rows belong to
            no patch and stay; or ((2 rows - 1) (2 columns - 1) + 3, H), BEiT's table of distances,
            whose last three rows stay.
        source: the grid that the table was trained at.
        wanted: the grid that it is needed for.

    Returns:
        `timm.layers.resample_abs_pos_embed` of the first, timm's ``resize_rel_pos_bias_table`` of
        the second (which spaces distances geometrically, as BEiT does); the table itself where the
        grids are equal.

    Raises:
        ValueError: the table has not the rows of ``source``.
    """
    relative = table.ndim == 2
    spans = [2 * side - 1 for side in source]
    rows = math.prod(spans) + _CLASS_ROWS if relative else num_prefix + math.prod(source)
    if table.shape[-2] != rows:
        raise ValueError(
            f"a table of {table.shape[-2]} rows is not one of {source[0]}x{source[1]} patches, {rows} rows"
        )
    if source == wanted:
        return table
    if not relative:
        return resample_abs_pos_embed(
            table, list(wanted), list(source), num_prefix_tokens=num_prefix
        )
    # Told apart by head and axis, a table may be of any rectangle; flat, older timm takes it for a
    # square.
    distances = table[:-_CLASS_ROWS].T.reshape(
        -1, spans[0], spans[1]
    )  # (H, 2 rows - 1, 2 columns - 1)
    shape = (len(distances), 2 * wanted[0] - 1, 2 * wanted[1] - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm indexes
        moved = resize_rel_pos_bias_table(distances, wanted, shape)
    return torch.cat([moved.flatten(1).T, table[-_CLASS_ROWS:]])


def move_all_positions(
    tensors: Mapping[str, Tensor], source: tuple[int, int], wanted: tuple[int, int], num_prefix: int
) -> tuple[dict[str, Tensor], list[str]]:
    """An encoder's tensors with every position table moved (`move_positions`), and what was moved,
    for a report.
    """
    moved = dict(tensors)
    told = []
    for name, table in tensors.items():
        if source == wanted or not (name == "pos_embed" or name.endswith(RELATIVE)):
            continue
        moved[name] = move_positions(table, source, wanted, num_prefix)
        told.append(f"{name} from {source[0]}x{source[1]} to {wanted[0]}x{wanted[1]} patches")
    return moved, told


def grids_of(count: int) -> list[tuple[int, int]]:
    """Every (rows, columns) with ``count`` patches, fewest rows first."""
    sides = [rows for rows in range(1, math.isqrt(count) + 1) if count % rows == 0]
    found = {(rows, count // rows) for rows in sides} | {(count // rows, rows) for rows in sides}
    return sorted(found)


def grid_of_fixed_table(table: Tensor) -> tuple[int, int] | None:
    """The grid whose `sincos_table` the rows (L, D) are; None where they are learned.

    MAE's positions take no gradient, so that its files tell their grid although they do not state
    it.
    """
    count, width = table.shape
    if width % 4 or count > 2**16:
        return None
    for grid in grids_of(count):
        if torch.allclose(table.float(), sincos_table(width, grid), rtol=0, atol=1e-3):
            return grid
    return None


def resize_positions(table: Tensor, size: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """(L, D) of a grid of ``size`` = (rows, columns) -> (L', D) for the ``wanted`` one; as it is
    where they are equal.

    For crops of other sizes within a training step, not for stored tables (`move_positions`).
    DINO's rule, which MOKD shares (spec mokd.md, 3.2): bicubic at the scale (wanted + 0.1) / size,
    not at the ratio of the sizes, and without antialiasing.  The 0.1 moves every sample: leaving it
    out changes a table of deviation 0.15 by up to 0.1.
    """
    if size == wanted:
        return table
    image = table.reshape(1, *size, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    scale = [(new + 0.1) / old for new, old in zip(wanted, size, strict=True)]
    resized = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T
