"""HEIC and HEIF, as telephones write them, by the optional package pillow-heif."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from patchmine.data.decoding.bounds import check_pixels, decoding, missing

_BRANDS = {
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
    *(b"mif1", b"msf1", b"mif2"),
}
_AVIF = {b"avif", b"avis"}
_WORK = 14  # bytes for each pixel: planes, the packed picture, PIL's copy and the array
_CHANNELS = {"L": 1, "LA": 2, "La": 2, "RGB": 3, "RGBA": 4, "RGBa": 4}


def is_heif(data: bytes) -> bool:
    """By the brands that the file names first; AVIF, which PIL reads by itself, is none."""
    if data[4:8] != b"ftyp":
        return False
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    # The version stands at 4.
    brands = {box[place : place + 4] for place in range(0, len(box), 4) if place != 4}
    return bool(brands & _BRANDS) and not brands & _AVIF


def probe_heif(data: bytes) -> tuple[int, int, int, str]:
    """(height, width, channels, dtype name), upright; raises DecodeError."""
    with decoding("is no readable HEIF image"):
        image = _open(data)
        base, _, bits = str(image.mode).partition(";")
        return image.size[1], image.size[0], _CHANNELS[base], f"uint{bits or 8}"


def read_heif(data: bytes, max_pixels: int) -> np.ndarray:
    """(H, W, C) uint8 or uint16, turned as the file asks for; raises DecodeError."""
    height, width, channels, dtype = probe_heif(data)
    deep = 0 if dtype == "uint8" else 6 * channels
    check_pixels(height, width, max_pixels, stored=len(data), work=_WORK + deep)
    with decoding("is a truncated or damaged HEIF image"):
        array = np.asarray(_open(data))
    return array.reshape(height, width, channels)


def _open(data: bytes) -> Any:
    """The main picture, not read yet.  libheif turns it; EXIF does not count in HEIF."""
    try:
        import pillow_heif
    except ImportError as error:
        raise missing("an HEIF image (HEIC)", "pillow-heif", "pip install pillow-heif") from error
    return pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
