"""Position tables: fixed ones of sines and cosines, and tables resized to another grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_table(width: int, size: tuple[int, ...]) -> Tensor:
    """(L, width) float32 for a grid of ``size`` = (rows, columns), raster order, computed in float64.

    The first half of the channels encodes the *column*, the second the row, as in every published MAE checkpoint (spec
    mae.md, section 3; the reference calls the first half ``emb_h`` but its mesh puts the column first).

    Raises ValueError when four does not divide ``width``, or the grid has other than two axes.
    """
    if len(size) != 2:
        raise ValueError(f"a sine-cosine table of rows and columns was asked for a grid of {size}")
    if width % 4:
        raise ValueError(f"a sine-cosine position table needs a width that 4 divides, got {width}")
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # (width / 4,)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (columns, rows)]  # two of (L, width / 4)
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def interleaved_table(width: int, count: int) -> Tensor:
    """(count, width) float32 for tokens numbered from 0, computed in float64: VideoMAE's one-dimensional table.

    Channel j has the angle n / 10000^(2 floor(j / 2) / width) of token n, even channels its sine and odd ones its
    cosine, side by side (spec hpm-video.md, section 3.2); for a grid of space and time n is the flattened index.
    """
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000.0 ** (-2 * (channel // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * rate  # (count, width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def fixed_table(width: int, size: tuple[int, ...]) -> Tensor:
    """(L, width), the fixed positions that a decoder adds: MAE's for rows and columns, VideoMAE's for clips."""
    return sincos_table(width, size) if len(size) == 2 else interleaved_table(width, math.prod(size))


def resize_positions(table: Tensor, size: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """(L, D) of a grid of ``size`` = (rows, columns) -> (L', D) for the ``wanted`` one; as it is where they are equal.

    DINO's rule, which MOKD shares (spec mokd.md, 3.2): bicubic at the scale (wanted + 0.1) / size, not at the ratio of
    the sizes, and without antialiasing.  The 0.1 moves every sample: leaving it out changes a table of deviation 0.15
    by up to 0.1.
    """
    if size == wanted:
        return table
    image = table.reshape(1, *size, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    scale = [(new + 0.1) / old for new, old in zip(wanted, size, strict=True)]
    resized = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T
