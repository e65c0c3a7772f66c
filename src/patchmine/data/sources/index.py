"""A list of a million items in little memory, kept in one file between runs and memory-mapped from
there.

A Python list of paths costs 100 bytes an item and more, and is copied into every worker, reference
count by reference count.  Here the paths are one run of bytes with offsets, beside numeric columns.

A kept index is used only where nothing speaks against it: its checksum fits, it was made by the
same rule, and every folder or file that it was made of bears the mark that it had.  Else it is made
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from patchmine.disk import replacing
from patchmine.errors import UserError, shown_name

log = logging.getLogger(__name__)

VERSION = b"patchmine index 3\n"
"""The first bytes of the file.  Raised whenever an index written before would be read wrongly."""

RECENT = 2_000_000_000
"""Nanoseconds: what changed so shortly before it was listed could change again without a new time
stamp.
"""

_DIGEST = (
    16  # bytes of the checksum, which stands behind the version and is over all that follows it
)
_ALIGNED = 64


@dataclass
class Index:
    """Paths and columns of N items.

    ``columns``: ``blob`` (bytes of all paths, one after the other), ``offsets`` (N + 1,), and what
    a source adds. ``stamp``: small JSON facts.  ``file``: where the index lies, once saved; a saved
    index is pickled by its name.
    """

    columns: dict[str, NDArray[Any]]
    stamp: dict[str, Any]
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.columns["offsets"]) - 1

    def path(self, number: int) -> str:
        """The path of one item; IndexError outside 0..N-1."""
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        start, end = self.columns["offsets"][number : number + 2]
        return os.fsdecode(self.columns["blob"][start:end].tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is None:
            return Index, (self.columns, self.stamp, None)
        return _reload, (self.file, self.stamp)


class PathList:
    """Collects paths without making a Python object of each."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._blob[self._offsets[number] : self._offsets[number + 1]])

    def add(self, path: bytes) -> None:
        """One more path, as ``os.fsencode`` writes it."""
        self._blob += path
        self._offsets.append(len(self._blob))

    def columns(self) -> dict[str, NDArray[Any]]:
        """``blob`` and ``offsets`` of an index."""
        return {
            "blob": np.frombuffer(self._blob, np.uint8),
            "offsets": np.frombuffer(self._offsets, np.int64),
        }


def mark_of(info: os.stat_result) -> list[int]:
    """What tells one state of a file from another: size, time of change, time of its inode's
    change, inode.

    A copy that keeps names, sizes and times (``rsync -a``, ``tar x``) has another inode, and what
    is written anew in place has another time of the inode's change, which no program can set.
    """
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino & (2**63 - 1)]


def is_recent(info: os.stat_result, now: int) -> bool:
    """Whether something changed so shortly before ``now`` (nanoseconds) that its mark may stand for
    two states.
    """
    return max(info.st_mtime_ns, info.st_ctime_ns) >= now - RECENT


def index_file(cache_dir: Path, kind: str, place: str) -> Path:
    """Where the index of the folder, list or set of shards at ``place`` is kept."""
    return (
        cache_dir
        / f"{kind}-{hashlib.sha256(place.encode('utf-8', 'surrogateescape')).hexdigest()[:20]}.index"
    )


def save(index: Index, file: Path) -> Index:
    """Writes the index and gives its memory-mapped twin; where it cannot be written, says so and
    gives it back.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb+") as out:
            _write(out, index)
    except OSError as error:
        log.warning(
            "the index %s could not be kept (%s); it will be made again next time",
            shown_name(file),
            error.strerror,
        )
        return index
    return load(file) or index


def load(file: Path) -> Index | None:
    """The index in a file, memory-mapped; None where there is none, it is damaged, or of another
    version.
    """
    try:
        if not file.is_file():  # a pipe of that name would be waited for
            return None
        data = np.memmap(file, np.uint8, "r")
        start = len(VERSION) + _DIGEST
        if data[: len(VERSION)].tobytes() != VERSION:
            return None
        if (
            hashlib.blake2b(data[start:].data, digest_size=_DIGEST).digest()
            != data[len(VERSION) : start].tobytes()
        ):
            return None
        return _read(np.asarray(data), start, file)  # a plain view: slicing a memmap itself is slow
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(data: NDArray[np.uint8], start: int, file: Path) -> Index:
    """An index whose checksum fits: length of the head, the head, then the columns, each at a
    multiple of 64 bytes.
    """
    length = int.from_bytes(data[start : start + 8].tobytes(), "little")
    head = json.loads(data[start + 8 : start + 8 + length].tobytes())
    place, columns = start + 8 + length, dict[str, NDArray[Any]]()
    for name, dtype, count in head["columns"]:
        place += -place % _ALIGNED
        end = place + count * np.dtype(dtype).itemsize
        columns[name] = data[place:end].view(dtype)
        place = end
    return Index(columns, head["stamp"], file)


def _write(out: BinaryIO, index: Index) -> None:
    columns = {name: np.ascontiguousarray(values) for name, values in index.columns.items()}
    heads = [(name, values.dtype.str, len(values)) for name, values in columns.items()]
    head = json.dumps({"stamp": index.stamp, "columns": heads}).encode()
    digest = hashlib.blake2b(digest_size=_DIGEST)

    def put(data: bytes | memoryview) -> None:
        digest.update(data)
        out.write(data)

    out.write(VERSION + bytes(_DIGEST))
    put(len(head).to_bytes(8, "little") + head)
    for values in columns.values():
        put(b"\0" * (-out.tell() % _ALIGNED))
        put(values.data)
    out.seek(len(VERSION))
    out.write(digest.digest())


def _reload(file: Path, stamp: dict[str, Any]) -> Index:
    index = load(file)
    if index is None or index.stamp["fingerprint"] != stamp["fingerprint"]:
        raise UserError(
            f"the index {shown_name(file)} was replaced while workers started: start again"
        )
    return index
