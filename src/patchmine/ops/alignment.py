"""From maps of whole images, one number a patch, to weights for the patches of a crop of them.

Crops are boxes in fractions of the image.  Every way to align is separable: the weights are
``down @ map @ across.T`` with a small matrix for each axis of each image.  All in float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchmine.types import Grid

Alignment = Literal["area", "bilinear", "released"]

# Of a cell; a box edge this near to a cell's counts as on it, whatever float32 made of the fraction
_CLOSE = 1e-4


def attention_map(attention: Float[Tensor, "B heads L"]) -> Float[Tensor, "B L"]:
    """A class token's attention to the patches by head, (B, heads, L) -> (B, L) in [0, 1].

    Each head is stretched from its least to its largest value and all count alike (AMT,
    util/misc.py). A head of equal attention gives 0 (there: 0 / 0).
    """
    attention = attention.float()
    low, high = attention.amin(dim=-1, keepdim=True), attention.amax(dim=-1, keepdim=True)
    return ((attention - low) / (high - low).clamp(min=1e-12)).mean(dim=1)


def align(
    maps: Float[Tensor, "B L"],
    grid: Grid,
    box: Float[Tensor, "B 4"],
    flip: Bool[Tensor, "B"],
    how: Alignment = "area",
) -> Float[Tensor, "B L"]:
    """Weights of the patches of a crop from maps of whole images: (B, L) -> (B, L).

    Args:
        maps: (B, L), one number for each patch of the whole image.
        grid: of the map and of the crop.
        box: (B, 4), the crop as fractions (top, left, height, width).
        flip: (B,), mirrored after the crop.
        how: "area" is the exact mean of the map, constant within each cell, over what a patch
            shows. "bilinear" resizes the cells that the box touches to the crop's pixels and
            averages over each patch, as the reference meant to.  "released" is what it does: the
            same with the first two cells of each axis, three where the box ends at the far border.
    """
    with torch.autocast(maps.device.type, enabled=False):
        box = box.float()
        (rows, columns), (height, width) = grid.size, grid.patch
        down = _axis(box[:, 0], box[:, 2], rows, height, how)  # (B, rows of patches, rows of cells)
        across = _axis(box[:, 1], box[:, 3], columns, width, how)
        across = torch.where(flip[:, None, None], across.flip(1), across)
        cells = maps.float().reshape(-1, rows, columns)  # (B, rows, columns)
        return (down @ cells @ across.transpose(1, 2)).flatten(1)


def spread(
    values: Float[Tensor, "B L"],
    known: Float[Tensor, "B L"],
    grid: Grid,
    box: Float[Tensor, "B 4"],
    flip: Bool[Tensor, "B"],
) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """The way back: what the patches of a crop say of the cells of its whole image.

    Args:
        values: (B, L), one number for each patch of the crop.
        known: (B, L), 1 where that number counts, 0 where it does not.
        grid: of the map and of the crop.
        box: (B, 4), the crop as fractions (top, left, height, width).
        flip: (B,), mirrored after the crop.

    Returns:
        (B, L) mean of the values over each cell, and (B, L) the share of the cell that they cover.
    """
    with torch.autocast(values.device.type, enabled=False):
        box, known = box.float(), known.float()
        rows, columns = grid.size
        # Shares of patches, times their extent in cells, are shares of cells.
        down = _overlap(box[:, 0], box[:, 2], rows) * box[:, 2, None, None]
        across = _overlap(box[:, 1], box[:, 3], columns) * box[:, 3, None, None]
        across = torch.where(flip[:, None, None], across.flip(1), across)

        both = torch.stack([values.float() * known, known], dim=1)  # (B, 2, L)
        cells = both.reshape(-1, 2, rows, columns)
        back = down.transpose(1, 2)[:, None] @ cells @ across[:, None]
        total, covered = back.flatten(2).unbind(dim=1)  # (B, L) each
        return total / covered.clamp(min=1e-6), covered.clamp(max=1.0)


def _axis(
    start: Float[Tensor, "B"], extent: Float[Tensor, "B"], count: int, patch: int, how: Alignment
) -> Float[Tensor, "B patches cells"]:
    """Share of each cell in each patch along one axis: (B, patches, cells)."""
    if how == "area":
        return _overlap(start, extent, count)
    end = start + extent
    if how == "bilinear":
        return _resized(
            (start * count + _CLOSE).floor(), (end * count - _CLOSE).ceil(), count, patch
        )
    # Pixels // side of the image where pixels // side of a cell was meant (AMT, amtdatasets.py).
    last = torch.where(end > 1 - 1e-5, 3.0, 2.0).clamp(max=count)
    return _resized(torch.zeros_like(last), last, count, patch)


def _overlap(
    start: Float[Tensor, "B"], extent: Float[Tensor, "B"], count: int
) -> Float[Tensor, "B patches cells"]:
    cell = torch.arange(count, device=start.device)
    borders = torch.arange(count + 1, device=start.device)
    edges = (
        start[:, None] * count + extent[:, None] * borders
    )  # (B, count + 1) of the patches, in cells
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    overlap = torch.minimum(high, cell + 1) - torch.maximum(low, cell)
    return overlap.clamp(min=0) / (high - low).clamp(min=1e-6)


def _resized(
    first: Float[Tensor, "B"], last: Float[Tensor, "B"], count: int, patch: int
) -> Float[Tensor, "B patches cells"]:
    """Cells ``first`` to ``last`` (B,) resized to the crop's pixels and averaged in each patch."""
    pixel = torch.arange(count * patch, device=first.device)
    length = (last - first)[:, None]
    place = ((pixel + 0.5) * length / (count * patch) - 0.5).clamp(min=0)
    place = first[:, None] + torch.minimum(
        place, (length - 1).clamp(min=0)
    )  # (B, pixels), in cells
    tent = 1 - (place[:, :, None] - torch.arange(count, device=first.device)).abs()
    return tent.clamp(min=0).reshape(-1, count, patch, count).mean(dim=2)
