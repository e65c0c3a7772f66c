"""Arrays of many images, (N, H, W), (N, H, W, C) or (N, C, H, W), of HDF5 and zarr."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from patchmine.data.decoding.arrays import channels_first
from patchmine.data.decoding.bounds import DecodeError, check_pixels
from patchmine.data.decoding.reading import Facts

_NAMES = ("images", "image", "data", "x")
_LEAST_SIDE = 4  # pixels; what is smaller are labels, boxes, points
_MOST_CHANNELS = 64  # of the shorter of the axes that may be it, in an array of four
_WORK = 12  # bytes for each value beside the stored ones


def holds_images(array: Any) -> bool:
    """Whether an array of h5py's or zarr's can be images."""
    shape, dtype = array.shape, np.dtype(array.dtype)
    if dtype.kind not in "buif" or len(shape) not in (3, 4) or 0 in shape:
        return False
    height, width, channels = _size(shape)
    return min(height, width) >= _LEAST_SIDE and channels <= _MOST_CHANNELS


def chosen(found: Mapping[str, Any]) -> Any:
    """The one array that is meant, None of none; DecodeError where it is not clear."""
    if len(found) < 2:
        return next(iter(found.values()), None)
    named = [name for name in found if name.rpartition("/")[2].lower() in _NAMES]
    if len(named) != 1:
        names = ", ".join(sorted(named or found)[:5])
        raise DecodeError(
            f"holds {len(named or found)} arrays that may be images ({names}): call one of them "
            "images, and the others not"
        )
    return found[named[0]]


def facts(array: Any) -> Facts:
    """(height, width, channels, dtype name) of an image; DecodeError where there is none."""
    if array is None:
        raise DecodeError("holds no array of images, (N, H, W) or (N, H, W, C), of numbers")
    height, width, channels = _size(array.shape)
    return height, width, channels, np.dtype(array.dtype).name


def check(array: Any, number: int, stored: int, max_pixels: int) -> None:
    """DecodeError where an image is too large, or what is read and unpacked with it."""
    height, width, channels, _ = facts(array)
    if number >= array.shape[0]:
        raise DecodeError(f"has no image {number} any more; it has changed since it was listed")
    size = np.dtype(array.dtype).itemsize
    chunk = math.prod(array.chunks or ()) * size / (height * width)
    work = max(channels * size, chunk) + channels * _WORK
    check_pixels(height, width, max_pixels, stored=stored, work=work)


def image(values: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) of one of them."""
    return np.ascontiguousarray(channels_first(np.asarray(values), channels))


def _size(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(height, width, channels), by the rule of arrays: the shorter axis holds the channels."""
    if len(shape) == 3:
        return shape[1], shape[2], 1
    if shape[3] <= shape[1]:
        return shape[1], shape[2], shape[3]
    return shape[2], shape[3], shape[1]
