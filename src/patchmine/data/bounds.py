"""What reading one item may raise and may take: one error for damage, and a count of pixels before any are made."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image

from patchmine.errors import foreign_parser

MAX_PIXELS = 1 << 27
"""Default of ``max_pixels``: photographs of 108 megapixels pass, and decoding so many stays below a gigabyte."""

PLAIN_WORK = 8
"""Bytes that decoding holds at its peak for a pixel of an 8-bit image: PIL keeps four, the array three or four."""

_EXPANSION = 100  # decoded bytes for one of the file beyond which a file is suspected of being made to fill the memory


class DecodeError(ValueError):
    """An item that is no image, a damaged one, or one whose channels do not fit the run."""


def check_pixels(height: int, width: int, max_pixels: int, *, stored: int, work: float = PLAIN_WORK) -> None:
    """Whether an image may be decoded, judged by its header.

    Args:
        height: in pixels, as is ``width``.
        max_pixels: the setting.
        stored: bytes of the file.
        work: bytes for each pixel that decoding holds at its peak.  A file of under a hundredth of what it would take
            is not believed beyond a gigabyte, unless ``max_pixels`` was raised above its default.

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
    if peak > PLAIN_WORK * MAX_PIXELS and peak > _EXPANSION * stored and max_pixels <= MAX_PIXELS:
        raise DecodeError(
            f"has {width}x{height} pixels that would take {peak / 1e6:,.0f} MB to decode from a file of "
            f"{stored / 1e6:.2g} MB; if it is sound set max_pixels={MAX_PIXELS + 1} or more, else remove it"
        )


@contextmanager
def decoding(what: str, clean: Callable[[str], str] = str) -> Iterator[None]:
    """Around a foreign decoder: whatever it raises is a DecodeError that says ``what`` and why; its warnings are not
    shown, because they do not name the file; and the limit of pixels is ours, not PIL's.  ``clean`` shortens the why.
    """

    tifffile_log = logging.getLogger("tifffile")
    level, bomb = tifffile_log.level, Image.MAX_IMAGE_PIXELS
    with (
        foreign_parser(lambda reason: DecodeError(f"{what} ({clean(reason)})"), DecodeError),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            Image.MAX_IMAGE_PIXELS = None
            tifffile_log.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = bomb
            tifffile_log.setLevel(level)


@contextmanager
def reading_item() -> Iterator[None]:
    """The net below reading, decoding and cropping one item: what is neither OSError, DecodeError nor UserError (a
    fault in a data set of the user's, a MemoryError, a parser's oddity) is a DecodeError of this item.
    """
    with foreign_parser(lambda reason: DecodeError(f"cannot be read ({reason})"), DecodeError, OSError):
        yield


def missing(what: str, package: str, command: str) -> DecodeError:
    """The error for a file of a kind that needs a package which is not installed."""
    return DecodeError(f"is {what} that needs the package {package}: {command}")


def install_command(reason: str) -> str | None:
    """The command that an error of `missing` ends with; None of any other reason."""
    found = re.search(r"needs the package \S+: (pip install .+)$", reason)
    return found[1] if found else None
