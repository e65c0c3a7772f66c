"""Crops of images with label maps, and whole images to be tested on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.data.decoding.decode import DecodeError, Raw
from patchmine.data.settings import DenseViewSettings
from patchmine.data.views import photometric
from patchmine.data.views.geometry import Geometry, resize
from patchmine.data.views.images import decoded
from patchmine.types import Sample

_CROP_TRIES = 10  # mmsegmentation's RandomCrop
HUE_SHARE = 0.1  # of the strength of the other changes: 18 degrees where they are a half


@dataclass(frozen=True)
class SegmentView:
    """A crop of an image that was enlarged at random, with its labels; padded where it is smaller.

    Padding has the settings' mean, and belongs to no class.
    """

    settings: DenseViewSettings
    ignore_index: int
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __call__(self, raw: Raw, generator: np.random.Generator, target: Any = None) -> Sample:
        settings = self.settings
        image = decoded(raw, settings, self.smallest_side)
        labels = label_tensor(image, target)
        height, width = image.shape[-2:]
        shorter = settings.short_side or min(height, width)
        enlarged = generator.uniform(*settings.scale) * shorter / min(height, width)
        # The crop in pixels of the image, and how large it is in the view: all of it, or less.
        box_size = [
            min(side, max(1, round(wanted / enlarged)))
            for side, wanted in zip((height, width), settings.image_size, strict=True)
        ]
        view_size = [
            min(wanted, max(1, round(side * enlarged)))
            for side, wanted in zip(box_size, settings.image_size, strict=True)
        ]
        corners = generator.random((_CROP_TRIES, 2))
        flip = bool(generator.random() < settings.flip)
        changes = generator.random(8)
        for corner in corners:
            top, left = (
                int(share * (side - own + 1))
                for share, side, own in zip(corner, (height, width), box_size, strict=True)
            )
            geometry = Geometry(
                (top, left, box_size[0], box_size[1]), (view_size[0], view_size[1]), flip
            )
            if _is_varied(labels, geometry, self.ignore_index, settings.crop_max_share):
                break
        pixels = geometry.apply(image, settings.interpolation)
        sample = Sample(
            [_padded(pixels, settings)],
            geometry.shares(height, width),
            torch.tensor(flip),
            target=_padded_labels(geometry, labels, settings.image_size, self.ignore_index),
        )
        if settings.colour_jitter:
            strength = settings.colour_jitter
            shifts = strength, strength, strength, HUE_SHARE * strength
            sample = replace(sample, photometric=photometric.draw_jitter(shifts, changes))
        return sample


@dataclass(frozen=True)
class WholeView:
    """All of an image, its shorter side as the settings say; its labels keep their own size."""

    settings: DenseViewSettings
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __call__(self, raw: Raw, generator: np.random.Generator, target: Any = None) -> Sample:
        settings = self.settings
        image = decoded(raw, settings, self.smallest_side)
        labels = None if target is None else label_tensor(image, target)
        image = resized_whole(image, settings)
        box = torch.tensor([0.0, 0.0, 1.0, 1.0])
        return Sample([image.contiguous()], box, torch.tensor(False), target=labels)


def resized_whole(image: Tensor, settings: DenseViewSettings) -> Tensor:
    """(..., H, W) with its shorter side as the settings say."""
    if settings.short_side is None:
        return image
    height, width = image.shape[-2:]
    factor = settings.short_side / min(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return resize(image, size, settings.interpolation)


def label_tensor(image: Tensor, target: Any) -> Tensor:
    """The labels (H, W) of an image (C, H, W).  DecodeError where their sizes differ."""
    labels = torch.from_numpy(np.asarray(target))
    if labels.shape != image.shape[-2:]:
        (height, width), (rows, columns) = image.shape[-2:], labels.shape
        raise DecodeError(f"is {width}x{height} pixels, but its label map {columns}x{rows}")
    return labels


def _is_varied(labels: Tensor, geometry: Geometry, ignored: int, most: float) -> bool:
    """Whether no class has more than a share ``most`` of a crop."""
    if most >= 1:
        return True
    top, left, height, width = geometry.box
    part = labels[top : top + height, left : left + width]
    known = part[part != ignored]
    if known.numel() == 0:
        return False
    counts = torch.bincount(known.flatten().clamp_min(0))
    return int(counts.max()) <= most * known.numel()


def _padded(pixels: Tensor, settings: DenseViewSettings) -> Tensor:
    """(C, h, w) in the upper left corner of the view's size."""
    height, width = settings.image_size
    if pixels.shape[-2:] == (height, width):
        return pixels.contiguous()
    mean = torch.tensor(settings.mean or [0.5] * settings.channels)
    filling = (255 * mean).round() if pixels.dtype == torch.uint8 else mean
    canvas = filling.to(pixels.dtype)[:, None, None].repeat(1, height, width)
    canvas[:, : pixels.shape[-2], : pixels.shape[-1]] = pixels
    return canvas


def _padded_labels(
    geometry: Geometry, labels: Tensor, size: tuple[int, int], ignored: int
) -> Tensor:
    """(H, W) int64 of the finished view: mirroring, which pixels leave to the device, is done."""
    seen = replace(geometry, flip=False).apply_mask(labels).long()
    rows, columns = size[0] - seen.shape[0], size[1] - seen.shape[1]
    seen = F.pad(seen, (0, columns, 0, rows), value=ignored)
    return seen.flip(-1) if geometry.flip else seen
