"""JPEG 2000 that PIL would cut or refuse: colour of more than 8 bits, other bands than RGB."""

from __future__ import annotations

import struct
from contextlib import closing
from typing import NamedTuple

import numpy as np

from patchmine.data.decoding.bounds import DecodeError, check_pixels
from patchmine.data.decoding.rasters import JPEG_2000, open_raster
from patchmine.data.decoding.reading import Facts

_BOXES, _STREAM = b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"  # a file of boxes, or bare
_SIZE = struct.Struct(">4xHH8I H")  # of the stream's first segment, up to the number of components
_MOST_COMPONENTS = 16_384  # that the standard has
_GREY, _YCC_AND_RGB = 17, (12, 16, 18)  # enumerated colour spaces; 12 is CMYK
_OPACITY = (1, 2)  # kinds of a component in a channel definition
_LOOKED_AT = 1 << 16  # bytes of a box: the first segment of a stream may have as many
_WORK = 8  # bytes for each value: as GDAL decodes it, as it is handed out, as a float


class Header(NamedTuple):
    """What the header says.

    Attributes:
        height: of the image, as is ``width``.
        bits: the most that a component has.
        signed: whether one has a sign.
        components: how many, ``alpha`` of them opacity.
        colour: the enumerated colour space, None where there is none.
    """

    height: int
    width: int
    bits: int
    signed: bool
    components: int
    alpha: int = 0
    colour: int | None = None

    @property
    def suits_pil(self) -> bool:
        """Whether PIL gives every value as it is stored."""
        if self.signed or self.components > 4:
            return False
        if self.bits > 8:
            return self.bits == 16 and self.components == 1
        fitting = (_GREY,) if self.components < 3 else _YCC_AND_RGB
        return self.colour is None or self.colour in fitting


def is_beyond_pil(data: bytes) -> bool:
    """Whether this is a JPEG 2000 that only rasterio reads as it is stored."""
    if not data.startswith((_BOXES, _STREAM)):
        return False
    try:
        return not read_header(data).suits_pil
    except DecodeError:
        return False  # PIL says what is wrong with it


def probe(data: bytes) -> Facts:
    """Facts of such a file; raises DecodeError."""
    header = read_header(data)
    size = 8 if header.bits <= 8 else 16 if header.bits <= 16 else 32
    kind = f"{'' if header.signed else 'u'}int{size}"
    return header.height, header.width, header.components - header.alpha, kind


def read(data: bytes, max_pixels: int) -> np.ndarray:
    """(C, H, W) of such a file without opacity, masked where that is none; raises DecodeError."""
    header = read_header(data)
    work = _WORK * header.components
    check_pixels(header.height, header.width, max_pixels, stored=len(data), work=work)
    with closing(open_raster(data, JPEG_2000)) as scene:
        if (scene.height, scene.width) != (header.height, header.width):
            raise DecodeError("is a damaged JPEG 2000 (its header names two sizes)")
        return scene.window((0, 0, scene.height, scene.width))[0]


def read_header(data: bytes) -> Header:
    """The size and the components of a JPEG 2000; raises DecodeError."""
    if data.startswith(_STREAM):
        return _of_stream(data)
    found = _boxes(data)
    if b"jp2c" not in found:
        raise DecodeError("is a truncated or damaged JPEG 2000 (no image in it)")
    header = _of_stream(found[b"jp2c"])
    about = _boxes(found.get(b"jp2h", b""))
    colour, channels = about.get(b"colr", b""), about.get(b"cdef", b"")
    if b"pclr" in about:
        return header  # a palette, which PIL knows
    if len(colour) >= 7 and colour[0] == 1:
        header = header._replace(colour=int.from_bytes(colour[3:7], "big"))
    pairs = struct.iter_unpack(">HHH", channels[2 : len(channels) // 6 * 6 + 2])
    alpha = sum(kind in _OPACITY for _, kind, _ in pairs)
    return header._replace(alpha=min(alpha, header.components - 1))


def _boxes(data: bytes) -> dict[bytes, bytes]:
    """What the boxes that follow each other begin with, by kind; of several the first."""
    found, start = dict[bytes, bytes](), 0
    while start + 8 <= len(data):
        length, kind, begin = *struct.unpack_from(">I4s", data, start), 8
        if length == 1:
            length, begin = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        end = start + length if length else len(data)  # 0: all that is left
        if end < start + begin:
            break
        found.setdefault(kind, data[start + begin : min(end, start + _LOOKED_AT)])
        start = end
    return found


def _of_stream(data: bytes) -> Header:
    try:
        _, _, right, bottom, left, top, *_, count = _SIZE.unpack_from(data)
        depths = data[_SIZE.size : _SIZE.size + 3 * count : 3]
    except struct.error:
        raise DecodeError("is a truncated JPEG 2000") from None
    if not data.startswith(_STREAM) or not 0 < count <= _MOST_COMPONENTS or len(depths) < count:
        raise DecodeError("is a truncated or damaged JPEG 2000")
    bits = max((depth & 0x7F) + 1 for depth in depths)
    signed = any(depth & 0x80 for depth in depths)
    return Header(max(bottom - top, 0), max(right - left, 0), bits, signed, count)
