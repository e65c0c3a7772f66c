"""Where a view comes from: one geometry for an image, for its mask and for boxes in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST_SHARE = 0.5  # of the weights behind a pixel that are known
_FAST_CHANNELS = 4  # torch's vectorised antialiased resize of bytes handles up to four channels


@dataclass(frozen=True)
class Geometry:
    """An image becomes a view: resized to ``canvas``, cut to ``box``, made ``size``, mirrored.

    ``box`` (top, left, height, width) in pixels of the canvas; ``size`` and ``canvas`` (height,
    width), ``canvas=None``: as large as the image is; ``flip``: mirrored left to right at the end.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False
    canvas: tuple[int, int] | None = None

    def apply(self, image: Tensor, interpolation: str = "bicubic") -> Tensor:
        """(..., C, H, W) cut and resized; mirroring bytes is left to the device (`normalise`)."""
        if self.canvas is not None:
            image = resize(image, self.canvas, interpolation)
        return resize(self._cut(image), self.size, interpolation)

    def apply_known(
        self, image: Tensor, known: Tensor | None, interpolation: str = "bicubic"
    ) -> tuple[Tensor, Tensor]:
        """The same of an image of which not all is known, see `resize_known`."""
        if known is None:
            pixels = self.apply(image, interpolation)
            return pixels, torch.ones(pixels.shape, dtype=torch.bool)
        if self.canvas is not None:
            image, known = resize_known(image, known, self.canvas, interpolation)
        return resize_known(self._cut(image), self._cut(known), self.size, interpolation)

    def apply_mask(self, mask: Tensor) -> Tensor:
        """(H, W) or (C, H, W) of class numbers: the nearest ones, mirrored with ``flip``."""
        planes = mask[None, None] if mask.ndim == 2 else mask[None]
        values = planes.double()  # holds every class number exactly
        if self.canvas is not None:
            values = F.interpolate(values, self.canvas, mode="nearest-exact")
        values = F.interpolate(self._cut(values), self.size, mode="nearest-exact")
        values = values.flip(-1) if self.flip else values
        return values[0].to(mask.dtype).reshape(*mask.shape[:-2], *self.size)

    def apply_boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """(N, 4) (left, top, right, bottom) in pixels of the image, as clipped ones of the view."""
        canvas_height, canvas_width = self.canvas or (height, width)
        top, left, box_height, box_width = self.box
        x = (boxes[:, 0::2] * (canvas_width / width) - left) * (self.size[1] / box_width)
        y = (boxes[:, 1::2] * (canvas_height / height) - top) * (self.size[0] / box_height)
        x, y = x.clamp(0, self.size[1]), y.clamp(0, self.size[0])
        x = (self.size[1] - x).flip(1) if self.flip else x
        return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)

    def shares(self, height: int, width: int) -> Tensor:
        """(4,) float32: the box as shares of the sides of an image of ``height`` x ``width``."""
        height, width = self.canvas or (height, width)
        top, left, box_height, box_width = self.box
        shares = [top / height, left / width, box_height / height, box_width / width]
        return torch.from_numpy(np.array(shares, np.float32))  # a third of torch.tensor's time

    def _cut(self, image: Tensor) -> Tensor:
        top, left, height, width = self.box
        return image[..., top : top + height, left : left + width]


def resize_known(
    image: Tensor, known: Tensor | None, size: tuple[int, int], interpolation: str = "bicubic"
) -> tuple[Tensor, Tensor]:
    """An image resized out of those of its pixels of which there is data.

    Args:
        image: (C, H, W); anything finite where nothing is known.
        known: (C, H, W) bool; None: everywhere.
        size: (h, w) of the result.
        interpolation: as of `resize`.

    Returns:
        (C, h, w) of the image's type, and (C, h, w) bool: true where at least half of the weights
        of the pixels that `resize` makes one of belong to known ones.  Such a pixel is the mean of
        these, by their weights; any other is what `resize` makes of all.
    """
    plain = resize(image, size, interpolation)
    if known is None or bool(known.all()):
        return plain, torch.ones(plain.shape, dtype=torch.bool)
    share = resize(known.float(), size, interpolation)
    now_known = share >= _LEAST_SHARE
    mean = resize(torch.where(known, image.float(), 0.0), size, interpolation)
    mean = mean / torch.where(now_known, share, 1.0)
    if image.dtype == torch.uint8:
        mean = mean.round().clamp(0, 255)
    return torch.where(now_known, mean.to(plain.dtype), plain), now_known


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """(C, H, W) or (T, C, H, W) resized to ``size`` with antialiasing, same dtype."""
    *_, channels, height, width = image.shape
    if (height, width) == size:
        return image
    stack = image if image.ndim == 4 else image[None]
    if stack.dtype != torch.uint8:
        resized = F.interpolate(stack.contiguous(), size, mode=interpolation, antialias=True)
        return resized.view(*image.shape[:-2], *size)
    if channels <= _FAST_CHANNELS:  # without the twenty microseconds that groups cost
        packed = stack.contiguous(memory_format=torch.channels_last)
        resized = F.interpolate(packed, size, mode=interpolation, antialias=True)
        return resized if image.ndim == 4 else resized[0]
    # Bytes of up to four channels that lie together per pixel take torch's vectorised path: 2 times
    # faster than planes, and groups of four are 4 times faster than 13 channels at once.
    groups = torch.split(stack, _FAST_CHANNELS, dim=1)
    whole = torch.cat([resize(group, size, interpolation) for group in groups], 1)
    return whole if image.ndim == 4 else whole[0]
