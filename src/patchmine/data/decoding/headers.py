"""What JPEG, PNG and WebP files say before their pixels: size, orientation, what is beside them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.orientation import exif_orientation

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SOI, _EOI, _SOS, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE1, 0xEE
_ALONE = (0x01, *range(0xD0, 0xD8))  # markers without a segment
_FRAMES = tuple(sorted({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}))  # SOF0 to SOF15
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_BASELINE = (0xC0, 0xC1)  # and extended: sequential, by Huffman
_PROFILE = b"Raw profile type exif\0"  # under which ImageMagick keeps EXIF as hexadecimal text
_LONGEST_PROFILE = 1 << 18  # bytes of it that are looked at, zipped or not


class JpegHeader(NamedTuple):
    """What a JPEG says of its picture.

    ``progressive``: the coefficients of the whole picture are kept in decoding.  ``rows_at``: where
    the height stands in the file.  ``by_rows``: one scan holds everything, from top to bottom.
    """

    height: int
    width: int
    components: int
    orientation: int
    progressive: bool
    rows_at: int
    by_rows: bool

    def least_rows(self, wanted: int | None) -> int:
        """Rows that must be decoded to have the first ``wanted``, of None all."""
        return min(wanted or self.height, self.height) if self.by_rows else self.height


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Everything up to the first scan, as libjpeg goes through it; takes about 10 microseconds."""
    frame, orientation, together = None, 1, 0
    for marker, start, end in _segments(data):
        if marker in _FRAMES and frame is None and min(end, len(data)) - start >= 6:
            frame = (*struct.unpack_from(">HHB", data, start + 1), marker, start + 1)
        elif marker == _SOS and start < len(data):
            together = data[start]
        elif marker == _APP1 and orientation == 1 and data.startswith(b"Exif\0", start):
            orientation = exif_orientation(data[start + 6 : end])
    if frame is None:
        raise DecodeError("is a truncated or damaged JPEG (it describes no picture)")
    height, width, components, marker, rows_at = frame
    by_rows = marker in _BASELINE and together == components
    progressive = marker in _PROGRESSIVE
    return JpegHeader(height, width, components, orientation, progressive, rows_at, by_rows)


def first_rows(data: bytes, header: JpegHeader, rows: int) -> bytearray:
    """A copy of a JPEG that says it has so many rows, so that libjpeg decodes no more.

    The rest of the scan it passes over, up to the end marker, which must be there as before.
    """
    shorter = bytearray(data)
    struct.pack_into(">H", shorter, header.rows_at, rows)
    return shorter


def plain_jpeg(data: bytes, rows: int | None = None) -> bytes:
    """The same picture without what is beside it, at which PIL may stumble.

    ``rows``: as of `first_rows`; None: all of them.
    """
    kept: list[bytes | bytearray | memoryview] = [data[:2]]
    for marker, start, end in _segments(data):
        if marker == _SOS:
            return b"".join([*kept, memoryview(data)[start - 4 :]])
        if marker == _APP14 or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[start - 4 : end])
            if marker in _FRAMES and rows is not None and end - start >= 6:
                head = bytearray(kept[-1])
                struct.pack_into(">H", head, 5, rows)
                kept[-1] = head
    return data


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment's contents, up to the head of the first scan."""
    place = 2
    while (place := data.find(b"\xff", place) + 1) and place + 2 < len(data):
        marker = data[place]
        if marker in (0x00, 0xFF) or marker in _ALONE:  # stuffing, filling
            continue
        if marker in (_SOI, _EOI):
            return
        start, length = place + 3, data[place + 1] << 8 | data[place + 2]
        yield marker, start, place + 1 + length
        if marker == _SOS:
            return
        place += 1 + max(2, length)


class PngHeader(NamedTuple):
    """``colour``: the colour type; ``plain``: the file without what is beside its pixels."""

    height: int
    width: int
    bits: int
    colour: int
    orientation: int
    plain: bytes

    @property
    def is_deep(self) -> bool:
        """16 bits in colour or with alpha; 16-bit grey PIL reads by itself."""
        return self.bits == 16 and self.colour != 0


def read_png_header(data: bytes) -> PngHeader:
    """One pass over the chunks, of which only EXIF is looked at, for its orientation."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise DecodeError("is a truncated or damaged PNG (its first chunk is cut off or another)")
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    orientation, kept, place = 1, [data[:33]], 33
    start_kept = place
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        if not (kind[0] & 0x20) or kind == b"tRNS":  # upper case: pixels cannot be read without it
            if kind == b"IEND":
                break
            place = end
            continue
        kept.append(data[start_kept:place])
        if orientation == 1:
            content = data[place + 8 : min(end - 4, place + 8 + _LONGEST_PROFILE)]
            orientation = _png_orientation(kind, content)
        place = start_kept = end
    plain = data if len(kept) == 1 else b"".join([*kept, data[start_kept:]])
    return PngHeader(height, width, bits, colour, orientation, plain)


def _png_orientation(kind: bytes, content: bytes) -> int:
    if kind == b"eXIf":
        return exif_orientation(content)
    if kind not in (b"tEXt", b"zTXt") or not content.startswith(_PROFILE):
        return 1
    text = content[len(_PROFILE) :]
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], _LONGEST_PROFILE)
        return exif_orientation(bytes.fromhex(text.decode("ascii").strip().split("\n", 2)[2]))
    except (zlib.error, ValueError, IndexError):
        return 1


def webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a WebP file, for whose canvas PIL takes memory as soon as it opens it."""
    kind, place = data[12:16], 20
    if len(data) >= 30:
        if kind == b"VP8X":
            width, height = data[place + 4 : place + 7], data[place + 7 : place + 10]
            return int.from_bytes(height, "little") + 1, int.from_bytes(width, "little") + 1
        if kind == b"VP8 ":
            both = struct.unpack_from("<HH", data, place + 6)
            return both[1] & 0x3FFF, both[0] & 0x3FFF
        if kind == b"VP8L":
            packed = int.from_bytes(data[place + 1 : place + 5], "little")
            return (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
    raise DecodeError("is a truncated or damaged WebP file (its first chunk is cut off or unknown)")


def is_webp(data: bytes) -> bool:
    """By its first bytes."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"
