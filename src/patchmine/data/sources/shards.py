"""Tar shards in WebDataset's layout, read at any place through an index of offsets.

One pass over the headers finds where every image lies; from then on an image is one ``pread``, in
any order, so shuffling and resuming are as exact as with files.  Every member that counts
(``data.members``) is an item.  What is known about an item stands in a ``.json`` or ``.cls`` member
of its name: ``x.json`` belongs to ``x.jpg``, and to ``x.left.jpg`` where there is no
``x.left.json``.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchmine.data.sources.archive import Member, members, read_member
from patchmine.data.sources.classes import folder_classes
from patchmine.data.sources.contract import IMAGES, ClassNames, Kind, Labels, fingerprint_of
from patchmine.data.sources.index import Index, PathList, index_file, is_recent, load, mark_of, save
from patchmine.data.sources.members import (
    HEAD,
    PassedOver,
    is_hidden,
    passed_over_note,
    reason_against,
    rule_of,
)
from patchmine.errors import UserError, foreign_parser, shown_name

log = logging.getLogger(__name__)

NOTE_SUFFIXES = ("cls", "json")

MOST_OPEN = 64
"""Shards that a process keeps open at once, far below the usual limit of 1,024 files."""


class ShardSource:
    """The images of tar shards, in the order of the shards and of their members.

    ``index`` has the columns ``shard``, ``start``, ``size``, and for an image with a note
    ``note_start`` and ``note_size`` (0 where there is none) and ``note_json`` (whether the note is
    JSON).  ``notes`` names the shards that were cut.
    """

    def __init__(self, shards: Sequence[Path], index: Index, name: str) -> None:
        self.shards, self.index, self.name = list(shards), index, name
        self.fingerprint: str = index.stamp["fingerprint"]
        self.notes = (
            *index.stamp["cut"],
            *index.stamp["notes"],
            *passed_over_note(name, index.stamp["passed_over"]),
        )
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
        """The path that the image had before it came into the shard, where its JSON tells; else its
        member's name.
        """
        note: dict[str, Any] | str | None = None
        with suppress(
            UserError
        ):  # a damaged note gives no path; where it should give a label, `labels` tells
            note = self._note(index)
        return (
            str(note["path"])
            if isinstance(note, dict) and "path" in note
            else self.index.path(index)
        )

    def labels(self) -> Labels | None:
        """From ``.cls`` members (their text) or from ``label`` in ``.json`` members, else the
        classes by folders.

        UserError when some images have a label and some have none.
        """
        if not self.index.columns["note_size"].any():
            return self._folder_classes()
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
                    f"data={shown_name(self.name)}: {shown_name(self.path(bare))} has no label, others have one; give "
                    "every image a .cls or .json member with a label, or none"
                )
        return classes.finish() if labelled else self._folder_classes()

    def _folder_classes(self) -> Labels | None:
        return folder_classes(map(self.index.path, range(len(self))))

    def _label(self, index: int) -> str | None:
        note = self._note(index)
        label = note.get("label") if isinstance(note, dict) else note
        return None if label is None else str(label)

    def _note(self, index: int) -> dict[str, Any] | str | None:
        columns = self.index.columns
        if not columns["note_size"][index]:
            return None
        with foreign_parser(
            lambda reason: UserError(f"{self._said_of_note(index)} cannot be read ({reason})")
        ):
            data = self._read(index, "note_start", "note_size")
        text = data.decode("utf-8-sig", "surrogateescape").strip()
        if not columns["note_json"][index]:
            return text
        with foreign_parser(
            lambda reason: UserError(f"{self._said_of_note(index)} is not JSON ({reason})")
        ):
            note = json.loads(text)
        return note if isinstance(note, dict) else None

    def _said_of_note(self, index: int) -> str:
        ending = ".json" if self.index.columns["note_json"][index] else ".cls"
        return (
            f"data={shown_name(self.name)}: the {ending} member of {shown_name(self.path(index))}"
        )

    def _shard(self, index: int) -> Path:
        return self.shards[self.index.columns["shard"][index]]

    def _read(self, index: int, start: str, size: str) -> bytes:
        columns = self.index.columns
        number, length = int(columns["shard"][index]), int(columns[size][index])
        handle = self._open.get(number)
        if handle is None:
            handle = self._open[number] = _OpenShard(
                self.shards[number], self.index.stamp["state"][number]
            )
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        pieces = self.index.stamp["pieces"].get(str(index)) if size == "size" else None
        data = read_member(
            handle.number, int(columns[start][index]), length, pieces
        )  # safe after a fork
        if len(data) < length:
            raise OSError(
                f"{self.path(index)} ends {length - len(data)} bytes too early: the shard was changed meanwhile"
            )
        if handle.was_replaced:
            raise OSError(
                f"{self.path(index)} is not where it was: the shard was changed meanwhile"
            )
        return data


class _OpenShard:
    """A file descriptor that closes when nobody holds it."""

    def __init__(self, path: Path, mark: list[int]) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)
        size, modified, _, inode = mark_of(
            os.fstat(self.number)
        )  # a changed mode or owner does no harm
        self.was_replaced = [size, modified, inode] != [mark[0], mark[1], mark[3]]

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def open_shards(
    shards: Sequence[Path], name: str, cache_dir: Path | None, kind: Kind = IMAGES
) -> ShardSource:
    """The images (or what else ``kind`` says) of some tar shards.

    The index is kept in ``cache_dir`` and used again as long as no shard has changed.  What is
    whole in a shard that was cut can be used; a warning names the shard, and notes say what was
    passed over.  UserError when a shard is missing, is no tar archive, or when there is no image in
    any.
    """
    started = time.time_ns()
    infos = [_regular(shard, name) for shard in shards]
    state = [mark_of(info) for info in infos]
    place = "\n".join(os.fspath(shard.resolve()) for shard in shards)
    file = index_file(cache_dir, f"shards-{kind.name}", place) if cache_dir else None
    index = load(file) if file else None
    if index is None or index.stamp["rule"] != rule_of(kind) or index.stamp["kept"] != state:
        index = index_shards(shards, name, kind)
        index.stamp["state"] = state
        index.stamp["kept"] = None if any(is_recent(info, started) for info in infos) else state
        index = save(index, file) if file else index
    source = ShardSource(shards, index, name)
    for note in index.stamp["cut"]:
        log.warning("%s", note)
    return source


def _regular(shard: Path, name: str) -> os.stat_result:
    """What the disk says of a shard, which must be a regular file: a pipe would be waited for."""
    try:
        info = shard.stat()
    except OSError as error:
        raise UserError(
            f"data={shown_name(name)}: the shard {shown_name(shard)} cannot be read ({error.strerror})"
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise UserError(
            f"data={shown_name(name)}: the shard {shown_name(shard)} is no regular file; give a tar archive"
        )
    return info


class _Table:
    """The columns of the index while they grow."""

    def __init__(self) -> None:
        self.paths = PathList()
        self.shard, self.start, self.size = array("i"), array("q"), array("q")
        self.note_start, self.note_size, self.note_json = array("q"), array("q"), array("b")
        self.pieces: dict[str, list[list[int]]] = {}
        self.repeated, self.known = 0, set[int]()
        self.beside, self.first_beside = 0, ("", "")

    def add(self, shard: int, item: Member, note: Member | None) -> None:
        if item.pieces:
            self.pieces[str(len(self.paths))] = [list(piece) for piece in item.pieces]
        self.paths.add(os.fsencode(item.name))
        self.repeated += hash(item.name) in self.known
        self.known.add(hash(item.name))
        self.shard.append(shard)
        self.start.append(item.start)
        self.size.append(item.size)
        for column in (self.note_start, self.note_size, self.note_json):
            column.append(0)
        if note is not None:
            self.annotate(len(self.paths) - 1, note)

    def annotate(self, number: int, note: Member) -> None:
        """Give an item its note."""
        self.note_start[number], self.note_size[number] = note.start, note.size
        self.note_json[number] = note.name.lower().endswith(".json")

    def look_at(self, group: list[Member]) -> None:
        """Count ``1.mask.png`` beside ``1.jpg``, which WebDataset's readers take for two facts
        about one sample.
        """
        plain = next(
            (
                item
                for item in group
                if item.name == f"{_key(item.name)}.{item.name.rpartition('.')[2]}"
            ),
            None,
        )
        others = [item for item in group if item is not plain] if plain else []
        self.beside += len(others)
        if plain and others and not self.first_beside[0]:
            self.first_beside = others[0].name, plain.name

    def notes(self, name: str, kind: Kind) -> list[str]:
        """What a person may not expect of these shards."""
        notes, name = [], shown_name(name)
        if self.repeated:
            notes.append(
                f"data={name}: {_are(self.repeated, kind)} of a name that stood before; each counts."
            )
        if self.beside:
            other, plain = map(shown_name, self.first_beside)
            ending = plain.rpartition(".")[2].lower()
            notes.append(
                f"data={name}: {_are(self.beside, kind)} an item beside another of its key ({other} beside {plain}); "
                f"to leave such out name the endings that count, as in data={name}::{ending}"
            )
        return notes

    def columns(self) -> dict[str, Any]:
        kinds = {"shard": np.int32, "note_json": np.int8}
        names = ("shard", "start", "size", "note_start", "note_size", "note_json")
        own = {
            name: np.frombuffer(getattr(self, name), kinds.get(name, np.int64)) for name in names
        }
        return {**self.paths.columns(), **own}


def index_shards(shards: Sequence[Path], name: str, kind: Kind = IMAGES) -> Index:
    """One pass over the headers of all shards."""
    table, passed_over, cut = _Table(), PassedOver(), list[str]()
    for number, shard in enumerate(shards):
        before, trouble = len(table.paths), list[str]()
        _index_shard(shard, number, table, passed_over, trouble, kind)
        if trouble:
            used = f"its {len(table.paths) - before:,} whole {kind.name}s are used"
            cut.append(
                f"the shard {shown_name(shard)} {trouble[0]}; {used}; fetch or write it again to have the rest"
            )
    if not len(table.paths):
        found = passed_over_note(name, passed_over.facts())
        why = f": {cut[0]}" if cut else f"; {kind.name}s end in {', '.join(kind.suffixes)}"
        among = f"{len(shards)} shard{'s' * (len(shards) > 1)}"
        raise UserError(
            "; ".join(
                [f"data={shown_name(name)}: there is no whole {kind.name} in {among}{why}", *found]
            )
        )
    columns = table.columns()
    listed = fingerprint_of([columns["offsets"], columns["blob"], columns["size"]])
    stamp: dict[str, Any] = {
        "kind": "shards",
        "rule": rule_of(kind),
        "cut": cut,
        "fingerprint": listed,
        "pieces": table.pieces,
    }
    stamp["notes"] = table.notes(name, kind)
    return Index(columns, {**stamp, "passed_over": passed_over.facts()})


def _index_shard(
    shard: Path, number: int, table: _Table, passed_over: PassedOver, trouble: list[str], kind: Kind
) -> None:
    """Every member that counts becomes an item, with the note that is named like it."""
    bare, lonely, annotated = array("q"), dict[str, Member](), False
    with shard.open("rb") as handle:
        for group in _groups(members(shard, passed_over, trouble)):
            items, notes = _sorted_out(group, handle.fileno(), passed_over, kind)
            table.look_at(items)
            found = [_note_of(item.name, notes) for item in items]
            if trouble and annotated and None in found:  # cut between an item and its note
                kept = [place for place, note in enumerate(found) if note is not None]
                items, found = [items[place] for place in kept], [found[place] for place in kept]
            for item, note in zip(items, found, strict=True):
                if note is None:
                    bare.append(len(table.paths))
                else:
                    annotated = True
                table.add(number, item, note)
            used = {note.name for note in found if note is not None}
            lonely.update((stem, note) for stem, note in notes.items() if note.name not in used)
    if lonely:  # as where all images come first and all notes behind them
        _join(table, bare, lonely, passed_over)


def _groups(listed: Iterable[Member]) -> Iterator[list[Member]]:
    """Neighbours whose names agree up to the first dot, WebDataset's key; a repeated name starts a
    new group.
    """
    group: dict[str, Member] = {}
    last = ""
    for member in listed:
        key = _key(member.name)
        if group and (key != last or member.name in group):
            yield list(group.values())
            group = {}
        group[member.name], last = member, key
    if group:
        yield list(group.values())


def _sorted_out(
    group: list[Member], handle: int, passed_over: PassedOver, kind: Kind
) -> tuple[list[Member], dict[str, Member]]:
    """The items of a group, and its notes by their names without endings."""
    items: list[Member] = []
    notes: dict[str, Member] = {}
    for member in sorted(
        group, key=lambda member: member.name.lower().endswith(".cls"), reverse=True
    ):
        stem, dot, ending = member.name.rpartition(".")
        if dot and ending.lower() in NOTE_SUFFIXES and not is_hidden(member.name):
            notes.setdefault(stem, member)
    noted = {note.name for note in notes.values()}
    for member in group:
        if member.name in noted:
            continue
        head = partial(os.pread, handle, min(HEAD, member.size), member.start)
        reason = reason_against(member.name, kind, head)
        if reason is None:
            items.append(member)
        else:
            passed_over.add(reason, member.name)
    return items, notes


def _note_of(name: str, notes: dict[str, Member]) -> Member | None:
    """The note named like an item: like the whole of it, or up to one of its dots, the longest
    first.
    """
    if not notes:
        return None
    folder, slash, last = name.rpartition("/")
    parts = last.split(".")
    stems = (folder + slash + ".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((notes[stem] for stem in stems if stem in notes), None)


def _join(
    table: _Table, bare: Iterable[int], lonely: dict[str, Member], passed_over: PassedOver
) -> None:
    """Notes without an item beside them go to the items of the same shard that are named like them."""
    used = set[str]()
    for number in bare:
        note = _note_of(os.fsdecode(table.paths[number]), lonely)
        if note is not None:
            table.annotate(number, note)
            used.add(note.name)
    for note in lonely.values():
        if note.name not in used:
            passed_over.add("note (.cls or .json) of no item", note.name)


def _are(count: int, kind: Kind) -> str:
    return f"{count:,} {kind.name}s are" if count > 1 else f"1 {kind.name} is"


def _key(name: str) -> str:
    """A member's name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]
