"""Views of images with objects: large-scale jitter for training, the whole image for evaluation.

Both fit an image into ``image_size`` without changing its shape.  It lies at the top left, before
mirroring, and the mean fills the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding.decode import Raw
from patchmine.data.settings import DetectViewSettings, InputSettings
from patchmine.data.views.geometry import Geometry
from patchmine.data.views.images import decoded
from patchmine.types import Objects, Sample

_SMALLEST = 1.0  # pixels of a side in the view; smaller objects are dropped
_GREY = 0.5  # what fills the view where the settings name no mean


@dataclass(frozen=True)
class ObjectView:
    """The image of a random size, and a random cut of it where it is larger than the view.

    Large-scale jitter as ViTDet has it (detectron2's ``ResizeScale`` and ``FixedSizeCrop``): the
    image is resized to ``scale`` times the size that just fits, keeping its shape.
    """

    settings: DetectViewSettings
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __call__(self, raw: Raw, generator: np.random.Generator, target: Any = None) -> Sample:
        settings = self.settings
        image = decoded(raw, settings, self.smallest_side)
        height, width = image.shape[-2:]
        # All that is random is drawn before pixels are touched.
        scale, offset = generator.uniform(*settings.scale), generator.random()
        flip = bool(generator.random() < settings.flip)
        geometry = jittered(height, width, settings.image_size, scale, offset)
        return _viewed(image, geometry, flip, settings, settings.interpolation, target)


@dataclass(frozen=True)
class PlainObjectView:
    """The whole image as large as it fits, not mirrored.

    `boxes_in_image` takes boxes in a view back to the image.  Small objects are dropped from the
    target here as in training, so that scores need the source's own targets.
    """

    settings: InputSettings
    interpolation: str = "bilinear"
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __call__(self, raw: Raw, generator: np.random.Generator, target: Any = None) -> Sample:
        image = decoded(raw, self.settings, self.smallest_side)
        height, width = image.shape[-2:]
        geometry = jittered(height, width, self.settings.image_size, scale=1.0, offset=0.0)
        return _viewed(image, geometry, False, self.settings, self.interpolation, target)


def cut_view(
    image: Tensor, box: tuple[int, int, int, int], settings: InputSettings, interpolation: str
) -> Sample:
    """A piece (top, left, height, width) of an image (C, H, W), seen as whole images are."""
    size = jittered(*box[2:], settings.image_size, scale=1.0, offset=0.0).size
    return _viewed(image, Geometry(box, size), False, settings, interpolation, None)


def jittered(
    height: int, width: int, size: tuple[int, int], scale: float, offset: float
) -> Geometry:
    """What is seen of an image that is resized to ``scale`` times the size that fits ``size``.

    Args:
        height: of the image, as is ``width``, in pixels.
        size: of the view.
        scale: above 1 only a cut of ``size`` is seen.
        offset: in [0, 1), where the cut lies, in both directions.

    Returns:
        The cut in whole pixels of the image, and its size in the view: only what is seen is
        resized, however large the image would become.
    """
    factor = scale * min(size[0] / height, size[1] / width)
    (top, cut_height, seen_height), (left, cut_width, seen_width) = (
        _seen(side, limit, factor, offset)
        for side, limit in zip((height, width), size, strict=True)
    )
    return Geometry((top, left, cut_height, cut_width), (seen_height, seen_width))


def _seen(side: int, limit: int, factor: float, offset: float) -> tuple[int, int, int]:
    """Start and length of what is seen of a side of the image, and its length in the view."""
    resized = max(1, round(side * factor))
    if resized <= limit:
        return 0, side, resized
    cut = min(side, max(1, round(limit / factor)))
    return round((side - cut) * offset), cut, limit


def boxes_in_image(boxes: Tensor, box: Tensor, height: int, width: int, view: Tensor) -> Tensor:
    """Boxes found in a view that is not mirrored, as clipped ones in pixels of its image.

    Args:
        boxes: (N, 4) (left, top, right, bottom) in pixels of the view.
        box: (4,) the sample's.
        height: of the image, as is ``width``.
        view: (C, H, W), for its size.
    """
    top, left, box_height, box_width = box.unbind()
    x = (boxes[:, 0::2] / view.shape[-1] * box_width + left) * width
    y = (boxes[:, 1::2] / view.shape[-2] * box_height + top) * height
    x, y = x.clamp(0, width), y.clamp(0, height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def _viewed(
    image: Tensor,
    geometry: Geometry,
    flip: bool,
    settings: InputSettings,
    interpolation: str,
    target: Any,
) -> Sample:
    """The padded view; ``box`` is that of all of it, which may reach beyond the image."""
    height, width = image.shape[-2:]
    view = padded(geometry.apply(image, interpolation), settings)
    if isinstance(target, Objects):
        target = seen_objects(target, geometry, (height, width), settings.image_size, flip)
    shares = geometry.shares(height, width)
    shares[2] *= settings.image_size[0] / geometry.size[0]
    shares[3] *= settings.image_size[1] / geometry.size[1]
    return Sample([view], shares, torch.tensor(flip), target=target)


def padded(image: Tensor, settings: InputSettings) -> Tensor:
    """(C, H, W) at the top left of a view of ``image_size`` that is filled with the mean."""
    height, width = image.shape[-2:]
    if (height, width) == settings.image_size:
        return image.contiguous()
    mean = torch.tensor(settings.mean or [_GREY] * settings.channels)
    if image.dtype == torch.uint8:
        mean = (255 * mean).round().clamp(0, 255)
    fill = mean.to(image.dtype)[:, None, None]
    view = fill.expand(-1, *settings.image_size).contiguous()
    view[:, :height, :width] = image
    return view


def seen_objects(
    objects: Objects, geometry: Geometry, image: tuple[int, int], size: tuple[int, int], flip: bool
) -> Objects:
    """The objects that are seen in a padded view of ``size``, mirrored with it.

    Those under a pixel wide or high there are dropped.  Boxes of objects with masks are those of
    what is left of the masks.
    """
    boxes = geometry.apply_boxes(objects.boxes, *image)
    if flip:
        boxes = torch.stack(
            [size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], dim=1
        )
    kept = _large(boxes)
    found = Objects(boxes[kept], objects.labels[kept], objects.crowd[kept])
    if objects.masks is None:
        return found
    masks = _seen_masks(objects.masks, kept, geometry, size, flip)
    boxes = boxes_of(masks)
    return replace(found, boxes=boxes, masks=masks).chosen(_large(boxes))


def boxes_of(masks: Tensor) -> Tensor:
    """(N, 4) float32 (left, top, right, bottom) of masks (N, H, W) bool; zeros of an empty one."""
    if not masks.numel():
        return torch.zeros(len(masks), 4)
    sides = []
    for inside in (masks.any(1), masks.any(2)):  # (N, W), (N, H)
        # Of equal values argmax gives the first.
        first, last = inside.byte().argmax(1), inside.flip(1).byte().argmax(1)
        end = inside.shape[1] - last
        sides.append((first, torch.where(inside.any(1), end, first)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


def _large(boxes: Tensor) -> Tensor:
    """(N,) bool: boxes of at least a pixel each way."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST).all(1)


def _seen_masks(
    masks: Tensor, kept: Tensor, geometry: Geometry, size: tuple[int, int], flip: bool
) -> Tensor:
    """(M, H, W) bool of the kept masks in a padded view: the nearest pixel of the image each."""
    top, left, height, width = geometry.box
    seen_height, seen_width = geometry.size
    rows, columns = _nearest(top, height, seen_height), _nearest(left, width, seen_width)
    view = torch.zeros(int(kept.sum()), *size, dtype=torch.bool)
    start = 0
    if flip:
        columns, start = columns.flip(0), size[1] - seen_width
    # One object after the other, so that what is in between stays small.
    for place, number in enumerate(kept.nonzero().flatten().tolist()):
        seen = masks[number].index_select(0, rows).index_select(1, columns)
        view[place, :seen_height, start : start + seen_width] = seen
    return view


def _nearest(start: int, length: int, seen: int) -> Tensor:
    """(seen,) int64: the pixel of the image under the centre of each pixel of the view."""
    return start + (2 * torch.arange(seen) + 1) * length // (2 * seen)
