"""Small pictures of items of any kind, read by the loader's processes and packed into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchmine.data.badfiles import BadFiles
from patchmine.data.decoding.decode import decode_known
from patchmine.data.items import Item
from patchmine.data.loader import plain_batches
from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import Source
from patchmine.data.views.display import coloured
from patchmine.data.views.geometry import resize
from patchmine.types import Sample

SIDE = 128
"""Pixels of a thumbnail's longer side; smaller images stay as they are."""
_QUALITY = 80  # of WebP: 2 to 4 KB each


class Thumbnail(NamedTuple):
    """A picture as the address that a page holds, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class ThumbnailView:
    """The whole image, small, in the upper left of a black square; ``box`` is its part of that.

    ``pixels``: the one of an `Item`, which of a video gives the frame in the middle.
    """

    settings: InputSettings
    pixels: Callable[[Any, int, int], Tensor]
    repeats: ClassVar[int] = 1

    def __call__(self, raw: Any, generator: np.random.Generator, target: Any = None) -> Sample:
        of = (raw, self.settings.channels, self.settings.max_pixels)
        image = decode_known(*of)[0] if self.settings.wants_known else self.pixels(*of)  # (C, H, W)
        share = min(1.0, SIDE / max(image.shape[-2:]))
        height, width = (max(1, round(side * share)) for side in image.shape[-2:])
        square = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
        square[:, :height, :width] = resize(coloured(image), (height, width))
        return Sample([square], torch.tensor([0, 0, height / SIDE, width / SIDE]), _UNFLIPPED)


_UNFLIPPED = torch.tensor(False)


def thumbnails(
    source: Source, places: Sequence[int], item: Item, settings: InputSettings, workers: int
) -> Mapping[int, Thumbnail]:
    """Thumbnails of some items by their place; those that cannot be read now are left out."""
    found = pictures(source, places, item, settings, workers)
    return {place: _packed(pixels) for place, pixels in found.items()}


def pictures(
    source: Source, places: Sequence[int], item: Item, settings: InputSettings, workers: int
) -> Mapping[int, NDArray[np.uint8]]:
    """The same as pixels (H, W, 3)."""
    loaded = plain_batches(
        source,
        ThumbnailView(settings, item.pixels),
        batch_size=64,
        indices=places,
        workers=workers,
        bad=BadFiles(None, 1.0),
    )
    return {
        int(index): _cut(square, box)
        for batch in loaded
        for index, square, box in zip(batch.index, batch.views[0], batch.box, strict=True)
    }


def _cut(square: Tensor, box: Tensor) -> NDArray[np.uint8]:
    height, width = (max(1, round(SIDE * share)) for share in box[2:].tolist())
    pixels: NDArray[np.uint8] = square[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
    return pixels


def _packed(pixels: NDArray[np.uint8]) -> Thumbnail:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=_QUALITY)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    height, width = pixels.shape[:2]
    return Thumbnail(f"data:image/webp;base64,{content}", width, height)
