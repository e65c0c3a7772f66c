"""Fixed sine-cosine position tables."""

from __future__ import annotations

import torch
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
