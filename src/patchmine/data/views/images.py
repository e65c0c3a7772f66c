"""A raw item becomes one view: decoded, cropped, resized.  Mirroring is only noted; the device does
it.

A view is a picklable callable ``view(raw, channels, generator) -> (pixels, box, flip)``: pixels (C,
H, W) uint8 or float32; box (4,) float32, the crop as fractions of the original (top, left, height,
width); flip bool.  Several crops of one image are in `data.crops`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchmine.data.decoding.decode import DecodeError, Raw, decode
from patchmine.data.settings import MAX_PIXELS
from patchmine.errors import UserError

_CROP_TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params
_FAST_CHANNELS = 4  # torch's vectorised antialiased resize of bytes handles up to four channels


class View(Protocol):
    """What turns a raw item of at most ``max_pixels`` into pixels."""

    @property
    def max_pixels(self) -> int: ...

    def __call__(
        self, raw: Any, channels: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, bool]:
        """Pixels (C, H, W), box (4,), flip; of a raw video as `data.clips` says.  Raises
        DecodeError.
        """
        ...


@dataclass(frozen=True)
class TrainView:
    """A crop of random area and shape, resized to ``image_size`` (height, width); ``flip`` is a
    probability.

    The distribution is that of torchvision's RandomResizedCrop.  Images with a side under
    ``smallest_side`` pixels (the patch size, say), or of more than ``max_pixels``, are refused.
    """

    image_size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"
    smallest_side: int = 1
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)

    def __call__(
        self, raw: Raw, channels: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, bool]:
        image = decode(raw, channels, self.max_pixels)
        check_side(image, self.smallest_side)
        height, width = image.shape[-2:]
        top, left, crop_height, crop_width = crop_box(
            height, width, self.scale, self.ratio, generator
        )
        flip = bool(generator.random() < self.flip)
        crop = image[:, top : top + crop_height, left : left + crop_width]
        box = fractions(image, top, left, crop_height, crop_width)
        return resize(crop, self.image_size, self.interpolation), box, flip


@dataclass(frozen=True)
class PlainView:
    """The view of evaluation: shorter side resized to size / crop_pct, centre crop.  Nothing is
    random or flipped.

    ``crop_pct=None`` squashes the whole image to ``image_size``.
    """

    image_size: tuple[int, int]
    crop_pct: float | None = 0.875
    interpolation: str = "bicubic"
    smallest_side: int = 1
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(
                f"crop_pct={self.crop_pct} is no share of the image; set it above 0 and up to 1"
            )

    def __call__(
        self, raw: Raw, channels: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, bool]:
        image = decode(raw, channels, self.max_pixels)
        check_side(image, self.smallest_side)
        if self.crop_pct is None:
            return (
                resize(image, self.image_size, self.interpolation),
                torch.tensor([0.0, 0.0, 1.0, 1.0]),
                False,
            )
        height, width = self.image_size
        image = resize(image, cover(image, self.image_size, self.crop_pct), self.interpolation)
        # Python rounds halves to even, as torchvision's CenterCrop does.
        top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
        view = image[:, top : top + height, left : left + width].contiguous()
        return view, fractions(image, top, left, height, width), False


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels, drawn as torchvision's RandomResizedCrop draws it.

    Ten tries of a uniform share of the area and a log-uniform aspect ratio (width / height), then
    the largest centred crop of an allowed ratio.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = height * width * generator.uniform(scale[0], scale[1])
        aspect = math.exp(generator.uniform(log_low, log_high))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(0, height - crop_height + 1))
            left = int(generator.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """(C, H, W) resized to ``size`` with antialiasing, contiguous, same dtype."""
    if tuple(image.shape[-2:]) == size:
        return image.contiguous()
    if image.dtype != torch.uint8:
        return F.interpolate(image[None].contiguous(), size, mode=interpolation, antialias=True)[0]
    # Bytes of up to four channels that lie together per pixel take torch's vectorised path: 2 times
    # faster than planes, and groups of four are 4 times faster than 13 channels at once.
    groups = torch.split(image[None], _FAST_CHANNELS, dim=1)
    packed = (group.contiguous(memory_format=torch.channels_last) for group in groups)
    resized = [F.interpolate(group, size, mode=interpolation, antialias=True) for group in packed]
    return (resized[0] if len(resized) == 1 else torch.cat(resized, 1))[0].contiguous()


def cover(image: Tensor, size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The size to resize (..., H, W) to, aspect kept, such that ``size / crop_pct`` just fits
    inside.
    """
    height, width = image.shape[-2:]
    target_height, target_width = round(size[0] / crop_pct), round(size[1] / crop_pct)
    if target_height * width >= target_width * height:
        return target_height, max(target_width, int(target_height * width / height))
    return max(target_height, int(target_width * height / width)), target_width


def fractions(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """(4,) float32: a crop in pixels of ``image`` (..., H, W) as shares of its sides."""
    full_height, full_width = image.shape[-2:]
    return torch.tensor(
        [top / full_height, left / full_width, height / full_height, width / full_width]
    )


def check_side(image: Tensor, smallest_side: int) -> None:
    """Raises DecodeError for an image (..., H, W) with a shorter side."""
    height, width = image.shape[-2:]
    if min(height, width) < smallest_side:
        raise DecodeError(
            f"is {width}x{height} pixels, smaller than a patch of {smallest_side}x{smallest_side}; "
            "remove it or set a smaller patch_size"
        )


def check_interpolation(interpolation: str) -> None:
    """Raises UserError for what torch cannot do with antialiasing."""
    if interpolation not in {"bicubic", "bilinear"}:
        raise UserError(
            f"interpolation={interpolation} is not known; set interpolation=bicubic or interpolation=bilinear"
        )
