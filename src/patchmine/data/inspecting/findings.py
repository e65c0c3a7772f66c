"""One item at a time: decoded once, and all that the advice is made of taken from its pixels."""

from __future__ import annotations

from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.decode import decode, probe
from patchmine.data.decoding.tiff import read_layout
from patchmine.data.decoding.tiff_pages import MAGIC, TiffFile
from patchmine.data.decoding.video import open_video
from patchmine.data.inspecting.alike import fingerprint

_BLOCK = 1 << 20  # pixels that are summed at once: doubles of all would take eight times the memory
_SAMPLED = 128  # pixels of the shorter side that are looked at where all of them are too many
_FLAT = 0.9  # share of pixels that equal their right neighbour, from which on an image is drawn
_FEW, _FEW_DEEP = 64, 1024  # values of such an image at most; deeper ones number many objects
_LEVELS = np.arange(256) / 255
_NEUTRAL = 2  # levels by which red, green and blue of a grey picture may differ (JPEG rounds)

MOST_DRAWN = 0.1
"""Share of pictures up to which these, and not what is drawn, are the exception."""


@dataclass
class Pages:
    """TIFFs of which so many pages are ``used`` of ``full`` ones, the first of them ``first``."""

    full: int
    used: int
    channels: int
    first: int
    count: int = 0


class Decoded(NamedTuple):
    """An item as it is stored: ``raw``, of a video its middle frame, and ``pixels`` (C, H, W)."""

    raw: Any
    height: int
    width: int
    channels: int
    dtype: str
    pixels: NDArray[Any]
    num_frames: int


def decoded(raw: Any, *, video: bool, max_pixels: int) -> Decoded:
    """An item with all its channels.  Raises DecodeError."""
    if isinstance(raw, bytes) and not raw:
        raise DecodeError("is empty (0 bytes)")
    num_frames = 0
    if video:
        reader = open_video(raw, max_pixels)
        num_frames = reader.num_frames
        raw = reader.frames([num_frames // 2])[0]  # (C, H, W) uint8
    facts = probe(raw)
    pixels = decode(raw, facts[2], max_pixels)  # a cut off file has a sound header
    return Decoded(raw, *facts, pixels.numpy(), num_frames)


@dataclass
class Tally:
    """Items counted.

    ``sizes``: (height, width) -> items; ``channels`` and ``dtypes`` likewise.  ``moments``: by the
    number of channels (3, C) sums of 1, x and x squared.  ``range``: by dtype the smallest and the
    largest value.  ``neutral``: items of three channels that are equal.  ``misfits``: by the number
    of channels items that neither ``channels=3`` nor ``channels=1`` reads.
    """

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    moments: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    range: dict[str, tuple[float, float]] = field(default_factory=dict)
    neutral: int = 0
    misfits: Counter[int] = field(default_factory=Counter)

    def add(self, item: Decoded, sums: NDArray[np.float64], low: float, high: float) -> None:
        """One more item, with its moments and its smallest and largest value."""
        self.sizes[item.height, item.width] += 1
        self.channels[item.channels] += 1
        self.dtypes[item.dtype] += 1
        self.moments[item.channels] = self.moments.get(item.channels, 0) + sums
        known = self.range.get(item.dtype, (low, high))
        self.range[item.dtype] = min(known[0], low), max(known[1], high)

    def __len__(self) -> int:
        return self.channels.total()

    @property
    def in_colour(self) -> int:
        """Images of three or four channels that are not grey all the same."""
        return self.channels[3] + self.channels[4] - self.neutral


@dataclass
class Findings:
    """What was seen.  Items are known by their numbers in the source.

    ``pictures`` are apart from the rest, which is ``drawn``, images of few values in flat areas, as
    label masks are, or ``blank``, of one value.  ``hashed``: pictures of which ``pixels``, ``bits``
    and ``colours`` (three each) are known.  ``frames``: lengths of videos.
    """

    pictures: Tally = field(default_factory=Tally)
    rest: Tally = field(default_factory=Tally)
    drawn: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)
    frames: Counter[int] = field(default_factory=Counter)
    first_of_size: dict[tuple[int, int], int] = field(default_factory=dict)
    pages: dict[tuple[int, int], Pages] = field(default_factory=dict)
    hashed: array[int] = field(default_factory=lambda: array("q"))
    pixels: array[int] = field(default_factory=lambda: array("q"))
    bits: array[int] = field(default_factory=lambda: array("Q"))
    colours: array[float] = field(default_factory=lambda: array("f"))
    _fits: dict[tuple[int, str, bytes], bool] = field(default_factory=dict)

    @property
    def among_pictures(self) -> bool:
        """Whether what is drawn or blank stands among pictures, rather than being the data."""
        return len(self.pictures) > MOST_DRAWN * (len(self.pictures) + len(self.rest))

    @property
    def main(self) -> Tally:
        """What a run would be on: the pictures where there are such, else the rest."""
        return self.pictures if self.among_pictures else self.rest

    def add(self, index: int, item: Decoded, max_pixels: int) -> None:
        """Count one item."""
        if item.num_frames:
            self.frames[item.num_frames] += 1
        sums, low, high = _moments(item.pixels)
        is_blank = bool((low == high).all())
        sample, is_drawn = _sampled(item)
        if is_blank or is_drawn:
            (self.blank if is_blank else self.drawn).append(index)
        elif not item.num_frames:  # one frame says little of a video
            self._hash(index, item, sample)
        tally = self.rest if is_blank or is_drawn else self.pictures
        tally.add(item, sums, float(low.min()), float(high.max()))
        tally.neutral += _is_neutral(sample)
        tally.misfits[item.channels] += not self._fits_colour(item, max_pixels)
        self.first_of_size.setdefault((item.height, item.width), index)
        self._count_pages(index, item.raw)

    def _hash(self, index: int, item: Decoded, sample: NDArray[Any]) -> None:
        scale = np.float32(255 if sample.dtype == np.uint8 else 1)
        found = fingerprint(sample.astype(np.float32) / scale)
        self.hashed.append(index)
        self.pixels.append(item.height * item.width)
        self.bits.append(found.bits)
        self.colours.extend(found.colour)

    def _fits_colour(self, item: Decoded, max_pixels: int) -> bool:
        """Whether ``channels=3`` reads it; tried once for each kind, since alpha decides."""
        if item.channels in (1, 3):
            return True
        start = bytes(item.raw[:4]) if isinstance(item.raw, bytes) else b""
        kind = item.channels, item.dtype, start
        if kind not in self._fits:
            self._fits[kind] = True
            try:
                decode(item.raw, 3, max_pixels)
            except DecodeError:
                self._fits[kind] = False
        return self._fits[kind]

    def _count_pages(self, index: int, raw: Any) -> None:
        if not isinstance(raw, bytes) or raw[:4] not in MAGIC:
            return
        with suppress(DecodeError):  # damage in pages that are not read
            file = TiffFile(raw)
            full = sum(page.is_full for page in file.pages())
            if full > 1:
                layout = read_layout(file)
                kind = full, len(layout.pages)
                self.pages.setdefault(kind, Pages(*kind, layout.channels, index)).count += 1


def _moments(pixels: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[Any], NDArray[Any]]:
    """Of an image (C, H, W) sums (3, C) of 1, x and x squared, smallest and largest values (C,)."""
    rows = max(1, _BLOCK // pixels.shape[2])
    tops = range(0, pixels.shape[1], rows)
    if pixels.dtype == np.uint8:  # by a histogram: exact, and faster than sums of doubles
        counts = np.zeros((len(pixels), 256), np.int64)
        for top in tops:
            for plane, count in zip(pixels[:, top : top + rows], counts, strict=True):
                count += np.bincount(plane.ravel(), minlength=256)
        present = counts > 0
        sums = np.stack([counts.sum(1), counts @ _LEVELS, counts @ _LEVELS**2])
        return sums, present.argmax(1) / 255, 1 - present[:, ::-1].argmax(1) / 255
    sums = np.zeros((3, len(pixels)))
    for top in tops:
        values = pixels[:, top : top + rows].reshape(len(pixels), -1).astype(np.float64)
        ones = np.full(len(pixels), values.shape[1])
        sums += np.stack([ones, values.sum(1), np.square(values).sum(1)])
    return sums, pixels.min((1, 2)), pixels.max((1, 2))


def _sampled(item: Decoded) -> tuple[NDArray[Any], bool]:
    """Every k-th pixel (C, h, w), and whether the image has few values in flat areas."""
    step = max(1, min(item.height, item.width) // _SAMPLED)
    rows = np.ascontiguousarray(item.pixels[:, ::step])  # planes: decoders put channels last
    sample = np.ascontiguousarray(rows[:, :, ::step])
    if np.dtype(item.dtype).kind not in "bui" or item.width < 2:
        return sample, False
    flat = np.ones((len(rows[0]), item.width - 1), bool)
    for plane in rows:  # of a photograph the first tells
        flat &= plane[:, 1:] == plane[:, :-1]
        if flat.mean() < _FLAT:
            return sample, False
    values = sample[0].astype(np.float64)
    for channel in sample[1:3]:
        values = values * 256 + channel
    return sample, len(np.unique(values)) <= (_FEW if sample.dtype == np.uint8 else _FEW_DEEP)


def _is_neutral(sample: NDArray[Any]) -> bool:
    """Whether an image (C, H, W) has three channels that are equal."""
    if len(sample) != 3:
        return False
    red, green, blue = sample.astype(np.int16) if sample.dtype == np.uint8 else sample
    room = _NEUTRAL if sample.dtype == np.uint8 else 0
    return all(bool((np.abs(other - red) <= room).all()) for other in (green, blue))
