"""Several crops of one image, decoded once: two large (global) ones, then small (local) ones
(DINO's multi-crop).

Crops are cut from the decoded image and resized to bytes here; mirroring and changes of colour are
only drawn, and made on the device.  A JPEG is always decoded at full size: at a half of it the
smallest local crops of a photograph of usual size would have to be enlarged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding.decode import Raw, decode
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.views import photometric
from patchmine.data.views.images import check_interpolation, check_side, crop_box, fractions, resize

NUM_GLOBAL = 2


class Crops(NamedTuple):
    """V crops of one image.

    ``views``: (C, H, W) uint8 or float32, the global ones first.  ``box`` (V, 4) float32: fractions
    of the original (top, left, height, width).  ``flip`` (V,) bool.  ``photometric`` (V, P)
    float32, see `data.photometric`.
    """

    views: list[Tensor]
    box: Tensor
    flip: Tensor
    photometric: Tensor


@dataclass(frozen=True)
class MultiCropView:
    """Two crops of ``image_size`` (height, width) and ``num_local`` squares of ``local_size``,
    drawn independently.

    Each is torchvision's RandomResizedCrop of its own share of the image, ``global_scale`` or
    ``local_scale``; ``flip`` is a probability.  Images with a side under ``smallest_side`` pixels,
    or of more than ``max_pixels``, are refused.  Raises DecodeError.
    """

    image_size: tuple[int, int]
    num_local: int = 8
    local_size: int = 96
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"
    smallest_side: int = 1
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)

    def __call__(self, raw: Raw, channels: int, generator: np.random.Generator) -> Crops:
        image = decode(raw, channels, self.max_pixels)
        check_side(image, self.smallest_side)
        height, width = image.shape[-2:]
        scales = [self.global_scale] * NUM_GLOBAL + [self.local_scale] * self.num_local
        sizes = [self.image_size] * NUM_GLOBAL + [
            (self.local_size, self.local_size)
        ] * self.num_local
        # All that is random is drawn before pixels are touched: how they are resized cannot change
        # what is drawn.
        boxes = [crop_box(height, width, scale, self.ratio, generator) for scale in scales]
        flips = generator.random(len(boxes)) < self.flip
        changes = photometric.draw(len(boxes), generator)
        views = [
            resize(
                image[:, top : top + crop_height, left : left + crop_width],
                size,
                self.interpolation,
            )
            for (top, left, crop_height, crop_width), size in zip(boxes, sizes, strict=True)
        ]
        return Crops(
            views,
            torch.stack([fractions(image, *box) for box in boxes]),
            torch.from_numpy(flips),
            changes,
        )
