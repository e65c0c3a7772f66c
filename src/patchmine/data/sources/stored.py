"""A file of a source, wherever it lies, read at any place: what shards and Parquet are made of."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from patchmine.data.decoding.reading import Descriptor, mark_of, open_regular
from patchmine.data.sources import contract
from patchmine.data.sources import index as indices
from patchmine.errors import shown_name


class Readable(Protocol):
    """A file that stays open as long as somebody holds this."""

    @property
    def size(self) -> int:
        """Bytes that it has."""

    def read(self, start: int, length: int) -> bytes:
        """Bytes from ``start`` on, fewer where the file ends; OSError where it cannot be read."""


class Stored(Protocol):
    """A file as it was when its source was opened; picklable, hashable, safe after a fork."""

    @property
    def name(self) -> str:
        """Its path or address."""

    @property
    def buffer(self) -> int:
        """Bytes that are best read at once by who reads on and on."""

    def read(self, start: int, length: int) -> bytes:
        """As `Readable.read`, by one of few files that stay open."""

    def reader(self) -> Readable:
        """The file as it is now, opened for one pass over it."""

    def was_replaced(self) -> bool:
        """Whether another file stands there now."""

    def identity(self) -> bytes | None:
        """What tells its state from any other; None where nothing does."""


def opened(file: Stored) -> BinaryIO:
    """The file for one pass over it, with a position of its own that a fork does not share."""
    return io.BufferedReader(_Reading(file), file.buffer)


class _Reading(io.RawIOBase):
    """A stored file under a position."""

    def __init__(self, file: Stored) -> None:
        super().__init__()
        self._file, self._place = file.reader(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._place, len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = start + offset
        return self._place


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk, with the mark that it had (`mark_of`)."""

    path: Path
    mark: tuple[int, ...]
    buffer = io.DEFAULT_BUFFER_SIZE

    @property
    def name(self) -> str:
        """Its path."""
        return os.fspath(self.path)

    def read(self, start: int, length: int) -> bytes:
        """Bytes from ``start`` on; moves no position of the file."""
        return _opened(self).read(start, length)

    def reader(self) -> Readable:
        """The file as it is now."""
        return _OpenFile(self)

    def was_replaced(self) -> bool:
        """Whether another file stands there now, or stood there when it was opened."""
        return _opened(self).was_replaced

    def identity(self) -> bytes | None:
        """Place and mark of the file as it is now."""
        return indices.file_identity(os.fspath(self.path))


class _OpenFile(Descriptor):
    """A local file that is open."""

    def __init__(self, file: LocalFile) -> None:
        super().__init__(file.path)
        info = os.fstat(self.number)
        self.size = info.st_size
        size, modified, _, inode = mark_of(info)
        changed = file.mark[2]  # by a new mode or owner perhaps, which does no harm
        self.was_replaced = (size, modified, changed, inode) != file.mark

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self.number, length, start)


# Far below the usual limit of 1,024 files; forked processes may share them, since `pread` leaves no
# position behind.
_opened = lru_cache(maxsize=64)(_OpenFile)


def local_files(
    paths: Iterable[Path], name: str, noun: str
) -> tuple[list[LocalFile], indices.Marks]:
    """Files as they are now, and the marks that an index of them depends on.

    Raises:
        UserError: one of them cannot be read.
    """
    files, marks = list[LocalFile](), indices.Marks()
    for path in paths:
        place = os.fspath(path.resolve())
        try:
            with open_regular(os.fspath(path)) as handle:
                marks.note(place, os.fstat(handle.fileno()))
        except OSError as error:
            what = f"the {noun} {shown_name(path)} cannot be read ({error.strerror or error})"
            raise contract.data_error(name, what) from error
        files.append(LocalFile(path, tuple(marks.marks[place])))
    return files, marks
