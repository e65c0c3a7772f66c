"""What reading one item may raise and may take: one error for damage, pixels counted beforehand."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from PIL import Image

from patchmine.data.settings import MAX_PIXELS
from patchmine.errors import UserError, foreign_parser, reason_of

PLAIN_WORK = 8
"""Bytes that decoding holds at its peak for a pixel of 8 bits: PIL keeps 4, the array 3 or 4."""

# A file of which one byte becomes more than so many may have been made to fill the memory, and gets
# so many bytes; frames are alike, so videos are smaller than images.
_EXPANSION, _DOUBTED = 100, 1 << 29
_FRAME_EXPANSION, _FRAMES_DOUBTED = 1000, 1 << 30
_FRAME_WORK = 6  # bytes for each pixel of a frame: the frame and its place among the others
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
    expansion: int = _EXPANSION,
    doubted: int = _DOUBTED,
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
    pixels, size = height * width, f"has {width}x{height} pixels"
    if pixels > max_pixels:
        raise DecodeError(
            f"{size}, more than max_pixels={max_pixels} allows; set max_pixels={pixels} or more, "
            "or remove it"
        )
    peak = pixels * work
    if peak > max(doubted, expansion * stored) and max_pixels <= MAX_PIXELS:
        raise DecodeError(
            f"{size} that would take {peak / 1e6:,.0f} MB to decode from a file of "
            f"{stored / 1e6:.2g} MB; if it is sound set max_pixels={MAX_PIXELS + 1} or more, else "
            "remove it"
        )


def check_frames(
    height: int | None, width: int | None, frames: int, max_pixels: int, stored: int
) -> None:
    """Whether so many frames may be decoded at once; a size no header states is the decoder's."""
    if height and width:
        bounds = {"expansion": _FRAME_EXPANSION, "doubted": _FRAMES_DOUBTED}
        work = _FRAME_WORK * frames
        check_pixels(height, width, max_pixels, stored=stored, work=work, **bounds)


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Around a foreign decoder: `damage`; its warnings, which name no file, are not shown.

    The limit of pixels is ours, not PIL's.
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
    """Around a foreign decoder that does not warn: what it raises becomes a DecodeError."""

    def refuse(reason: str) -> DecodeError:
        # Without the place in a library's source that torchvision and FFmpeg name first or last
        place = r"^\S+, \S+\.cpp:\d+, |: '\w+\(\)'$|^\[Errno -?\d+\] "
        return DecodeError(f"{what} ({re.sub(place, '', reason)})")

    return foreign_parser(refuse, DecodeError)


@contextmanager
def without_log(*names: str) -> Iterator[None]:
    """The logs of these libraries are not shown meanwhile, because they do not name the file."""
    levels = [(log, log.level) for log in map(logging.getLogger, names)]
    for log, _ in levels:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for log, level in levels:
            log.setLevel(level)


class reading_item:  # noqa: N801, a context as those of contextlib are
    """The net below reading, decoding and cropping one item.

    What is neither OSError, DecodeError nor UserError (a fault in a data set of the user's, a
    MemoryError, a parser's oddity) is a DecodeError of this item.  A class, which is entered once
    an image, takes a fifth of a generator's time.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(
            error, (UserError, DecodeError, OSError)
        ):
            raise DecodeError(f"cannot be read ({reason_of(error)})") from error


def pixels_of(image: Image.Image, mode: str) -> np.ndarray:
    """(H, W[, C]) of a loaded image in one of PIL's modes, by strips: PIL would copy all twice."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    if rows >= height:
        return np.array(image if image.mode == mode else image.convert(mode))
    array = np.empty(0)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        part = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        if not top:
            array = np.empty((height, *part.shape[1:]), part.dtype)
        array[top : top + len(part)] = part
    return array


def missing(what: str, package: str, command: str) -> DecodeError:
    """The error for a file of a kind that needs a package which is not installed."""
    return DecodeError(f"is {what} that needs the package {package}: {command}")


def install_command(reason: str) -> str | None:
    """The command that an error of `missing` ends with; None of any other reason."""
    found = re.search(r"needs the package \S+: (pip install .+)$", reason)
    return found[1] if found else None
