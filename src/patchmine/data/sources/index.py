"""A list of a million items in little memory, kept in one file between runs and mapped from there.

A kept index is used only where nothing speaks against it: its checksum fits, it was made by the
same rule, and all that it was made of bears the mark that it had.  Else it is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.reading import mark_of
from patchmine.data.sources.contract import Kind, Source, fingerprint_of
from patchmine.data.sources.members import PassedOver, rule_of
from patchmine.errors import UserError, shown_name
from patchmine.system.disk import replacing

log = logging.getLogger(__name__)

VERSION = b"patchmine index 6\n"
"""The first bytes of the file.  Raised whenever an index written before would be read wrongly."""

RECENT = 2_000_000_000
"""Nanoseconds within which a listed file could change again without a new time stamp."""

_SUM = 4  # bytes of the checksum (CRC-32) behind the version; it is over all that follows it
_ALIGNED = 64


@dataclass
class Index:
    """Paths and columns of N items, without a Python object for each."""

    columns: dict[str, NDArray[Any]]  # blob (of all paths), offsets (N + 1,), what a source adds
    stamp: dict[str, Any]  # small JSON facts
    file: Path | None = None  # where the index lies, once saved; it is then pickled by its name

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
        return _reload, (self.file, self.stamp["fingerprint"])


class PathList:
    """Collects paths without making a Python object of each."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._blob[self._offsets[number] : self._offsets[number + 1]])

    def add(self, path: str | bytes) -> None:
        """One more path."""
        self._blob += os.fsencode(path)
        self._offsets.append(len(self._blob))

    def repeats(self) -> int:
        """How many paths stand before."""
        hashes = np.fromiter((hash(self[number]) for number in range(len(self))), np.int64)
        return len(hashes) - len(np.unique(hashes))

    def columns(self) -> dict[str, NDArray[Any]]:
        """``blob`` and ``offsets`` of an index."""
        blob = np.frombuffer(self._blob, np.uint8)
        return {"blob": blob, "offsets": np.frombuffer(self._offsets, np.int64)}


class Marks:
    """What a listing depends on: paths below its root, with the marks that tell their states."""

    def __init__(self) -> None:
        self.marks: dict[str, list[Any]] = {}
        self.settled = True  # whether nothing may change without another mark
        self._started = time.time_ns()

    def note(self, path: str, info: os.stat_result | None) -> None:
        """The listing stands as long as this path bears this mark; None: is absent."""
        self.marks[path] = mark_of(info)
        if info is not None and max(info.st_mtime_ns, info.st_ctime_ns) >= self._started - RECENT:
            self.settled = False


def stat_of(path: str | bytes | Path) -> os.stat_result | None:
    """None where there is nothing of that name, or a link leads nowhere."""
    try:
        return os.stat(path)  # noqa: PTH116, bytes paths
    except OSError:
        return None


def file_identity(path: str) -> bytes | None:
    """Place and mark of a file; None where it could change again and bear the same."""
    info = stat_of(path)
    if info is None or max(info.st_mtime_ns, info.st_ctime_ns) >= time.time_ns() - RECENT:
        return None
    place = os.path.abspath(path)  # noqa: PTH100, once per image
    return b"\0".join([os.fsencode(place), repr(mark_of(info)).encode()])


def new_index(
    kind: Kind,
    paths: PathList,
    marks: Marks,
    passed_over: PassedOver,
    columns: dict[str, NDArray[Any]],
    notes: Iterable[str] = (),
    **stamp: Any,
) -> Index:
    """The index of a listing by today's rule; a column ``size`` is part of its fingerprint."""
    own = paths.columns()
    parts = [own["offsets"], own["blob"], *([columns["size"]] if "size" in columns else [])]
    facts: dict[str, Any] = {"fingerprint": fingerprint_of(parts), "rule": rule_of(kind)}
    facts |= {"settled": marks.settled, "marks": marks.marks, "passed_over": passed_over.found}
    return Index(own | columns, {**facts, "notes": [*notes, *passed_over.note()], **stamp})


class IndexedSource(Source):
    """A source whose items stand in an index.  Its notes begin with ``data=`` and its name."""

    def __init__(self, name: str, index: Index, notes: Iterable[str] = ()) -> None:
        own = (f"data={shown_name(name)}: {note}" for note in index.stamp["notes"])
        super().__init__(name, index.stamp["fingerprint"], (*notes, *own))
        self.index = index
        self.passed_over = {why: tuple(found) for why, found in index.stamp["passed_over"].items()}

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        return self.index.path(index)


def kept_index(
    cache_dir: Path | None,
    what: str,
    kind: Kind,
    places: Sequence[str | Path],
    make: Callable[[], Index],
    holds: Callable[[Index], bool] | None = None,
) -> Index:
    """The index kept of ``places`` (resolved) if it still holds, else a new one, then kept.

    ``holds``: whether it does; None: where the marks are those of files, at or below ``places``.
    """
    if cache_dir is None:
        return make()
    digest = hashlib.sha256(os.fsencode("\n".join(map(str, places)))).hexdigest()
    file = cache_dir / f"{what}-{kind.name}-{digest[:20]}.index"
    index, holds = load(file), holds or partial(_holds, root=Path(places[0]))
    if index is not None and index.stamp["rule"] == rule_of(kind) and holds(index):
        return index
    index = make()
    return save(index, file) if len(index) else index


def _holds(kept: Index, root: Path) -> bool:
    """Whether everything that the listing depends on still bears the mark that it had."""
    return bool(kept.stamp["settled"]) and all(
        mark_of(stat_of(os.path.join(root, path) if path else root)) == mark  # noqa: PTH118, many
        for path, mark in kept.stamp["marks"].items()
    )


def save(index: Index, file: Path) -> Index:
    """Write the index; its memory-mapped twin, or the index itself where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb+") as out:
            _write(out, index)
    except OSError as error:
        told = "the index %s could not be kept (%s); it will be made again next time"
        log.warning(told, shown_name(file), error.strerror)
        return index
    return load(file) or index


def _write(out: BinaryIO, index: Index) -> None:
    """Version, checksum, length of the head, head, columns, each at a multiple of 64 bytes."""
    columns = {name: np.ascontiguousarray(values) for name, values in index.columns.items()}
    heads = [(name, values.dtype.str, len(values)) for name, values in columns.items()]
    head = json.dumps({"stamp": index.stamp, "columns": heads}).encode()
    checksum = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal checksum
        checksum = zlib.crc32(data, checksum)
        out.write(data)

    out.write(VERSION + bytes(_SUM))
    put(len(head).to_bytes(8, "little") + head)
    for values in columns.values():
        put(b"\0" * (-out.tell() % _ALIGNED))
        put(values.data)
    out.seek(len(VERSION))
    out.write(checksum.to_bytes(_SUM, "little"))


def load(file: Path) -> Index | None:
    """The index in a file, memory-mapped; None where there is none, or it is damaged or older."""
    start = len(VERSION) + _SUM
    try:
        if not file.is_file():  # a pipe of that name would be waited for
            return None
        data = np.asarray(np.memmap(file, np.uint8, "r"))  # slicing a memmap itself is slow
        checksum = zlib.crc32(data[start:].data).to_bytes(_SUM, "little")
        if data[:start].tobytes() != VERSION + checksum:
            return None
        end = start + 8 + int.from_bytes(data[start : start + 8].tobytes(), "little")
        head = json.loads(data[start + 8 : end].tobytes())
        columns = dict[str, NDArray[Any]]()
        for name, dtype, count in head["columns"]:
            begin = end + -end % _ALIGNED
            end = begin + count * np.dtype(dtype).itemsize
            columns[name] = data[begin:end].view(dtype)
        return Index(columns, head["stamp"], file)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reload(file: Path, fingerprint: str) -> Index:
    index = load(file)
    if index is None or index.stamp["fingerprint"] != fingerprint:
        what = "was replaced while workers started: start again"
        raise UserError(f"the index {shown_name(file)} {what}")
    return index
