"""Orientations 1 to 8, as EXIF numbers them: found in an EXIF block, applied to pixels.

Nothing else is read of EXIF: a block that is damaged elsewhere, or is none at all, means 1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

TAG = 0x0112
TURNED = (5, 6, 7, 8)
"""Orientations that exchange height and width."""

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""

_MIRRORED_X, _MIRRORED_Y = (2, 3, 6, 7), (3, 4, 7, 8)
_INTEGERS = {1: 1, 3: 2, 4: 4}  # TIFF's types and their bytes


def exif_orientation(block: bytes) -> int:
    """Orientation in an EXIF block, with or without JPEG's name in front; 1 where none is there."""
    block = block.removeprefix(b"Exif\0\0")
    if block[:2] not in {b"II", b"MM"}:
        return 1

    def number(place: int, size: int) -> int:
        order: Literal["little", "big"] = "little" if block[:2] == b"II" else "big"
        return int.from_bytes(block[place : place + size], order)

    first = number(4, 4) + 2
    for place in range(first, min(first + 12 * number(first - 2, 2), len(block) - 11), 12):
        if number(place, 2) == TAG:
            value = number(place + 8, _INTEGERS.get(number(place + 2, 2), 0))
            return value if 1 <= value <= 8 else 1
    return 1


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(..., H, W) turned as the orientation says, a view of the same memory."""
    if orientation in TURNED:
        array = array.swapaxes(-1, -2)
    if orientation in _MIRRORED_X:
        array = array[..., ::-1]
    if orientation in _MIRRORED_Y:
        array = array[..., ::-1, :]
    return array


def upright_tensor(image: Tensor, orientation: int) -> Tensor:
    """The same of a tensor (..., H, W)."""
    if orientation in TURNED:
        image = image.transpose(-1, -2)
    mirrored = ((-1, _MIRRORED_X), (-2, _MIRRORED_Y))
    axes = [axis for axis, those in mirrored if orientation in those]
    return image.flip(axes) if axes else image


def stored_box(box: Box, height: int, width: int, orientation: int) -> Box:
    """Where a box of an upright image of ``height`` x ``width`` lies in the image as stored."""
    top, left, tall, wide = box
    if orientation in _MIRRORED_X:
        left = width - left - wide
    if orientation in _MIRRORED_Y:
        top = height - top - tall
    return (left, top, wide, tall) if orientation in TURNED else (top, left, tall, wide)


def upright_box(box: Box, height: int, width: int, orientation: int) -> Box:
    """The inverse of `stored_box`; ``height`` and ``width`` are those of the upright image."""
    top, left, tall, wide = box
    if orientation in TURNED:
        top, left, tall, wide = left, top, wide, tall
    if orientation in _MIRRORED_X:
        left = width - left - wide
    if orientation in _MIRRORED_Y:
        top = height - top - tall
    return top, left, tall, wide


def of_matrix(a: float, b: float, c: float, d: float) -> int:
    """The orientation that maps (x, y) to (a x + c y, b x + d y), as a video's [a b; c d].

    Axes point right and down.  A matrix of other angles counts as the nearest of the eight.
    """
    if abs(a) + abs(d) >= abs(b) + abs(c):  # x stays horizontal
        return ((1, 4), (2, 3))[a < 0][d < 0]
    # After a transpose new x is old y, of sign c, and new y is old x, of sign b.
    return ((5, 8), (6, 7))[c < 0][b < 0]
