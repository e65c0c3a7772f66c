"""What a source of images is, and how class names become numbers."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from patchmine.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".npy"),
    *(".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs", ".heic", ".heif", ".hif"),
)
"""Endings (in any case) by which a file counts as an image; ``data.members`` has the whole rule."""


@dataclass(frozen=True)
class Kind:
    """What a source is of.  ``name``: "image" or "video", for messages and for the names of kept
    indices.

    ``suffixes``: endings (in any case) by which a file counts; ``read``: from a file's path to the
    raw item; ``folders``: looks at a folder that a list names as one item, and tells reason and
    name of what it passes over there; None where a folder is no item.  ``chosen``: whether the user
    named the endings, so that a file without one does not count.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[str], Any]
    folders: Callable[[str, Callable[[str, str], None]], Any] | None = None
    chosen: bool = False


def open_regular(path: str) -> BinaryIO:
    """A file opened for reading.  OSError for a pipe, a device or a folder, none of which is waited
    for.
    """
    handle = open(path, "rb", opener=_without_waiting)  # noqa: SIM115, half the time of Path.open
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError("it is a pipe, a device or a folder, not a file")
    return handle


def _without_waiting(path: str, flags: int) -> int:
    return os.open(
        path, flags | getattr(os, "O_NONBLOCK", 0)
    )  # opening a pipe waits for who writes to it


def contents(path: str) -> bytes:
    """All bytes of a file of one image.  OSError as of `open_regular`, and for what no image can be
    so large as.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > LARGEST:
            raise OSError(f"it has {size / 1e9:,.1f} GB, more than a file of one image may have")
        return handle.read()


LARGEST = 4 << 30
"""Bytes of a file that is read as one image."""

IMAGES = Kind("image", IMAGE_SUFFIXES, contents)


@dataclass(frozen=True)
class Labels:
    """``ids`` (N,) int64, the class of every item; ``names[id]`` is what the class is called, in
    sorted order.

    Two sets of the same classes number them alike; of sets that may lack a class, use
    :meth:`numbered_as`.
    """

    ids: NDArray[np.int64]
    names: list[str]

    def numbered_as(self, names: list[str]) -> NDArray[np.int64]:
        """(N,) int64: the same classes as places in ``names``.  UserError when ``names`` lacks one."""
        place = {name: number for number, name in enumerate(names)}
        strangers = [name for name in self.names if name not in place]
        if strangers:
            raise UserError(
                f"the class {strangers[0]!r} ({len(strangers)} such) is not among the {len(names)} known ones, for "
                f"instance {names[0]!r}: give two data sets that name their classes alike"
            )
        return np.array([place[name] for name in self.names], np.int64)[self.ids]


class Source(Protocol):
    """A numbered collection of raw images: picklable, cheap to send to a worker, safe after a fork.

    A source may also have ``key(index) -> str``, the item's name inside the source, and ``notes:
    tuple[str, ...]``, sentences about what is wrong with it although it can be used.
    """

    @property
    def name(self) -> str:
        """What the user typed, for messages."""

    @property
    def fingerprint(self) -> str:
        """Changes when the list of items changes."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """The raw item: encoded bytes, array, tensor or PIL image, or a video.  OSError when it
        cannot be read.
        """

    def path(self, index: int) -> str:
        """A name for people."""

    def labels(self) -> Labels | None:
        """The classes, worked out when asked; None when there are none."""


def key_of(source: Source, index: int) -> str:
    """The item's name inside its source (``cat/7.jpg``); its path where the source knows no other."""
    key: str = getattr(source, "key", source.path)(index)
    return key


def notes_of(source: Source) -> tuple[str, ...]:
    """What is wrong with a source that can nevertheless be used."""
    notes: tuple[str, ...] = getattr(source, "notes", ())
    return notes


class ClassNames:
    """Collects one class name per item, in 4 bytes each."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._ids = array("i")

    def __len__(self) -> int:
        return len(self._ids)

    def names(self) -> list[str]:
        """All classes so far, in the order of their first items."""
        return list(self._numbers)

    def add(self, name: str) -> None:
        """The next item's class."""
        self._ids.append(self._numbers.setdefault(name, len(self._numbers)))

    def finish(self) -> Labels:
        """Classes numbered in the order of their names; names that are all whole numbers are
        ordered as numbers.
        """
        names = sorted(
            self._numbers, key=int if all(name.isdecimal() for name in self._numbers) else None
        )
        rank = {name: number for number, name in enumerate(names)}
        renumber = np.array([rank[name] for name in self._numbers], np.int64)
        ids = np.frombuffer(self._ids, dtype=np.int32)
        return Labels(renumber[ids] if len(names) else np.zeros(0, np.int64), names)


def fingerprint_of(parts: Iterable[bytes | NDArray[Any]]) -> str:
    """32 hexadecimal digits that stand for the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
        digest.update(b"|")
    return digest.hexdigest()[:32]
