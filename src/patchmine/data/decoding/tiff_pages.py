"""TIFF's directories: what every page says of itself, read without a parser of others and within
the file's length.

A page that is to be decoded is handed on alone, with the tags that say how its pixels are stored
and no others: what is beside the pixels (EXIF, resolutions, profiles, further pages) can then
neither break nor change what is read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from patchmine.data.decoding.bounds import DecodeError, check_pixels

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MOST_PAGES = 4096
"""Pages that are looked at, and so channels that a stack may have."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION = 256, 257, 258, 259, 262, 270
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_SUBFILE, _OLD_SUBFILE, _ORIENTATION, _EXTRA, _FORMAT, _DEPTH = 254, 255, 274, 338, 339, 32997
# Besides these: fill order, FAX options, predictor, palette, ink set, tables of JPEG and of LERC,
# YCbCr's constants.
_PIXELS = {
    *(
        _WIDTH,
        _HEIGHT,
        _BITS,
        _COMPRESSION,
        _PHOTOMETRIC,
        _STRIPS,
        _SAMPLES,
        _ROWS,
        _STRIP_BYTES,
        _PLANAR,
    ),
    *(_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA, _FORMAT),
    *(266, 292, 293, 317, 320, 332, 347, *range(512, 522), *range(529, 533), 50674),
}
_TYPES = {
    1: "u1",
    3: "u2",
    4: "u4",
    6: "i1",
    8: "i2",
    9: "i4",
    13: "u4",
    16: "u8",
    17: "i8",
    18: "u8",
}
_SIZES = {2: 1, 5: 8, 7: 1, 10: 8, 11: 4, 12: 8}  # of types that hold no whole numbers
_TEXT = 2
_LONGEST_DESCRIPTION = 1 << 24
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_MASK_COLOUR = 4  # photometric interpretation of a transparency mask
RAW = 1  # compression

_Kind = tuple[int, int, int, tuple[int, ...], str, int]


class _Entry(NamedTuple):
    kind: int
    number: int
    raw: bytes
    """The whole entry, which is copied where the page is handed on."""
    start: int
    """Where its values begin."""


@dataclass(frozen=True)
class Page:
    """One directory.  ``bits`` of each sample, ``number_kind`` "u", "i" or "f", ``extra`` what
    further samples mean.
    """

    entries: dict[int, _Entry]
    height: int
    width: int
    samples: int
    bits: tuple[int, ...]
    number_kind: str
    photometric: int
    planar: int
    compression: int
    extra: tuple[int, ...]
    orientation: int
    is_full: bool
    """Neither a reduced copy of another page nor a mask."""
    description: str

    @property
    def kind(self) -> _Kind:
        """Equal for pages that can be channels of one image."""
        return self.height, self.width, self.samples, self.bits, self.number_kind, self.photometric


class TiffFile:
    """The chain of directories of a TIFF or BigTIFF, read as it is asked for.  Raises DecodeError
    for damage.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<" if data[:2] == b"II" else ">"
        self.big = data[2:4] in (b"+\0", b"\0+")
        self._first = self._whole("Q", 8) if self.big else self._whole("I", 4)

    def pages(self) -> Iterator[Page]:
        """One after the other; a chain that goes in a circle ends."""
        place, seen = self._first, set[int]()
        while place and place not in seen and len(seen) < MOST_PAGES:
            seen.add(place)
            entries, place = self._directory(place)
            yield self._page(entries)
        if place and len(seen) == MOST_PAGES:
            raise DecodeError(
                f"is a TIFF of more than {MOST_PAGES} pages; keep the pages of one image in a file"
            )
        if not seen:
            raise DecodeError("is a truncated or damaged TIFF (it has no page)")

    def _whole(self, letter: str, place: int) -> int:
        try:
            value: int = struct.unpack_from(self.order + letter, self.data, place)[0]
        except (struct.error, OverflowError) as error:
            raise DecodeError(
                "is a truncated or damaged TIFF (a directory lies outside of the file)"
            ) from error
        return value

    def _directory(self, place: int) -> tuple[dict[int, _Entry], int]:
        """The entries of the directory at ``place``, and where the next one is."""
        size, inline, letter = (20, 8, "Q") if self.big else (12, 4, "I")
        count, place = self._whole("Q" if self.big else "H", place), place + (8 if self.big else 2)
        if place + count * size > len(self.data):
            raise DecodeError(
                "is a truncated or damaged TIFF (a directory goes on behind the file's end)"
            )
        entries: dict[int, _Entry] = {}
        for at in range(place, place + count * size, size):
            tag, kind = struct.unpack_from(self.order + "HH", self.data, at)
            number = self._whole(letter, at + 4)
            width = np.dtype(_TYPES[kind]).itemsize if kind in _TYPES else _SIZES.get(kind, 1)
            start = at + size - inline
            if number * width > inline:
                start = self._whole(letter, start)
            entries.setdefault(tag, _Entry(kind, number, self.data[at : at + size], start))
        end = place + count * size
        following = self._whole(letter, end) if end + inline <= len(self.data) else 0
        return entries, following

    def whole_numbers(
        self, entries: dict[int, _Entry], tag: int, default: tuple[int, ...] = ()
    ) -> list[int]:
        """All values of a tag that holds whole numbers, ``default`` where it is not there."""
        entry = entries.get(tag)
        if entry is None or not entry.number:
            return list(default)
        if entry.kind not in _TYPES:
            raise DecodeError(f"is a damaged TIFF (its tag {tag} holds no whole numbers)")
        dtype = np.dtype(self.order + _TYPES[entry.kind])
        if entry.start + entry.number * dtype.itemsize > len(self.data):
            raise DecodeError(
                f"is a truncated or damaged TIFF (its tag {tag} lies outside of the file)"
            )
        values: list[int] = np.frombuffer(self.data, dtype, entry.number, entry.start).tolist()
        return values

    def _page(self, entries: dict[int, _Entry]) -> Page:
        def one(tag: int, default: int) -> int:
            return self.whole_numbers(entries, tag, (default,))[0]

        samples = one(_SAMPLES, 1)
        if not 1 <= samples <= 1 << 16:
            raise DecodeError(f"is a damaged TIFF (it has {samples} samples for each pixel)")
        bits = self.whole_numbers(entries, _BITS, (1,))
        if one(_DEPTH, 1) > 1:
            raise DecodeError(
                f"is a volume of {one(_DEPTH, 1)} planes in one TIFF page; store the planes as pages"
            )
        formats = set(self.whole_numbers(entries, _FORMAT, (1,)))
        photometric, subfile = one(_PHOTOMETRIC, 1), one(_SUBFILE, 0)
        return Page(
            entries,
            one(_HEIGHT, 0),
            one(_WIDTH, 0),
            samples,
            tuple(bits if len(bits) == samples else bits[:1] * samples),
            {1: "u", 2: "i", 3: "f", 4: "u"}.get(formats.pop(), "") if len(formats) == 1 else "",
            photometric,
            one(_PLANAR, 1),
            one(_COMPRESSION, RAW),
            tuple(self.whole_numbers(entries, _EXTRA)),
            self._orientation(entries),
            not subfile & (_REDUCED | _MASK)
            and one(_OLD_SUBFILE, 1) != 2
            and photometric != _MASK_COLOUR,
            self._description(entries),
        )

    def _orientation(self, entries: dict[int, _Entry]) -> int:
        try:
            value = self.whole_numbers(entries, _ORIENTATION, (1,))[0]
        except DecodeError:
            return 1
        return value if 1 <= value <= 8 else 1

    def _description(self, entries: dict[int, _Entry]) -> str:
        entry = entries.get(_DESCRIPTION)
        if entry is None or entry.kind != _TEXT:
            return ""
        end = entry.start + min(entry.number, _LONGEST_DESCRIPTION)
        return self.data[entry.start : end].decode("utf-8", "replace").rstrip("\0")

    def check(self, page: Page, max_pixels: int, work: float) -> None:
        """DecodeError where a page is too large, or its strips or tiles are fewer or shorter than
        its size asks.
        """
        check_pixels(page.height, page.width, max_pixels, stored=len(self.data), work=work)
        tiled = _TILES in page.entries
        if tiled:
            rows, columns = (
                self.whole_numbers(page.entries, tag, (0,))[0]
                for tag in (_TILE_HEIGHT, _TILE_WIDTH)
            )
            check_pixels(rows, columns, max_pixels, stored=len(self.data), work=work)
        else:
            rows, columns = self.whole_numbers(page.entries, _ROWS, (page.height,))[0], page.width
            rows = min(rows or page.height, page.height)
        planes = page.samples if page.planar == 2 else 1
        wanted = math.ceil(page.height / rows) * math.ceil(page.width / columns) * planes
        starts = self.whole_numbers(page.entries, _TILES if tiled else _STRIPS)
        sizes = self.whole_numbers(page.entries, _TILE_BYTES if tiled else _STRIP_BYTES)
        if len(starts) < wanted:
            kind = "tiles" if tiled else "strips"
            raise DecodeError(
                f"is a truncated or damaged TIFF ({len(starts)} {kind} where {page.width}x{page.height} pixels have "
                f"{wanted})"
            )
        if any(start >= len(self.data) for start in starts[:wanted]):
            raise DecodeError(
                "is a truncated TIFF (a part of its pixels lies behind the file's end)"
            )
        if (
            page.compression == RAW and not tiled and all(sizes[:wanted])
        ):  # a part of size 0 is empty on purpose
            row_bytes = (
                -(-page.width * sum(page.bits) // 8)
                if planes == 1
                else sum(-(-page.width * bits // 8) for bits in page.bits)
            )
            if row_bytes * page.height > len(self.data) - min(starts[:wanted]):
                raise DecodeError("is a truncated TIFF (its pixels are more than the file holds)")

    def alone(self, page: Page) -> bytes:
        """A TIFF of this page only, without what is beside its pixels.

        One further sample of unknown meaning is called alpha, because PIL would otherwise leave it
        out.
        """
        kept = sorted((tag, entry.raw) for tag, entry in page.entries.items() if tag in _PIXELS)
        if page.extra == (0,):
            layout, value = ("HHQHHI", 2) if self.big else ("HHIHH", 2)
            relabelled = struct.pack(
                self.order + layout, _EXTRA, 3, 1, value, *([0] * (len(layout) - 4))
            )
            kept = [(tag, relabelled if tag == _EXTRA else raw) for tag, raw in kept]
        place = len(self.data) + len(self.data) % 2
        count, end = (
            struct.pack(self.order + ("Q" if self.big else "H"), len(kept)),
            bytes(8 if self.big else 4),
        )
        head = (
            self.data[:8] + struct.pack(self.order + "Q", place)
            if self.big
            else (self.data[:4] + struct.pack(self.order + "I", place))
        )
        body = self.data[len(head) :] + bytes(place - len(self.data))
        return b"".join([head, body, count, *(raw for _, raw in kept), end])
