"""A raw image becomes its views: decoded, cropped, resized; the device mirrors and recolours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchmine.data.decoding.decode import DecodeError, Raw, decode, decode_known
from patchmine.data.decoding.opened import Opened, Whole, open_image
from patchmine.data.settings import InputSettings, ViewSettings
from patchmine.data.views import photometric
from patchmine.data.views.geometry import Geometry, resize, resize_known
from patchmine.data.views.together import LARGEST, MOST_CHANNELS, resized_together
from patchmine.errors import UserError
from patchmine.types import Sample

NUM_GLOBAL = 2
_FLIPS = torch.tensor(False), torch.tensor(True)  # not written to: a batch is a copy
_CROP_TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params


class View(Protocol):
    """What turns a raw item into a sample: picklable, and random only by its generator."""

    @property
    def settings(self) -> InputSettings: ...

    @property
    def repeats(self) -> int:
        """Samples that one reading of an item gives."""

    def __call__(self, raw: Any, generator: np.random.Generator, target: Any = None) -> Sample:
        """The sample; ``target`` goes through the same geometry.  Raises DecodeError."""


@dataclass(frozen=True)
class TrainView:
    """A crop of random area and shape, by torchvision's RandomResizedCrop; mirrored at random.

    Images with a side under ``smallest_side`` pixels (the patch size, say) are refused.
    """

    settings: ViewSettings
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __call__(
        self, raw: Raw | Whole, generator: np.random.Generator, target: Any = None
    ) -> Sample:
        settings = self.settings
        image = opened(raw, settings, self.smallest_side)
        height, width = image.size
        box = crop_box(height, width, settings.crop_scale, settings.crop_ratio, generator)
        flip = bool(generator.random() < settings.flip)
        size, scaled = settings.image_size, settings.decode == "scaled"
        (crop,), (box,) = image.crops([box], [size], scaled)
        geometry = Geometry(box, size, flip)
        known = None
        if settings.wants_known:
            how = (size, settings.interpolation)
            pixels, known = resize_known(crop, image.known_in(box), *how)
        else:
            pixels = resize(crop, size, settings.interpolation)
        return _sample(pixels.contiguous(), geometry, (height, width), target, known)

    def takes_together(self, image: NDArray[np.uint8]) -> bool:
        """Whether images (H, W, C) like this one are quicker viewed by `together`."""
        height, width, channels = image.shape
        small = self.smallest_side <= min(height, width) and height * width <= LARGEST
        return small and channels == self.settings.channels <= MOST_CHANNELS

    def together(
        self, images: Sequence[NDArray[np.uint8]], generators: Iterable[np.random.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What calling makes of N images of one shape (H, W, C), each with its generator.

        Returns:
            Views (N, C, h, w) uint8, boxes (N, 4) float32 and flips (N,) bool, as in `Batch`.
        """
        settings, (height, width, _) = self.settings, images[0].shape
        scale, ratio = settings.crop_scale, settings.crop_ratio
        boxes, flips = [], []
        for generator in generators:
            boxes.append(crop_box(height, width, scale, ratio, generator))
            flips.append(generator.random() < settings.flip)
        pixels = resized_together(images, boxes, settings.image_size, settings.interpolation)
        shares = np.array(boxes) / [height, width, height, width]
        return pixels, torch.from_numpy(shares.astype(np.float32)), torch.tensor(flips)


@dataclass(frozen=True)
class PlainView:
    """The view of evaluation: shorter side resized to size / crop_pct, centre crop; not mirrored.

    ``crop_pct=None`` squashes the whole image to ``image_size``.
    """

    settings: InputSettings
    crop_pct: float | None = 0.875
    interpolation: str = "bicubic"
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_crop_pct(self.crop_pct)

    def __call__(
        self, raw: Raw | Whole, generator: np.random.Generator, target: Any = None
    ) -> Sample:
        whole = _whole(raw, self.settings, self.smallest_side)
        geometry = plain_geometry(whole.pixels, self.settings.image_size, self.crop_pct)
        known = None
        if self.settings.wants_known:
            pixels, known = geometry.apply_known(whole.pixels, whole.known, self.interpolation)
        else:
            pixels = geometry.apply(whole.pixels, self.interpolation)
        return _sample(pixels.contiguous(), geometry, whole.size, target, known)


@dataclass(frozen=True)
class OwnSizeView:
    """All of an image at its own size, not mirrored."""

    settings: InputSettings
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __call__(
        self, raw: Raw | Whole, generator: np.random.Generator, target: Any = None
    ) -> Sample:
        image = decoded(raw, self.settings, self.smallest_side)
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
        return Sample([image.contiguous()], whole, torch.tensor(False), target=target)


@dataclass(frozen=True)
class MultiCropView:
    """DINO's multi-crop: two large (global) crops of an image, then ``crops.num_local`` small ones.

    Mirroring and changes of colour are only drawn here.  With ``decode=scaled`` a JPEG is decoded
    as finely as the most demanding crop needs: at a half of it the smallest local crops of a usual
    photograph would have to be enlarged.
    """

    settings: ViewSettings
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __call__(
        self, raw: Raw | Whole, generator: np.random.Generator, target: Any = None
    ) -> Sample:
        settings, crops = self.settings, self.settings.crops
        image = opened(raw, settings, self.smallest_side)
        height, width = image.size
        sizes = [settings.image_size] * NUM_GLOBAL
        sizes += [(crops.local_size, crops.local_size)] * crops.num_local
        scales = [crops.global_scale] * NUM_GLOBAL + [crops.local_scale] * crops.num_local
        # All that is random is drawn before pixels are touched: how they are resized cannot change
        # what is drawn.
        boxes = [crop_box(height, width, scale, settings.crop_ratio, generator) for scale in scales]
        flips = generator.random(len(boxes)) < settings.flip
        changes = photometric.draw(len(boxes), generator)
        parts, boxes = image.crops(boxes, sizes, settings.decode == "scaled")
        interpolation = settings.interpolation
        return Sample(
            [
                resize(part, size, interpolation).contiguous()
                for part, size in zip(parts, sizes, strict=True)
            ],
            torch.stack(
                [
                    Geometry(box, size).shares(height, width)
                    for box, size in zip(boxes, sizes, strict=True)
                ]
            ),
            torch.from_numpy(flips),
            changes,
            target,
        )


def opened(raw: Raw | Whole, settings: InputSettings, smallest_side: int) -> Opened:
    """A raw image whose crops can be chosen by its size; DecodeError for one too small."""
    channels, known = settings.channels, settings.wants_known
    image = open_image(raw, channels, settings.max_pixels, want_known=known)
    check_side(*image.size, smallest_side)
    return image


def decoded(raw: Raw | Whole, settings: InputSettings, smallest_side: int) -> Tensor:
    """(C, H, W) of a raw image, with the channels of the run; DecodeError for one too small."""
    return _whole(raw, settings, smallest_side).pixels


def _whole(raw: Raw | Whole, settings: InputSettings, smallest_side: int) -> Whole:
    image = whole_image(raw, settings)
    check_side(*image.size, smallest_side)
    return image


def whole_image(raw: Raw | Whole, settings: InputSettings) -> Whole:
    """All of a raw image, with the channels of the run; raises DecodeError."""
    if isinstance(raw, Whole):
        return raw
    if settings.wants_known:
        return Whole(*decode_known(raw, settings.channels, settings.max_pixels))
    return Whole(decode(raw, settings.channels, settings.max_pixels))


def _sample(
    pixels: Tensor, geometry: Geometry, size: tuple[int, int], target: Any, known: Tensor | None
) -> Sample:
    """What ``geometry`` made of an image of ``size``, its target cut with it."""
    if isinstance(target, Tensor) and target.ndim >= 2:
        target = geometry.apply_mask(target)
    box, flip = geometry.shares(*size), _FLIPS[geometry.flip]
    return Sample([pixels], box, flip, target=target, known=known)


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop, in pixels.

    Ten tries of an area and a shape; then the largest centred crop with an allowed ratio.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        # As `uniform` draws them, in a third of its time
        area = height * width * (scale[0] + (scale[1] - scale[0]) * generator.random())
        aspect = math.exp(log_low + (log_high - log_low) * generator.random())
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


def plain_geometry(image: Tensor, size: tuple[int, int], crop_pct: float | None) -> Geometry:
    """The centre crop of (..., H, W) resized to cover ``size / crop_pct``; None: all of it."""
    height, width = image.shape[-2:]
    if crop_pct is None:
        return Geometry((0, 0, height, width), size)
    target_height, target_width = round(size[0] / crop_pct), round(size[1] / crop_pct)
    if target_height * width >= target_width * height:  # the height is what just fits
        canvas = target_height, max(target_width, int(target_height * width / height))
    else:
        canvas = max(target_height, int(target_width * height / width)), target_width
    # Python rounds halves to even, as torchvision's CenterCrop does.
    top, left = round((canvas[0] - size[0]) / 2), round((canvas[1] - size[1]) / 2)
    return Geometry((top, left, *size), size, canvas=canvas)


def check_side(height: int, width: int, smallest_side: int) -> None:
    """Raises DecodeError for an image with a shorter side."""
    if min(height, width) < smallest_side:
        raise DecodeError(
            f"is {width}x{height} pixels, smaller than a patch of {smallest_side}x{smallest_side}; "
            "remove it or set a smaller patch_size"
        )


def check_crop_pct(crop_pct: float | None) -> None:
    """Raises UserError for what is no share."""
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(
            f"crop_pct={crop_pct} is no share of the picture; set it above 0 and up to 1"
        )
