"""FITS, by astropy: the planes of the first image in a file, the last row at the top.

Values are those that BSCALE and BZERO make of them; BLANK and NaN say where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from patchmine.data.decoding.arrays import with_gaps
from patchmine.data.decoding.bounds import DecodeError, check_pixels, decoding, without_log
from patchmine.data.decoding.reading import Contents, Facts, Reader, open_stored, stored_size

SUFFIXES, MAGIC = (".fits", ".fit", ".fts", ".fz"), ((0, b"SIMPLE  ="),)
_DAMAGED = "is a truncated or damaged FITS file"
_WORK = 20  # bytes for each pixel: what is stored, doubles, floats
_MOST_HDUS = 1000


def count(file: Contents) -> int:
    """How many planes the first image has; 0 of tables.  DecodeError for damage."""
    with _opened(file) as (image, stored):
        return 0 if image is None else _planes(image, stored)


def probe(file: Contents, number: int) -> Facts:
    """(height, width, channels, dtype name) of a plane; DecodeError."""
    with _opened(file) as (image, _):
        del number  # all are alike
        return _facts(image)


def read(file: Contents, number: int, _: int, max_pixels: int) -> np.ndarray:
    """(1, H, W) uint8 or float32 of a plane, masked where it has no values; DecodeError."""
    with _opened(file) as (image, stored):
        height, width, _channels, dtype = _facts(image)
        check_pixels(height, width, max_pixels, stored=stored, work=_WORK)
        if number >= _planes(image, stored):
            raise DecodeError(f"has no plane {number} any more; it has changed since it was listed")
        place = np.unravel_index(number, image.shape[:-2])
        plane = np.asarray(image.section[(*map(int, place), slice(None), slice(None))])
        if plane.shape != (height, width):
            raise DecodeError(f"{_DAMAGED} (a plane has shape {plane.shape})")
        values = np.ascontiguousarray(plane[None, ::-1], dtype)
    return values if dtype == "uint8" else with_gaps(values, ~np.isfinite(values))


@contextmanager
def _opened(file: Contents) -> Iterator[tuple[Any, int]]:
    """The first image in a file (None where there is none) and the bytes of the file."""
    from astropy.io import fits

    with open_stored(file) as handle, decoding(_DAMAGED), without_log("astropy"):
        stored = stored_size(handle)
        with fits.open(handle, memmap=False, lazy_load_hdus=True, cache=False) as parts:
            yield _image(parts), stored


def _image(parts: Any) -> Any:
    for number in range(_MOST_HDUS):
        try:
            part = parts[number]
        except IndexError:
            return None
        if part.is_image and len(part.shape) >= 2 and min(part.shape[-2:]) > 1:
            return part
    return None


def _planes(image: Any, stored: int) -> int:
    planes = math.prod(image.shape[:-2])
    packed = type(image).__name__ == "CompImageHDU"
    least = 1 if packed else math.prod(image.shape[-2:]) * abs(int(image.header["BITPIX"])) // 8
    if planes * least > stored:
        raise DecodeError(f"{_DAMAGED} (shape {image.shape} is more than it has room for)")
    return planes


def _facts(image: Any) -> Facts:
    if image is None:
        raise DecodeError("is a FITS file without an image")
    height, width = image.shape[-2:]
    stated = (image.header.get(name) for name in ("BITPIX", "BSCALE", "BZERO", "BLANK"))
    plain = tuple(stated) in {(8, None, None, None), (8, 1, 0, None)}
    return height, width, 1, "uint8" if plain else "float32"


READER = Reader(count, probe, read)
