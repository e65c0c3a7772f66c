"""A list of a million items in little memory, kept in one file between runs and memory-mapped from there.

A Python list of paths costs 100 bytes an item and more, and is copied into every worker, reference count by reference
count.  Here the paths are one run of bytes with offsets, beside numeric columns.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever an index written before would be read wrongly, or would list other items."""


@dataclass
class Index:
    """Paths and columns of N items.

    ``columns``: ``blob`` (bytes of all paths, one after the other), ``offsets`` (N + 1,), and what a source adds.
    ``stamp``: small JSON facts.  ``file``: where the index lies, once saved; a saved index is pickled by its name.
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

    def add(self, path: bytes) -> None:
        """One more path, as ``os.fsencode`` writes it."""
        self._blob += path
        self._offsets.append(len(self._blob))

    def columns(self) -> dict[str, NDArray[Any]]:
        """``blob`` and ``offsets`` of an index."""
        return {"blob": np.frombuffer(self._blob, np.uint8), "offsets": np.frombuffer(self._offsets, np.int64)}


def index_file(cache_dir: Path, kind: str, place: str) -> Path:
    """Where the index of the folder, list or set of shards at ``place`` is kept."""
    return cache_dir / f"{kind}-{hashlib.sha256(place.encode('utf-8', 'surrogateescape')).hexdigest()[:20]}.index"


def save(index: Index, file: Path) -> Index:
    """Writes the index and gives its memory-mapped twin; where it cannot be written, says so and gives it back."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".index-") as room:
            with (Path(room) / file.name).open("wb") as out:
                _write(out, index)
            (Path(room) / file.name).replace(file)
    except OSError as error:
        log.warning("the index %s could not be kept (%s); it will be made again next time", file, error)
        return index
    return load(file) or index


def load(file: Path) -> Index | None:
    """The index in a file, memory-mapped; None where there is none, or none of this version."""
    try:
        with file.open("rb") as handle:
            stamp = json.loads(_next_array(handle, file).tobytes())
            if stamp.get("version") != VERSION:
                return None
            return Index({name: _next_array(handle, file) for name in stamp["columns"]}, stamp, file)
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write(out: BinaryIO, index: Index) -> None:
    """Plain ``.npy`` arrays, one after the other, the stamp first; each is padded, so that all start aligned."""
    stamp = {**index.stamp, "version": VERSION, "columns": list(index.columns)}
    text = json.dumps(stamp).encode()
    for values in [np.frombuffer(text, np.uint8), *index.columns.values()]:
        np.lib.format.write_array(out, np.ascontiguousarray(values), allow_pickle=False)
        out.write(b"\0" * (-out.tell() % 64))


def _next_array(handle: BinaryIO, file: Path) -> NDArray[Any]:
    np.lib.format.read_magic(handle)
    shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
    start, length = handle.tell(), int(np.prod(shape)) * dtype.itemsize
    end = start + length
    handle.seek(end + -end % 64)
    if not length:
        return np.zeros(shape, dtype)  # nothing cannot be mapped
    return np.asarray(np.memmap(file, dtype, "r", start, shape))  # a plain view: slicing a memmap itself is slow


def _reload(file: Path, stamp: dict[str, Any]) -> Index:
    index = load(file)
    if index is None or index.stamp["fingerprint"] != stamp["fingerprint"]:
        raise RuntimeError(f"the index {file} was replaced while workers started: start again")
    return index
