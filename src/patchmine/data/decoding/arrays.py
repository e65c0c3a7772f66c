"""Values of any type and order of axes become image tensors with the channels of a run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding.bounds import DecodeError


def tensor_channels_first(image: Tensor) -> Tensor:
    """(C, H, W) of (H, W) or (C, H, W)."""
    if image.ndim not in (2, 3):
        must = "a tensor must be (height, width) or (channels, height, width)"
        raise DecodeError(f"has shape {tuple(image.shape)}; {must}")
    return image[None] if image.ndim == 2 else image


def channels_first(array: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) of (H, W), (H, W, C) or (C, H, W).

    The channel axis is the one that has ``channels`` values, else the shorter of first and last.
    """
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        must = "an array must be (height, width[, channels]) or (channels, height, width)"
        raise DecodeError(f"has shape {array.shape}; {must}")
    first, last = array.shape[0], array.shape[2]
    channels_last = last == channels or (first != channels and last <= first)
    return array.transpose(2, 0, 1) if channels_last else array


def scaled(array: np.ndarray) -> Tensor:
    """uint8 stays, bits are 0 or 255, integers of 16 bits fill [0, 1], others are float32 as is."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "buif":
        raise DecodeError(f"holds values of type {array.dtype}, which is no image")
    if kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        usable = array.flags.writeable and min(array.strides) >= 0
        return torch.from_numpy(array if usable else array.copy())
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which `decode` tells
        values = np.array(array, dtype=np.float32, order="C")
    if kind in "ui" and size <= 2:
        limits = np.iinfo(array.dtype)
        values -= np.float32(limits.min)
        values /= np.float32(limits.max - limits.min)
    return torch.from_numpy(values)


def with_gaps(image: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(C, H, W) as a masked array where there are gaps in it, itself where there are none.

    ``gaps`` as in `without_gaps`.
    """
    return np.ma.MaskedArray(image, gaps) if gaps.any() else image


def filled(image: np.ndarray) -> np.ndarray:
    """The plain array of what `with_gaps` gives, by `without_gaps`."""
    if not isinstance(image, np.ma.MaskedArray):
        return image
    return without_gaps(image.data, np.ma.getmaskarray(image))


def with_nan(image: np.ndarray) -> np.ndarray:
    """Of what `with_gaps` gives, where there are gaps: floats of the scale that training brings
    them to, with NaN in the gaps; else the image itself.
    """
    if not isinstance(image, np.ma.MaskedArray):
        return image
    values = scaled(filled(image))
    values = values / 255 if values.dtype == torch.uint8 else values
    return np.where(np.ma.getmaskarray(image), np.float32(np.nan), values.numpy())


def without_gaps(image: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(C, H, W) with the mean of a channel where there are gaps in it, 0 where it is all gaps.

    ``gaps`` (C, H, W) bool: pixels of which nothing is known.
    """
    if not gaps.any():
        return image
    image = image.copy()
    for channel, gap in zip(image, gaps, strict=True):
        mean = 0.0 if gap.all() else channel[~gap].mean(dtype=np.float64)
        channel[gap] = mean if image.dtype.kind == "f" else np.rint(mean)
    return image


def fit_channels(image: Tensor, channels: int, has_alpha: bool) -> Tensor:
    """(C, H, W) with the channels asked for, where `decode` allows it; raises DecodeError."""
    stored = image.shape[0]
    if stored == channels:
        return image
    if has_alpha:
        image = image[:-1]
    if channels == 3 and image.shape[0] == 1:
        return image.expand(3, -1, -1)
    if channels == 1 and image.shape[0] == 3:
        # ITU-R 601-2 luma, for bytes in the same fixed-point arithmetic as PIL.
        if image.dtype == torch.uint8:
            red, green, blue = image.int()
            luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
            return luma.to(torch.uint8)[None]
        red, green, blue = image
        return (0.299 * red + 0.587 * green + 0.114 * blue)[None]
    if channels in {1, 3} and image.shape[0] == channels:
        return image
    plural = "s" * (stored != 1)
    raise DecodeError(
        f"has {stored} channel{plural} where the run expects {channels}; set channels={stored}"
    )
