"""A file that is to be read, by its path or by its contents, and what readers of such have."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np

NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for who writes to it

Contents = str | bytes
"""A path, or all bytes of a file."""
Facts = tuple[int, int, int, str]
"""Height, width, channels and dtype name, as stored but upright."""


class Reader(NamedTuple):
    """What reads a format whose files may hold several images.  All raise DecodeError and OSError.

    Attributes:
        count: how many images a file holds; 0 where it is made for something else.
        probe: facts about the image of that number.
        read: (C, H, W) of it, given the channels that are wanted and ``max_pixels``; a masked array
            where the file says that there is no data.
    """

    count: Callable[[Contents], int]
    probe: Callable[[Contents, int], Facts]
    read: Callable[[Contents, int, int, int], np.ndarray]


class Piece(ABC):
    """An image that is read out of a file which holds more: a frame, a slice, a window."""

    path: str

    @abstractmethod
    def read(self, channels: int, max_pixels: int) -> tuple[np.ndarray, bool]:
        """(C, H, W), given the channels that are wanted, and whether the last is alpha.

        A masked array where there is no data.

        Raises:
            DecodeError: as `decode` does.
        """

    @abstractmethod
    def probe(self) -> Facts:
        """Facts of it; raises DecodeError."""


def open_regular(path: str) -> BinaryIO:
    """A file opened for reading; OSError for a pipe, a device or a folder, without waiting."""
    handle = open(path, "rb", opener=_opener)  # noqa: SIM115, half the time of Path.open
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError("it is a pipe, a device or a folder, not a file")
    return handle


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | NO_WAIT)


class Descriptor:
    """An opened file, as the ``number`` that `os.pread` takes; it closes when nobody holds this."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | NO_WAIT)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def open_stored(file: Contents) -> BinaryIO:
    """A file opened for reading; OSError as of `open_regular`."""
    return open_regular(file) if isinstance(file, str) else io.BytesIO(file)


def stored_size(handle: BinaryIO) -> int:
    """Bytes of an opened file, which is then at its beginning."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    return size


def mark_of(info: os.stat_result | None) -> list[int]:
    """What tells one state of a file from another: size, time of change, of its inode's, inode."""
    # A copy that keeps size and times (``rsync -a``) has another inode; what is written anew in
    # place has another time of the inode's change, which no program can set.
    if info is None:
        return [0, 0, 0, 0]
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino & (2**63 - 1)]
