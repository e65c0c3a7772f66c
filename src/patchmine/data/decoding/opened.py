"""Images of which crops are wanted: of a JPEG no more is decoded than these need.

The size of an image is known before its pixels are, so that a crop can be drawn first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchmine.data.decoding import headers
from patchmine.data.decoding.arrays import fit_channels
from patchmine.data.decoding.bounds import DecodeError, damage
from patchmine.data.decoding.decode import (
    Raw,
    check_jpeg,
    decode,
    decode_known,
    jpeg_by_pil,
    jpeg_pixels,
)
from patchmine.data.decoding.orientation import TURNED, Box, stored_box, upright_box, upright_tensor
from patchmine.data.decoding.unnamed import unnamed_warnings

MARGIN = 1.25
"""How much larger than its view a crop still is where a JPEG is decoded at a half or less.

At 1 the mean difference from the exact path was 1.1 to 1.3 levels of 255 in sharp photographs, at
1.25 0.9 to 1.0, at 1.5 0.6 to 0.9, where hardly any crop is left that may be decoded at a half.
"""

_SCALES: tuple[Literal[8, 4, 2], ...] = (8, 4, 2)
# Rows below a crop that libjpeg may look at when it enlarges colours, times the scale: two of the
# coarsest colours, which have one row for four of the picture.
_ROWS_BELOW = 8

Size = tuple[int, int]
"""(height, width) in pixels."""
Crops = tuple[list[Tensor], list[Box]]
"""Crops (C, h, w), upright, and the boxes of the whole image that they hold."""


@dataclass(frozen=True)
class Whole:
    """An image (C, H, W) that is decoded already; ``known`` as `decode_known` gives it."""

    pixels: Tensor
    known: Tensor | None = None

    @property
    def size(self) -> Size:
        height, width = self.pixels.shape[-2:]
        return height, width

    def crops(self, boxes: Sequence[Box], sizes: Sequence[Size], scaled: bool) -> Crops:
        """As `Jpeg.crops` gives them."""
        row, column = self.pixels.stride()[1:]
        first, channels = self.pixels.storage_offset(), self.pixels.shape[0]
        cuts = [  # slices, in half their time
            self.pixels.as_strided(
                (channels, tall, wide), self.pixels.stride(), first + top * row + left * column
            )
            for top, left, tall, wide in boxes
        ]
        return cuts, list(boxes)

    def known_in(self, box: Box) -> Tensor | None:
        """(C, h, w) bool, where in a box there is data; None: everywhere."""
        if self.known is None:
            return None
        top, left, tall, wide = box
        return self.known[:, top : top + tall, left : left + wide]


@dataclass(frozen=True)
class Jpeg:
    """A JPEG of which only the header was read; ``channels`` as in `decode`."""

    data: bytes
    header: headers.JpegHeader
    channels: int

    @property
    def size(self) -> Size:
        """Of the upright image."""
        height, width = self.header.height, self.header.width
        return (width, height) if self.header.orientation in TURNED else (height, width)

    def crops(self, boxes: Sequence[Box], sizes: Sequence[Size], scaled: bool) -> Crops:
        """The pixels in some boxes of the image.

        Args:
            boxes: in pixels of the upright image.
            sizes: what each crop will be resized to.
            scaled: whether the image may be decoded at 1/2, 1/4 or 1/8, as far as every crop stays
                ``MARGIN`` times as large as its view; boxes are then moved to whole pixels of that.

        Returns:
            The crops, at the scale that was chosen, and their boxes in pixels of the whole image.

        Raises:
            DecodeError: for a damaged file, or other channels.
        """
        scale = _scale(boxes, sizes) if scaled else None
        with unnamed_warnings(), damage("is a truncated or damaged image"):
            if scale is not None:
                try:
                    return self._scaled_crops(boxes, scale)
                except DecodeError:
                    pass  # the other decoder knows better, or says what is wrong
            boxes = list(boxes)
            stored = [stored_box(box, *self.size, self.header.orientation) for box in boxes]
            rows = max(top + tall for top, _, tall, _ in stored) + _ROWS_BELOW
            pixels = jpeg_pixels(self.data, self.header, self.channels, rows)
            return self._cut(pixels, stored), boxes

    def known_in(self, box: Box) -> Tensor | None:
        """As `Whole.known_in`: a JPEG misses nothing."""
        return None

    def _scaled_crops(self, boxes: Sequence[Box], scale: Literal[2, 4, 8]) -> Crops:
        """At 1 / ``scale``, from where all pixels are whole ones."""
        header = self.header
        stored = [stored_box(box, *self.size, header.orientation) for box in boxes]
        small = []
        for top, left, tall, wide in stored:
            first_row, first_column = round(top / scale), round(left / scale)
            rows = min(round((top + tall) / scale), header.height // scale) - first_row
            columns = min(round((left + wide) / scale), header.width // scale) - first_column
            small.append((first_row, first_column, rows, columns))
        last = max(top + tall for top, _, tall, _ in small)
        rows = min(header.height, (last + _ROWS_BELOW) * scale)
        pixels = jpeg_by_pil(self.data, header, self.channels, rows, scale)
        if pixels.shape[-1] != -(-header.width // scale) or pixels.shape[-2] < last:
            raise DecodeError("cannot be decoded at that scale")
        used = []
        for top, left, tall, wide in small:
            whole = (top * scale, left * scale, tall * scale, wide * scale)
            used.append(upright_box(whole, *self.size, header.orientation))
        return self._cut(pixels, small), used

    def _cut(self, pixels: Tensor, stored: Sequence[Box]) -> list[Tensor]:
        pixels = fit_channels(pixels, self.channels, has_alpha=False)
        cuts, _ = Whole(pixels).crops(stored, (), False)
        return [upright_tensor(cut, self.header.orientation) for cut in cuts]


Opened = Whole | Jpeg


def open_image(
    raw: Raw | Whole, channels: int, max_pixels: int, *, want_known: bool = False
) -> Opened:
    """A raw item before its crops are chosen; arguments and errors as of `decode`.

    ``want_known``: as of `decode_known`.
    """
    if isinstance(raw, Whole):
        return raw
    if isinstance(raw, bytes) and raw.startswith(headers.JPEG):
        with damage("is a truncated or damaged image"):
            header = headers.read_jpeg_header(raw)
        check_jpeg(header, len(raw), max_pixels)
        return Jpeg(raw, header, channels)
    if isinstance(raw, Tensor) and raw.dtype == torch.uint8 and _fits(raw, channels):
        return Whole(raw)
    if want_known:
        return Whole(*decode_known(raw, channels, max_pixels))
    return Whole(decode(raw, channels, max_pixels))


def _fits(image: Tensor, channels: int) -> bool:
    """Whether nothing is left to do to an image: (channels, H, W), not empty."""
    return image.ndim == 3 and image.shape[0] == channels and image.numel() > 0


def _scale(boxes: Sequence[Box], sizes: Sequence[Size]) -> Literal[2, 4, 8] | None:
    """The smallest picture that is still large enough for all; None: the whole one."""
    room = min(
        min(tall / height, wide / width)
        for (_, _, tall, wide), (height, width) in zip(boxes, sizes, strict=True)
    )
    return next((scale for scale in _SCALES if room >= scale * MARGIN), None)
