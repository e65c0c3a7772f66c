"""DINO's changes of colour on a processor: one image after the other, of each only what was drawn.

`photometric.change_colours` computes everything for every image, since a device is not asked which
of it is needed.  Here the numbers are at hand, and one image stays in the processor's cache.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from patchmine.data.views import photometric

_CONTRAST = 1  # in photometric.ORDER; brightness is 0
_HUES = 256
_REACH = photometric.BLUR_PASSES * photometric.BLUR_REACH


def changed_one_by_one(images: Tensor, numbers: Tensor) -> Tensor:
    """What `change_colours`, or `jitter_colours`, makes of images on a processor.

    Args:
        images: (N, C, H, W), bytes or floats.
        numbers: (N, P), as `draw` or `draw_jitter` gives them.

    Returns:
        (N, C, H, W) float32, bytes in [0, 1]: to the bit what they make of bytes one by one.
    """
    as_bytes = images.dtype == torch.uint8
    changed = torch.empty(images.shape)
    for image, pixels, row in zip(images, changed, numbers.tolist(), strict=True):
        torch.mul(image, 1 if as_bytes else 255, out=pixels)
        _change(pixels, row, as_bytes)
    return changed


def _change(pixels: Tensor, row: list[float], as_bytes: bool) -> None:
    """One image (C, H, W) in place, from levels of 255 to shares."""
    if len(pixels) == 3:
        _change_colours(pixels, row, as_bytes)
    if row[photometric.SIGMA]:
        _blur(pixels, row[photometric.SIGMA])
        if as_bytes:
            pixels.add_(0.5).floor_()
    if as_bytes and row[photometric.SOLARIZE]:
        bright = pixels >= photometric.THRESHOLD
        torch.where(bright, 255 - pixels, pixels, out=pixels)
    pixels.div_(255)


def _change_colours(pixels: Tensor, row: list[float], as_bytes: bool) -> None:
    factors = row[photometric.FACTORS]
    for operation in map(int, row[photometric.ORDER]):
        if operation == photometric.HUE_OPERATION:
            if row[photometric.JITTER]:
                _turn_hue(pixels, row[photometric.HUE], as_bytes)
        elif factors[operation] != 1:
            _blend(pixels, operation, factors[operation], as_bytes)
    if row[photometric.GREY]:
        pixels.copy_(_luma(pixels, as_bytes).expand_as(pixels))


def _luma(pixels: Tensor, as_bytes: bool) -> Tensor:
    return photometric.luma(pixels[None], as_bytes)[0, 0]


def _blend(pixels: Tensor, operation: int, factor: float, as_bytes: bool) -> None:
    if operation == 0:
        pixels.mul_(factor)
    else:
        other = _luma(pixels, as_bytes)
        if operation == _CONTRAST:
            other = other[None].mean((1, 2))
            other = (other + 0.5).floor() if as_bytes else other
        pixels.sub_(other).mul_(factor).add_(other)
    if as_bytes:
        pixels.clamp_(0, 255).floor_()


def _turn_hue(pixels: Tensor, turn: float, as_bytes: bool) -> None:
    red, green, blue = pixels
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    # Bytes that differ do so by 1 at least.
    some = spread.clamp(min=1) if as_bytes else torch.where(spread > 0, spread, 1.0)
    below_red, below_green, below_blue = (value - pixels).div_(some)
    sixths = torch.where(
        green == value, (below_red + 2).sub_(below_blue), (below_green + 4).sub_(below_red)
    )
    hue = torch.where(red == value, below_blue - below_green, sixths).div_(6)
    hue = torch.where(hue < 0, hue + 1, hue)
    if as_bytes:
        levels = hue.mul_(_HUES - 1).floor_().add_(_HUES + _whole_levels(turn))
        shares = _shares_of_hues().index_select(1, levels.int().flatten()).view_as(pixels)
        saturation = (spread / value.clamp(min=1)).mul_(255).floor_().div_(255)
        spread = saturation.mul_(value)
    else:
        shares = photometric.hue_shares((hue + turn)[None, None])[0]
    torch.sub(value, shares.mul_(spread), out=pixels)
    if as_bytes:
        pixels.add_(0.5).floor_()


def _whole_levels(turn: float) -> int:
    """A turn in levels, as float32 has it."""
    return int(np.float32(turn) * np.float32(_HUES - 1))


@cache
def _shares_of_hues() -> Tensor:
    """(3, 3 * 256): `hue_shares` of the levels -256 to 511, of which each turn is the same."""
    levels = torch.arange(3 * _HUES).remainder(_HUES) / (_HUES - 1)
    return photometric.hue_shares(levels.view(1, 1, 1, -1))[0, :, 0]


def _blur(pixels: Tensor, sigma: float) -> None:
    height, width = pixels.shape[-2:]
    columns = _blur_matrix(width, sigma)
    rows = columns if height == width else _blur_matrix(height, sigma)
    pixels.copy_((rows @ pixels) @ columns.T)


def _blur_matrix(side: int, sigma: float) -> Tensor:
    """(side, side): that of `photometric.blur_matrices`, whose middle is one row moved along."""
    least = 4 * _REACH
    (small,) = photometric.blur_matrices(min(side, least), torch.tensor([sigma]))
    if side <= least:
        return small
    matrix = torch.zeros(side, side)
    middle = small[2 * _REACH, _REACH : 3 * _REACH + 1]
    band = matrix.as_strided((side - 2 * _REACH, 2 * _REACH + 1), (side + 1, 1), _REACH * side)
    band.copy_(middle.expand_as(band))
    ends = slice(None, _REACH), slice(-_REACH, None)
    reached = slice(None, 2 * _REACH), slice(-2 * _REACH, None)
    for end, columns in zip(ends, reached, strict=True):
        matrix[end, columns] = small[end, columns]
    return matrix
