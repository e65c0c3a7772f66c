"""Tar shards in WebDataset's layout, read at any place through an index of offsets.

One pass over the headers finds where every image lies; from then on an image is one ``pread``, in any order, so
shuffling and resuming are as exact as with files.  Members that share a name up to the first dot of its last part
belong together: an image, and what is known about it in ``.json`` or ``.cls``.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchmine.data.contract import IMAGES, ClassNames, Kind, Labels, fingerprint_of
from patchmine.data.index import Index, PathList, index_file, load, save
from patchmine.errors import UserError

log = logging.getLogger(__name__)

NOTE_SUFFIXES = ("cls", "json")

MOST_OPEN = 64
"""Shards that a process keeps open at once, far below the usual limit of 1,024 files."""


class ShardSource:
    """The images of tar shards, in the order of the shards and of their members.

    ``index`` has the columns ``shard``, ``start``, ``size``, and for an image with a note ``note_start`` and
    ``note_size`` (0 where there is none) and ``note_json`` (whether the note is JSON).  ``notes`` names the shards
    that were cut.
    """

    def __init__(self, shards: Sequence[Path], index: Index, name: str) -> None:
        self.shards, self.index, self.name = list(shards), index, name
        self.fingerprint: str = index.stamp["fingerprint"]
        self.notes: tuple[str, ...] = tuple(index.stamp["cut"])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # each process opens its own

    def read(self, index: int) -> bytes:
        """The image's bytes.  OSError when the shard is gone or has become shorter."""
        return self._read(index, "start", "size")

    def path(self, index: int) -> str:
        """``shard:member``."""
        return f"{self._shard(index)}:{self.index.path(index)}"

    def key(self, index: int) -> str:
        """The path that the image had before it came into the shard, where its JSON tells; else its member's name."""
        note = self._note(index)
        return str(note["path"]) if isinstance(note, dict) and "path" in note else self.index.path(index)

    def labels(self) -> Labels | None:
        """From ``.cls`` members (their text) or from ``label`` in ``.json`` members; None where no image has any.

        UserError when some have one and some have none.
        """
        if not self.index.columns["note_size"].any():
            return None
        classes, labelled, bare = ClassNames(), 0, -1
        for index in range(len(self)):
            label = self._label(index)
            if label is None:
                bare = index
            else:
                classes.add(label)
                labelled += 1
            if labelled and bare >= 0:
                raise UserError(
                    f"data={self.name}: {self.path(bare)} has no label, others have one; give every image a .cls or "
                    ".json member with a label, or none"
                )
        return classes.finish() if labelled else None

    def _label(self, index: int) -> str | None:
        note = self._note(index)
        label = note.get("label") if isinstance(note, dict) else note
        return None if label is None else str(label)

    def _note(self, index: int) -> dict[str, Any] | str | None:
        columns = self.index.columns
        if not columns["note_size"][index]:
            return None
        text = self._read(index, "note_start", "note_size").decode("utf-8", "replace").strip()
        if not columns["note_json"][index]:
            return text
        try:
            note = json.loads(text)
        except ValueError as error:
            raise UserError(
                f"data={self.name}: the .json member of {self.path(index)} is not JSON ({error})"
            ) from error
        return note if isinstance(note, dict) else None

    def _shard(self, index: int) -> Path:
        return self.shards[self.index.columns["shard"][index]]

    def _read(self, index: int, start: str, size: str) -> bytes:
        columns = self.index.columns
        number, length = int(columns["shard"][index]), int(columns[size][index])
        handle = self._open.get(number)
        if handle is None:
            handle = self._open[number] = _OpenShard(self.shards[number])
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        data = os.pread(
            handle.number, length, int(columns[start][index])
        )  # leaves no position behind: safe after a fork
        if len(data) < length:
            raise OSError(
                f"{self.path(index)} ends {length - len(data)} bytes too early: the shard was changed meanwhile"
            )
        return data


class _OpenShard:
    """A file descriptor that closes when nobody holds it."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def open_shards(shards: Sequence[Path], name: str, cache_dir: Path | None, kind: Kind = IMAGES) -> ShardSource:
    """The images (or what else ``kind`` says) of some tar shards.

    The index is kept in ``cache_dir`` and used again as long as every shard has the size and time stamp that it had.
    What is whole in a shard that was cut can be used; a warning names the shard.  UserError when a shard is missing,
    is no tar archive, or when there is no image in any.
    """
    try:
        state = [[info.st_size, info.st_mtime_ns] for info in (shard.stat() for shard in shards)]
    except OSError as error:
        raise UserError(f"data={name}: the shard {error.filename} cannot be read ({error.strerror})") from error
    place = "\n".join(os.fspath(shard.resolve()) for shard in shards)
    file = index_file(cache_dir, f"shards-{kind.name}", place) if cache_dir else None
    index = load(file) if file else None
    if index is None or index.stamp["state"] != state:
        index = index_shards(shards, name, kind)
        index.stamp["state"] = state
        index = save(index, file) if file else index
    source = ShardSource(shards, index, name)
    for note in source.notes:
        log.warning("%s", note)
    return source


class _Member(NamedTuple):
    name: str
    start: int
    size: int


class _Table:
    """The columns of the index while they grow."""

    def __init__(self) -> None:
        self.paths = PathList()
        self.shard, self.start, self.size = array("i"), array("q"), array("q")
        self.note_start, self.note_size, self.note_json = array("q"), array("q"), array("b")

    def add(self, shard: int, image: _Member, note: _Member | None) -> None:
        self.paths.add(os.fsencode(image.name))
        self.shard.append(shard)
        self.start.append(image.start)
        self.size.append(image.size)
        self.note_start.append(note.start if note else 0)
        self.note_size.append(note.size if note else 0)
        self.note_json.append(note is not None and _split(note.name)[1] == "json")

    def columns(self) -> dict[str, Any]:
        kinds = {"shard": np.int32, "note_json": np.int8}
        names = ("shard", "start", "size", "note_start", "note_size", "note_json")
        own = {name: np.frombuffer(getattr(self, name), kinds.get(name, np.int64)) for name in names}
        return {**self.paths.columns(), **own}


def index_shards(shards: Sequence[Path], name: str, kind: Kind = IMAGES) -> Index:
    """One pass over the headers of all shards."""
    table, cut = _Table(), list[str]()
    for number, shard in enumerate(shards):
        before, trouble = len(table.paths), list[str]()
        for image, note in _samples(_members(shard, name, trouble), trouble, kind):
            table.add(number, image, note)
        if trouble:
            usable = f"its {len(table.paths) - before:,} whole {kind.name}s are used"
            cut.append(f"the shard {shard} {trouble[0]}; {usable}; fetch or write it again to have the rest")
    if not len(table.paths):
        why = f": {cut[0]}" if cut else f"; {kind.name}s end in {', '.join(kind.suffixes)}"
        raise UserError(
            f"data={name}: there is no whole {kind.name} in {len(shards)} shard{'s' * (len(shards) > 1)}{why}"
        )
    columns = table.columns()
    listed = fingerprint_of([columns["offsets"], columns["blob"], columns["size"]])
    return Index(columns, {"kind": "shards", "cut": cut, "fingerprint": listed})


def _members(shard: Path, name: str, trouble: list[str]) -> Iterator[_Member]:
    """The whole files of one archive in order.  Where it was cut, ``trouble`` is told how at the end."""
    size = shard.stat().st_size
    if size < tarfile.BLOCKSIZE:
        trouble.append(f"was cut within its first header (it has {size} bytes)")
        return
    try:
        with tarfile.open(shard, "r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                if info.offset_data + info.size > size:
                    trouble.append(f"was cut in the middle of {info.name} (it has {size:,} bytes)")
                    return
                name_inside = info.name.removeprefix("./")
                if info.isreg() and not info.issparse() and not name_inside.rpartition("/")[2].startswith("."):
                    yield _Member(name_inside, info.offset_data, info.size)
            end = archive.offset
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"data={name}: the shard {shard} is no plain tar archive ({error}); unpack or write it again"
        ) from error
    with shard.open("rb") as handle:
        handle.seek(end)
        block = handle.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):  # the mark that ends an archive
        trouble.append(f"was {'damaged' if len(block) == tarfile.BLOCKSIZE else 'cut'} at byte {end:,}")


def _samples(members: Iterable[_Member], trouble: list[str], kind: Kind) -> Iterator[tuple[_Member, _Member | None]]:
    """Image and note of each group of neighbours with one key; further images of a group are passed over."""
    notes_before = False
    for _, group in groupby(members, lambda member: _split(member.name)[0]):
        parts = list(group)
        images = [part for part in parts if part.name.lower().endswith(kind.suffixes)]
        images.sort(
            key=lambda part: "." in _split(part.name)[1]
        )  # `x.jpg` rather than `x.mask.png`; the sort is stable
        notes = sorted((part for part in parts if _split(part.name)[1] in NOTE_SUFFIXES), key=lambda part: part.name)
        if trouble and notes_before and not notes:
            return  # cut between an image and its note
        notes_before = bool(notes)
        if images:
            yield images[0], notes[0] if notes else None


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member, at the first dot of the last part of its name."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension.lower()
