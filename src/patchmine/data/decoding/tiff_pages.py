"""TIFF's directories: what every page says of itself, read within the file's length.

A page is handed on alone, with the tags that say how its pixels are stored: what is beside these
(EXIF, resolutions, profiles, further pages) can then neither break nor change what is read.
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
# Tags without which pixels cannot be read; those given by number are fill order, FAX options,
# predictor, palette, ink set, tables of JPEG and of LERC, YCbCr's constants.
_PIXELS = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _SAMPLES, _ROWS),
    *(_STRIP_BYTES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA, _FORMAT),
    *(266, 292, 293, 317, 320, 332, 347, *range(512, 522), *range(529, 533), 50674),
}
_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4"}
_TYPES |= {16: "u8", 17: "i8", 18: "u8"}
_SIZES = {2: 1, 5: 8, 7: 1, 10: 8, 11: 4, 12: 8}  # of types that hold no whole numbers
_TEXT = 2
_LONGEST_DESCRIPTION = 1 << 24
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_MASK_COLOUR = 4  # photometric interpretation of a transparency mask
_RAW = 1  # compression
_NODATA = 42113  # GDAL's: the value of pixels of which nothing is known, as text
_NUMBERS = {1: "u", 2: "i", 3: "f", 4: "u"}  # by sample format


class _Entry(NamedTuple):
    """``raw``: the whole entry, copied where the page is handed on; ``start``: of its values."""

    kind: int
    number: int
    raw: bytes
    start: int


@dataclass(frozen=True)
class Page:
    """One directory.

    ``bits`` of each sample, ``number_kind`` "u", "i" or "f", ``extra`` what further samples mean.
    ``is_full``: neither a reduced copy of another page nor a mask.  ``nodata``: "" where no value
    stands for that nothing is known.
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
    description: str
    nodata: str

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for pages that can be channels of one image."""
        return self.height, self.width, self.samples, self.bits, self.number_kind, self.photometric


def _damaged(reason: str, *, truncated: bool = True) -> DecodeError:
    return DecodeError(f"is a {'truncated or ' * truncated}damaged TIFF ({reason})")


class TiffFile:
    """The directories of a TIFF or BigTIFF, read as they are asked for; DecodeError for damage."""

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
            raise _damaged("it has no page")

    def _whole(self, letter: str, place: int) -> int:
        try:
            value: int = struct.unpack_from(self.order + letter, self.data, place)[0]
        except (struct.error, OverflowError) as error:
            raise _damaged("a directory lies outside of the file") from error
        return value

    def _directory(self, place: int) -> tuple[dict[int, _Entry], int]:
        """The entries of the directory at ``place``, and where the next one is."""
        size, inline, letter = (20, 8, "Q") if self.big else (12, 4, "I")
        count, place = self._whole("Q" if self.big else "H", place), place + (8 if self.big else 2)
        end = place + count * size
        if end > len(self.data):
            raise _damaged("a directory goes on behind the file's end")
        entries: dict[int, _Entry] = {}
        for at in range(place, end, size):
            tag, kind = struct.unpack_from(self.order + "HH", self.data, at)
            number, start = self._whole(letter, at + 4), at + size - inline
            width = np.dtype(_TYPES[kind]).itemsize if kind in _TYPES else _SIZES.get(kind, 1)
            if number * width > inline:
                start = self._whole(letter, start)
            entries.setdefault(tag, _Entry(kind, number, self.data[at : at + size], start))
        return entries, self._whole(letter, end) if end + inline <= len(self.data) else 0

    def _numbers(
        self, entries: dict[int, _Entry], tag: int, default: tuple[int, ...] = ()
    ) -> list[int]:
        """All values of a tag that holds whole numbers, ``default`` where it is not there."""
        entry = entries.get(tag)
        if entry is None or not entry.number:
            return list(default)
        if entry.kind not in _TYPES:
            raise _damaged(f"its tag {tag} holds no whole numbers", truncated=False)
        dtype = np.dtype(self.order + _TYPES[entry.kind])
        if entry.start + entry.number * dtype.itemsize > len(self.data):
            raise _damaged(f"its tag {tag} lies outside of the file")
        values: list[int] = np.frombuffer(self.data, dtype, entry.number, entry.start).tolist()
        return values

    def _page(self, entries: dict[int, _Entry]) -> Page:
        def one(tag: int, default: int) -> int:
            return self._numbers(entries, tag, (default,))[0]

        samples = one(_SAMPLES, 1)
        if not 1 <= samples <= 1 << 16:
            raise _damaged(f"it has {samples} samples for each pixel", truncated=False)
        bits = self._numbers(entries, _BITS, (1,))
        if (depth := one(_DEPTH, 1)) > 1:
            raise DecodeError(
                f"is a volume of {depth} planes in one TIFF page; store the planes as pages"
            )
        formats = set(self._numbers(entries, _FORMAT, (1,)))
        photometric, subfile = one(_PHOTOMETRIC, 1), one(_SUBFILE, 0)
        return Page(
            entries=entries,
            height=one(_HEIGHT, 0),
            width=one(_WIDTH, 0),
            samples=samples,
            bits=tuple(bits if len(bits) == samples else bits[:1] * samples),
            number_kind=_NUMBERS.get(formats.pop(), "") if len(formats) == 1 else "",
            photometric=photometric,
            planar=one(_PLANAR, 1),
            compression=one(_COMPRESSION, _RAW),
            extra=tuple(self._numbers(entries, _EXTRA)),
            orientation=self._orientation(entries),
            is_full=not subfile & (_REDUCED | _MASK)
            and one(_OLD_SUBFILE, 1) != 2
            and photometric != _MASK_COLOUR,
            description=self._text(entries, _DESCRIPTION),
            nodata=self._text(entries, _NODATA),
        )

    def _orientation(self, entries: dict[int, _Entry]) -> int:
        try:
            value = self._numbers(entries, _ORIENTATION, (1,))[0]
        except DecodeError:
            return 1
        return value if 1 <= value <= 8 else 1

    def _text(self, entries: dict[int, _Entry], tag: int) -> str:
        entry = entries.get(tag)
        if entry is None or entry.kind != _TEXT:
            return ""
        end = entry.start + min(entry.number, _LONGEST_DESCRIPTION)
        return self.data[entry.start : end].decode("utf-8", "replace").rstrip("\0")

    def check(self, page: Page, max_pixels: int, work: float) -> None:
        """DecodeError where a page is too large, or its parts are too few or too short for it."""
        stored = len(self.data)
        check_pixels(page.height, page.width, max_pixels, stored=stored, work=work)
        tiled = _TILES in page.entries
        if tiled:
            rows, columns = (
                self._numbers(page.entries, tag, (0,))[0] for tag in (_TILE_HEIGHT, _TILE_WIDTH)
            )
            check_pixels(rows, columns, max_pixels, stored=stored, work=work)
        else:
            rows, columns = self._numbers(page.entries, _ROWS, (page.height,))[0], page.width
            rows = min(rows or page.height, page.height)
        planes = page.samples if page.planar == 2 else 1
        wanted = math.ceil(page.height / rows) * math.ceil(page.width / columns) * planes
        starts = self._numbers(page.entries, _TILES if tiled else _STRIPS)
        sizes = self._numbers(page.entries, _TILE_BYTES if tiled else _STRIP_BYTES)
        if len(starts) < wanted:
            parts, size = "tiles" if tiled else "strips", f"{page.width}x{page.height}"
            raise _damaged(f"{len(starts)} {parts} where {size} pixels have {wanted}")
        if any(start >= stored for start in starts[:wanted]):
            raise DecodeError(
                "is a truncated TIFF (a part of its pixels lies behind the file's end)"
            )
        # A part of size 0 is empty on purpose.
        if page.compression == _RAW and not tiled and all(sizes[:wanted]):
            planar = [sum(page.bits)] if planes == 1 else page.bits
            row_bytes = sum(-(-page.width * bits // 8) for bits in planar)
            if row_bytes * page.height > stored - min(starts[:wanted]):
                raise DecodeError("is a truncated TIFF (its pixels are more than the file holds)")

    def alone(self, page: Page) -> bytes:
        """A TIFF of this page only, without what is beside its pixels.

        One further sample of unknown meaning is called alpha, because PIL would leave it out.
        """
        kept = {tag: page.entries[tag].raw for tag in sorted(page.entries) if tag in _PIXELS}
        if page.extra == (0,):
            layout = "HHQHHI" if self.big else "HHIHH"
            alpha = (2, *[0] * (len(layout) - 4))
            kept[_EXTRA] = struct.pack(self.order + layout, _EXTRA, 3, 1, *alpha)
        place = len(self.data) + len(self.data) % 2
        start, word, count = (8, "Q", "Q") if self.big else (4, "I", "H")
        head = self.data[:start] + struct.pack(self.order + word, place)
        body = self.data[len(head) :] + bytes(place - len(self.data))
        number, end = struct.pack(self.order + count, len(kept)), bytes(8 if self.big else 4)
        return b"".join([head, body, number, *kept.values(), end])
