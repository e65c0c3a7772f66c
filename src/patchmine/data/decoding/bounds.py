"""What reading one item may raise and may take: one error for damage, and a count of pixels before
any are made.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from PIL import Image

from patchmine.data.settings import MAX_PIXELS
from patchmine.errors import foreign_parser

PLAIN_WORK = 8
"""Bytes that decoding holds at its peak for a pixel of an 8-bit image: PIL keeps four, the array
three or four.
"""

EXPANSION, DOUBTED = 100, 1 << 29
"""A file of which one byte becomes more than so many may have been made to fill the memory, and
gets so many bytes.
"""

_STRIP_PIXELS = 1 << 22


class DecodeError(ValueError):
    """An item that is no image, a damaged one, or one whose channels do not fit the run."""


def check_pixels(
    height: int,
    width: int,
    max_pixels: int,
    *,
    stored: int,
    work: float = PLAIN_WORK,
    expansion: int = EXPANSION,
    doubted: int = DOUBTED,
) -> None:
    """Whether an image may be decoded, judged by its header.

    Args:
        height: in pixels, as is ``width``.
        max_pixels: the setting.
        stored: bytes of the file.
        work: bytes for each pixel that decoding holds at its peak.  A file of under a hundredth of
            what it would take (of an ``expansion``-th) is not believed beyond ``doubted`` bytes,
            half a gigabyte, unless ``max_pixels`` was raised above its default.

    Raises:
        DecodeError: for no pixels at all, or too many.
    """
    if height < 1 or width < 1:
        raise DecodeError(f"holds no pixels (its header says {width}x{height})")
    pixels = height * width
    if pixels > max_pixels:
        raise DecodeError(
            f"has {width}x{height} pixels, more than max_pixels={max_pixels} allows; set max_pixels={pixels} or more, "
            "or remove it"
        )
    peak = pixels * work
    if peak > max(doubted, expansion * stored) and max_pixels <= MAX_PIXELS:
        raise DecodeError(
            f"has {width}x{height} pixels that would take {peak / 1e6:,.0f} MB to decode from a file of "
            f"{stored / 1e6:.2g} MB; if it is sound set max_pixels={MAX_PIXELS + 1} or more, else remove it"
        )


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Around a foreign decoder: `damage`, and its warnings are not shown, because they do not name
    the file; the limit of pixels is ours, not PIL's.
    """
    bomb = Image.MAX_IMAGE_PIXELS
    with damage(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.MAX_IMAGE_PIXELS = None
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = bomb


def damage(what: str) -> AbstractContextManager[None]:
    """Around a foreign decoder that does not warn: whatever it raises is a DecodeError that says
    ``what`` and why.
    """
    return foreign_parser(
        lambda reason: DecodeError(f"{what} ({_without_place(reason)})"), DecodeError
    )


def _without_place(reason: str) -> str:
    """A reason without the place in a library's source that torchvision, torchcodec and FFmpeg name
    first or last.
    """
    return re.sub(r"^\S+, \S+\.cpp:\d+, |: '\w+\(\)'$|^\[Errno -?\d+\] ", "", reason)


def pixels_of(image: Image.Image, mode: str) -> np.ndarray:
    """(H, W) or (H, W, C) of a loaded image in a mode of PIL's, strip by strip: PIL would copy all
    of it twice.
    """
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    strips = (
        image.crop((0, top, width, min(top + rows, height))) for top in range(0, height, rows)
    )
    if rows >= height:
        return np.array(image if image.mode == mode else image.convert(mode))
    array, top = np.empty(0), 0
    for strip in strips:
        part = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        if not top:
            array = np.empty((height, *part.shape[1:]), part.dtype)
        array[top : top + len(part)] = part
        top += len(part)
    return array


@contextmanager
def reading_item() -> Iterator[None]:
    """The net below reading, decoding and cropping one item: what is neither OSError, DecodeError
    nor UserError (a fault in a data set of the user's, a MemoryError, a parser's oddity) is a
    DecodeError of this item.
    """
    with foreign_parser(
        lambda reason: DecodeError(f"cannot be read ({reason})"), DecodeError, OSError
    ):
        yield


def missing(what: str, package: str, command: str) -> DecodeError:
    """The error for a file of a kind that needs a package which is not installed."""
    return DecodeError(f"is {what} that needs the package {package}: {command}")


def install_command(reason: str) -> str | None:
    """The command that an error of `missing` ends with; None of any other reason."""
    found = re.search(r"needs the package \S+: (pip install .+)$", reason)
    return found[1] if found else None
