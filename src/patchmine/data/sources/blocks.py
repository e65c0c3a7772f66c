"""Parts of remote files kept on a disk: shared by processes and runs, whole or not there.

Every part is a file of its own, which takes its place by a rename, with a checksum behind it of
every 64 kB.  So a process that is killed leaves nothing that is read, no lock is needed, and a
small piece is known to be sound without reading the rest.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from patchmine.data.decoding.reading import Descriptor
from patchmine.errors import shown_name
from patchmine.system.disk import leaves_room, remedy

log = logging.getLogger(__name__)

_Place = tuple[str, int]  # a file's key, and the number of a part

UNUSED = 86_400.0
"""Seconds after which the parts of a file that nobody read may give way to others."""

_CHUNK = 1 << 16  # bytes that have a checksum
_SUM = 4  # bytes of one
_LOTS = 64  # the share of the room that a process takes before it looks again how much there is
_MOST_OPEN = 64  # files
_TOLD = 600.0  # seconds after which a file is marked as used again


@dataclass
class Blocks:
    """Numbered parts of files, below ``folder`` (None: nothing is kept), ``limit`` bytes in all.

    When that is reached, files that were not used for a day give way; where there are none, nothing
    more is kept: of a random order any part is as good as any other.
    """

    folder: Path | None
    limit: int
    _room: int = 0
    _full: bool = False
    _open: OrderedDict[_Place, _OpenPart] = field(default_factory=OrderedDict)
    _sums: dict[_Place, _Sums] = field(default_factory=dict)
    _used: dict[str, float] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, key: str, number: int, size: int, start: int, length: int) -> bytes | None:
        """Bytes of a part of ``size`` bytes; None where it is not kept."""
        place = (key, number)
        part = self._open.get(place) or self._opened(place, size)
        if part is None:
            return None
        self._open.move_to_end(place)
        sums = part.sums
        try:
            if sums.are_known(start, start + length):
                data = os.pread(part.number, length, start)
                return data if len(data) == length else None
            first = start // _CHUNK * _CHUNK
            last = min(size, -(-(start + length) // _CHUNK) * _CHUNK)
            data = os.pread(part.number, last - first, first)
        except OSError:  # of the disk: it is fetched again
            return None
        if not sums.fit(data, first):
            self._forget(place)
            return None
        return data[start - first : start - first + length]

    def holds(self, key: str, number: int, size: int) -> bool:
        """Whether a part of ``size`` bytes is there; its checksum is not looked at."""
        if self.folder is None:
            return False
        try:
            return (self.folder / key / str(number)).stat().st_size == size + _table_size(size)
        except OSError:
            return False

    def takes(self, size: int) -> bool:
        """Whether so many bytes would be kept."""
        if self._room < size and not self._full:
            lot = max(size, self.limit // _LOTS)
            try:
                self._room, self._full = lot, not self._has_room(lot)
            except OSError as error:
                self._stop(error)
        return not self._full

    def keep(self, key: str, number: int, data: bytes) -> None:
        """Keep a part, if there is room on the disk."""
        if self.folder is None or self._full:
            return
        file = self.folder / key / str(number)
        own = f"{os.getpid()}-{threading.get_ident()}"
        temporary = file.with_name(f".{number}.{own}.new")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as out:
                    out.write(data)
                    out.write(_table(data))
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._stop(error)
        self._room -= len(data)

    def _opened(self, place: _Place, size: int) -> _OpenPart | None:
        if self.folder is None:
            return None
        key, number = place
        try:
            part = _OpenPart(self.folder / key / str(number))
            if place not in self._sums:
                table = os.pread(part.number, _table_size(size) + 1, size)
                if len(table) != _table_size(size) or _sum(table[:-_SUM]) != table[-_SUM:]:
                    self._forget(place)
                    return None
                self._sums[place] = _Sums(table)
            self._mark_used(key)
        except OSError:
            return None
        part.sums = self._sums[place]
        self._open[place] = part
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return part

    def _forget(self, place: _Place) -> None:
        """Remove a part that is not whole."""
        self._open.pop(place, None)
        self._sums.pop(place, None)
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / place[0] / str(place[1])).unlink()

    def _mark_used(self, key: str) -> None:
        now = time.monotonic()
        if self.folder is not None and now - self._used.get(key, -_TOLD) >= _TOLD:
            self._used[key] = now
            os.utime(self.folder / key)

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes fit, after the files that were not used for longest are removed."""
        if self.folder is None:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        found = sorted(_sizes(self.folder))
        total, oldest = sum(each for _, each, _ in found), time.time() - UNUSED
        for used, taken, place in found:
            if used > oldest or (total + size <= self.limit and leaves_room(self.folder, size)):
                break
            shutil.rmtree(place, ignore_errors=True)
            total -= taken
        return total + size <= self.limit and leaves_room(self.folder, size)

    def _stop(self, error: OSError) -> None:
        self._full = True
        what = "cannot keep what is fetched (%s); %s: it is fetched each time"
        log.warning(
            f"the cache %s {what}", shown_name(self.folder or ""), error.strerror, remedy(error)
        )


class _OpenPart(Descriptor):
    """A part that is open, and its checksums."""

    sums: _Sums


class _Sums:
    """The checksums of one part, and which of them were found to fit."""

    def __init__(self, table: bytes) -> None:
        self._table, self._known = table, bytearray(len(table) // _SUM - 1)

    def are_known(self, start: int, end: int) -> bool:
        """Whether all that lies between was found to fit."""
        first, last = start // _CHUNK, (end - 1) // _CHUNK
        return bool(self._known[last]) if first == last else all(self._known[first : last + 1])

    def fit(self, data: bytes, start: int) -> bool:
        """Whether whole chunks, the first of which begins at ``start``, fit."""
        first = start // _CHUNK
        end = first + -(-len(data) // _CHUNK)
        self._known[first:end] = b"\1" * (end - first)
        return _table(data)[:-_SUM] == self._table[first * _SUM : end * _SUM]


def _sum(data: bytes | memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(_SUM, "little")


def _table(data: bytes) -> bytes:
    """The checksums of all chunks, and their own."""
    view = memoryview(data)
    table = b"".join(_sum(view[start : start + _CHUNK]) for start in range(0, len(data), _CHUNK))
    return table + _sum(table)


def _table_size(size: int) -> int:
    return _SUM * (-(-size // _CHUNK) + 1)


def _sizes(folder: Path) -> list[tuple[float, int, str]]:
    """When each remote file's parts were used last, their bytes, and their folder."""
    found = []
    for entry in os.scandir(folder):
        size = 0
        with suppress(FileNotFoundError, NotADirectoryError):  # what other processes rename, remove
            used = entry.stat().st_mtime
            for part in os.scandir(entry.path):
                with suppress(FileNotFoundError):
                    size += part.stat().st_size
            found.append((used, size, entry.path))
    return found
