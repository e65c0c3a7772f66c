"""Tar shards in WebDataset's layout, read at any place through an index of offsets.

One pass over the headers finds where every image lies; from then on an image is one ``pread``.
Every member that counts is an item; what is known about it stands in a ``.json`` or ``.cls`` note.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchmine.data.sources import contract
from patchmine.data.sources import index as indices
from patchmine.data.sources.archive import Member, members, read_member
from patchmine.data.sources.members import HEAD, PassedOver, is_hidden, reason_against
from patchmine.data.sources.stored import Stored, local_files
from patchmine.errors import UserError, foreign_parser, shown_name

log = logging.getLogger(__name__)

NOTE_SUFFIXES = ("cls", "json")
LONELY = "note (.cls or .json) of no item"

# Of the columns of the index, with the types of `array`.  Without a note, note_size is 0.
_COLUMNS = dict(shard="i", start="q", size="q", note_start="q", note_size="q", note_json="b")


class ShardSource(indices.IndexedSource):
    """The images of tar shards, in the order of the shards and of their members."""

    encoded = True

    def __init__(self, shards: Sequence[Stored], index: indices.Index, name: str) -> None:
        super().__init__(name, index, index.stamp["cut"])
        self.shards = list(shards)

    def read(self, index: int) -> bytes:
        return self._read(index, "start", "size", self.index.stamp["pieces"].get(str(index)))

    def identity(self, index: int) -> bytes | None:
        columns = self.index.columns
        shard = self.shards[columns["shard"][index]].identity()
        place = f"{columns['start'][index]}\0{columns['size'][index]}"
        return None if shard is None else shard + b"\0" + place.encode()

    def path(self, index: int) -> str:
        """``shard:member``."""
        return f"{self.shards[self.index.columns['shard'][index]].name}:{self.index.path(index)}"

    def key(self, index: int) -> str:
        """The path before it came into the shard, where its JSON tells; else the member's name."""
        note: dict[str, Any] | str | None = None
        with suppress(UserError):  # a damaged note gives no path; `labels` tells of it
            note = self._note(index)
        if isinstance(note, dict) and "path" in note:
            return str(note["path"])
        return self.index.path(index)

    def labels(self) -> contract.Labels | None:
        """From ``.cls`` members, or ``label`` in ``.json`` members, else the classes by folders."""
        classes, bare = contract.ClassNames(), -1
        if self.index.columns["note_size"].any():
            for index in range(len(self)):
                note = self._note(index)
                label = note.get("label") if isinstance(note, dict) else note
                if label is None:
                    bare = index
                else:
                    classes.add(str(label))
                if len(classes) and bare >= 0:
                    what = f"{shown_name(self.path(bare))} has no label, others have one"
                    remedy = "give every image a .cls or .json member with a label, or none"
                    raise contract.data_error(self.name, f"{what}; {remedy}")
        if len(classes):
            return classes.finish()
        return contract.folder_classes(map(self.index.path, range(len(self))))

    def _note(self, index: int) -> dict[str, Any] | str | None:
        """What an item's note says: a table of JSON, or the text of a ``.cls`` member."""
        columns = self.index.columns
        if not columns["note_size"][index]:
            return None
        is_json = columns["note_json"][index]
        which = f"the {'.json' if is_json else '.cls'} member of {shown_name(self.path(index))}"
        with foreign_parser(
            lambda why: contract.data_error(self.name, f"{which} cannot be read ({why})")
        ):
            data = self._read(index, "note_start", "note_size")
            text = data.decode("utf-8-sig", "surrogateescape").strip()
            if not is_json:
                return text
            note = json.loads(text)
        return note if isinstance(note, dict) else None

    def _read(
        self, index: int, start: str, size: str, pieces: list[list[int]] | None = None
    ) -> bytes:
        columns = self.index.columns
        shard, length = self.shards[columns["shard"][index]], int(columns[size][index])
        data = read_member(shard.read, int(columns[start][index]), length, pieces)
        if len(data) < length or shard.was_replaced():
            missing = length - len(data)
            fault = f"ends {missing} bytes too early" if missing else "is not where it was"
            raise OSError(f"{self.path(index)} {fault}: the shard was changed meanwhile")
        return data


def open_shards(
    shards: Sequence[Path], name: str, cache_dir: Path | None, kind: contract.Kind = contract.IMAGES
) -> ShardSource:
    """The items of some tar shards, also what is whole in one that was cut; UserError if none."""
    files, marks = local_files(shards, name, "shard")
    places = [shard.resolve() for shard in shards]
    index = indices.kept_index(
        cache_dir, "shards", kind, places, lambda: index_shards(files, marks, name, kind)
    )
    return shard_source(files, index, name)


def shard_source(files: Sequence[Stored], index: indices.Index, name: str) -> ShardSource:
    """The items of an index, after a warning about each shard that was cut."""
    for note in index.stamp["cut"]:
        log.warning("%s", note)
    return ShardSource(files, index, name)


class _Listing:
    """One pass over the headers of shards: the columns of the index while they grow."""

    def __init__(self, kind: contract.Kind) -> None:
        self.kind, self.paths, self.passed_over = kind, indices.PathList(), PassedOver()
        self.columns = {name: array(code) for name, code in _COLUMNS.items()}
        self.pieces: dict[str, list[list[int]]] = {}
        self.cut: list[str] = []
        self.beside, self.first_beside = 0, ("", "")

    def add_shard(self, number: int, shard: Stored) -> None:
        """Every member that counts becomes an item, with the note that is named like it."""
        bare, lonely, annotated = array("q"), dict[str, Member](), False
        before, trouble, read = len(self.paths), list[str](), shard.reader().read
        for group in _groups(members(shard, self.passed_over, trouble)):
            items, notes = self._sorted_out(group, read)
            self._look_at(items)
            found = [(item, _note_of(item.name, notes)) for item in items]
            if trouble and annotated:  # the shard was cut between an item and its note
                found = [(item, note) for item, note in found if note is not None]
            for item, note in found:
                if note is None:
                    bare.append(len(self.paths))
                self._add(number, item, note)
            used = {note.name for _, note in found if note is not None}
            annotated = annotated or bool(used)
            lonely.update((stem, note) for stem, note in notes.items() if note.name not in used)
        if lonely:
            self._join(bare, lonely)
        if trouble:
            used_items = f"its {len(self.paths) - before:,} whole {self.kind.name}s are used"
            remedy = "fetch or write it again to have the rest"
            self.cut.append(
                f"the shard {shown_name(shard.name)} {trouble[0]}; {used_items}; {remedy}"
            )

    def _sorted_out(
        self, group: list[Member], read: Callable[[int, int], bytes]
    ) -> tuple[list[Member], dict[str, Member]]:
        """The items of a group, and its notes by their names without endings; .cls before .json."""
        items: list[Member] = []
        notes: dict[str, Member] = {}
        for member in group:
            stem, _, ending = member.name.rpartition(".")
            is_note = ending.lower() in NOTE_SUFFIXES and not is_hidden(member.name)
            if is_note and (ending.lower() == "cls" or stem not in notes):
                notes[stem] = member
        noted = {note.name for note in notes.values()}
        for member in group:
            head = partial(read, member.start, min(HEAD, member.size))
            if member.name in noted:
                continue
            if reason := reason_against(member.name, self.kind, head):
                self.passed_over.add(reason, member.name)
            else:
                items.append(member)
        return items, notes

    def _look_at(self, group: list[Member]) -> None:
        """Count ``1.mask.png`` beside ``1.jpg``, which WebDataset takes for facts of one sample."""
        plain = next((item for item in group if _last(item.name).count(".") == 1), None)
        if plain is not None and len(group) > 1:
            other = group[1] if group[0] is plain else group[0]
            self.first_beside = self.first_beside if self.beside else (other.name, plain.name)
            self.beside += len(group) - 1

    def _add(self, shard: int, item: Member, note: Member | None) -> None:
        if item.pieces:
            self.pieces[str(len(self.paths))] = [list(piece) for piece in item.pieces]
        self.paths.add(item.name)
        row = (shard, item.start, item.size, 0, 0, 0)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        if note is not None:
            self._annotate(-1, note)

    def _annotate(self, number: int, note: Member) -> None:
        self.columns["note_start"][number] = note.start
        self.columns["note_size"][number] = note.size
        self.columns["note_json"][number] = note.name.lower().endswith(".json")

    def _join(self, bare: Iterable[int], lonely: dict[str, Member]) -> None:
        """Give notes that stand elsewhere, as behind all images, to the items named like them."""
        joined = set[str]()
        for number in bare:
            note = _note_of(os.fsdecode(self.paths[number]), lonely)
            if note is not None:
                self._annotate(number, note)
                joined.add(note.name)
        for note in lonely.values():
            if note.name not in joined:
                self.passed_over.add(LONELY, note.name)

    def notes(self) -> list[str]:
        """What a person may not expect of these shards."""
        repeated, item = self.paths.repeats(), self.kind.name
        notes = []
        if repeated:
            are = f"{repeated:,} {item}s are" if repeated > 1 else f"1 {item} is"
            notes.append(f"{are} of a name that stood before; each counts.")
        if self.beside:
            are = f"{self.beside:,} {item}s are" if self.beside > 1 else f"1 {item} is"
            other, plain = map(shown_name, self.first_beside)
            which = f"an item beside another of its key ({other} beside {plain})"
            advice = f"name the endings that count, as in ::{plain.rpartition('.')[2].lower()}"
            notes.append(f"{are} {which}; to leave such out {advice}")
        return notes


def index_shards(
    shards: Sequence[Stored], marks: indices.Marks, name: str, kind: contract.Kind
) -> indices.Index:
    """One pass over the headers of all shards."""
    listing = _Listing(kind)
    for number, shard in enumerate(shards):
        listing.add_shard(number, shard)
    cut, passed_over = listing.cut, listing.passed_over
    if not len(listing.paths):
        why = f": {cut[0]}" if cut else f"; {kind.name}s end in {', '.join(kind.suffixes)}"
        among = f"there is no whole {kind.name} in {len(shards)} shard{'s' * (len(shards) > 1)}"
        raise contract.data_error(name, "; ".join([f"{among}{why}", *passed_over.note()]))
    columns = {
        key: np.frombuffer(values, values.typecode) for key, values in listing.columns.items()
    }
    stamp = {"cut": cut, "pieces": listing.pieces}
    return indices.new_index(
        kind, listing.paths, marks, passed_over, columns, listing.notes(), **stamp
    )


def _groups(listed: Iterable[Member]) -> Iterator[list[Member]]:
    """Neighbours of one key, the name up to its first dot; a repeated name starts a new group."""
    group: dict[str, Member] = {}
    last = ""
    for member in listed:
        end = _last(member.name)
        key = member.name.removesuffix(end) + end.partition(".")[0]
        if group and (key != last or member.name in group):
            yield list(group.values())
            group = {}
        group[member.name], last = member, key
    if group:
        yield list(group.values())


def _note_of(name: str, notes: dict[str, Member]) -> Member | None:
    """The note named like the whole of an item, or up to one of its dots, the last one first."""
    stem, least = name, len(name) - len(_last(name))
    while notes and len(stem) > least:
        if stem in notes:
            return notes[stem]
        stem = stem[: max(stem.rfind("."), 0)]
    return None


def _last(name: str) -> str:
    """The last part of a member's name."""
    return name.rpartition("/")[2]
