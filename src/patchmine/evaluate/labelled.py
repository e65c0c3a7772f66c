"""From what the user typed to labelled items, for training and for testing."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.items import IMAGE, Item
from patchmine.data.sources.contract import Labels, Source, division_of, plain_spelling
from patchmine.errors import UserError, shown_name

Index = NDArray[np.int64]

TEST_SHARE = 0.2
_IN_HALVES = ("embedded:photos", "embedded:moving-photos")


@dataclass(frozen=True)
class Part:
    """Some items of a source."""

    source: Source
    indices: Index  # (n,) which of them
    labels: Index | None  # (N,) of all items of the source, where there are labels

    def __len__(self) -> int:
        return len(self.indices)

    def sampled(self, count: int, seed: int = 0) -> Part:
        """At most ``count`` items: a `stratified` draw, in the order of the source."""
        if count >= len(self):
            return self
        labels = np.zeros(len(self), np.int64) if self.labels is None else self.labels[self.indices]
        return replace(self, indices=self.indices[stratified(labels, count, seed)])

    def share(self, rank: int, processes: int) -> Part:
        """What one of several processes reads: neighbours, so that shares in a row are the part."""
        return replace(self, indices=np.array_split(self.indices, processes)[rank])


@dataclass(frozen=True)
class LabelledData:
    """Items to learn from and to be tested on, with one numbering of ``classes``."""

    train: Part
    test: Part
    classes: list[str]
    how: str  # where the test items come from and what they lack, for people


def everything(source: Source) -> Part:
    """All items of a source, with labels where it has any."""
    labels = source.labels()
    return Part(source, np.arange(len(source)), None if labels is None else labels.ids)


def open_labelled(
    data: Any, test: Any = None, item: Item = IMAGE, names: tuple[str, str] = ("data", "test")
) -> LabelledData:
    """Labelled data from one or two sources.

    Args:
        data: anything that ``item.open`` takes.
        test: what to be tested on.  None: where ``data`` has the folders train and test (or val),
            or is embedded in two halves, these; else the last fifth of each class.
        item: images or videos.
        names: of the two settings, for messages.

    Raises:
        UserError: there are no labels, fewer than two classes, one in two spellings, one to be
            tested on that is not learnt, or nothing to be tested on.
    """
    if test is not None:
        how = f"learns from {_shown(data)}, is tested on {_shown(test)}"
        return _of_two(data, test, item, names, how)
    if isinstance(data, str | Path):
        if str(data) in _IN_HALVES:
            how = f"the two disjoint halves of {data}"
            return _of_two(f"{data}/train", f"{data}/test", item, names, how)
        if folders := _division(Path(data)):
            how = f"learns from {folders[0]}, is tested on {folders[1]}"
            return _of_two(*folders, item, names, how)
    source, labels = _open(data, item, names[0])
    kept, held_out = split_by_class(labels.ids, TEST_SHARE)
    if len(held_out) == 0:
        few = f"{names[0]}={_shown(data)} has one {item.noun} per class"
        raise UserError(f"{few}, so none can be tested on: give more, or test=...")
    counts = f"{len(held_out):,} of {len(labels.ids):,} {item.noun}s"
    last_fifth = f"the last fifth of each class, in the order of the list, is tested on ({counts})"
    how = f"{_shown(data)} has no part for testing: {last_fifth}"
    alone = [labels.names[k] for k in np.flatnonzero(np.bincount(labels.ids) == 1)]
    how += lacking(alone, f"one {item.noun}, which is learnt from and never tested")
    train, last = (Part(source, indices, labels.ids) for indices in (kept, held_out))
    return LabelledData(train, last, labels.names, how)


def labelled_part(data: Any, item: Item = IMAGE) -> tuple[Part, list[str]]:
    """All items of a source, with labels, and the names of the classes; else UserError."""
    source, labels = _open(data, item, "data")
    return Part(source, np.arange(len(source)), labels.ids), labels.names


def split_by_class(labels: Index, share: float) -> tuple[Index, Index]:
    """Places (ascending) of the first items of each class, and of its last ``share``."""
    # No random draw: neighbours in a list are often near-duplicates.
    last = np.zeros(len(labels), dtype=bool)
    for number in np.unique(labels):
        places = np.flatnonzero(labels == number)
        if len(places) > 1:
            last[places[-min(len(places) - 1, max(1, round(share * len(places)))) :]] = True
    return np.flatnonzero(~last), np.flatnonzero(last)


def stratified(labels: Index, count: int, seed: int = 0) -> Index:
    """Places (count,), ascending, of a random draw in which each class keeps its share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, shuffled within each
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)  # of each item within its class
    size = np.repeat(sizes, sizes)
    # The rank as a share of the class: all classes are used up at the same speed.  The first of
    # each come before all.
    turn = np.where(rank == 0, -size.astype(float), (rank + 0.5) / size)
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def _division(path: Path) -> tuple[Path, Path] | None:
    try:
        with os.scandir(path) as entries:
            names = division_of([entry.name for entry in entries if entry.is_dir()])
    except OSError:  # no folder, or none that may be read: opening it tells
        return None
    return (path / names[0], path / names[1]) if names else None


def _of_two(data: Any, test: Any, item: Item, names: tuple[str, str], how: str) -> LabelledData:
    source, labels = _open(data, item, names[0])
    train = Part(source, np.arange(len(source)), labels.ids)
    known = LabelledData(train, train, labels.names, how)
    tested, lacking = labelled_beside(test, known, item, names)
    return LabelledData(train, tested, labels.names, how + lacking)


def labelled_beside(
    other: Any, known: LabelledData, item: Item, names: tuple[str, str]
) -> tuple[Part, str]:
    """Items of another source with the classes of ``known``, and the end of a sentence about those
    classes that it lacks.

    Raises UserError for a class that ``known`` does not train, and as `open_labelled` does.
    """
    source, labels = _open(other, item, names[1], fewest=1)
    strangers = sorted({*labels.names} - {*known.classes})
    if strangers:
        near = difflib.get_close_matches(strangers[0], known.classes, n=3, cutoff=0.5)
        told = f"near: {_quoted(near)}" if near else f"they are {_quoted(known.classes)}"
        first = int(np.flatnonzero(labels.ids == labels.names.index(strangers[0]))[0])
        such = f"{shown_name(source.key(first))}; {len(strangers)} such"
        given = f"{_quoted(strangers[:1])} of {names[1]}={_shown(other)} ({such})"
        of = f"the {len(known.classes)} classes of {names[0]}={shown_name(known.train.source.name)}"
        raise UserError(
            f"the class {given} is not among {of}; {told}: name the classes alike in both"
        )
    here = {*labels.names}
    absent = [name for name in known.classes if name not in here]
    use = "tested on" if names[1] == "test" else "chosen by"
    part = Part(source, np.arange(len(source)), labels.numbered_as(known.classes))
    return part, lacking(absent, f"no {item.noun} to be {use}")


def _open(data: Any, item: Item, name: str, fewest: int = 2) -> tuple[Source, Labels]:
    try:
        source = item.open(data)
        labels = source.labels()
    except UserError as error:  # which calls every source data=
        raise UserError(re.sub("^data=", f"{name}=", str(error))) from error
    if labels is None:
        remedy = "give a folder with one folder per class, or a list of 'path label' lines"
        if not isinstance(data, str | Path | Sequence):
            remedy = "let each item be a pair of an image and the number of its class"
        raise UserError(f"{name}={_shown(data)} has no labels, which an evaluation needs: {remedy}")
    if len(labels.names) < fewest:
        only = f"{name}={_shown(data)} has only one class ({shown_name(labels.names[0])})"
        raise UserError(f"{only}: an evaluation needs two or more")
    first: dict[str, str] = {}
    for spelling in labels.names:
        before = first.setdefault(plain_spelling(spelling), spelling)
        if before != spelling:
            only = "differ only in case, blanks or Unicode form: write the class in one way"
            both = _quoted([before, spelling])
            raise UserError(f"{name}={_shown(data)}: the classes {both} {only}")
    return source, labels


def lacking(classes: Sequence[str], what: str) -> str:
    """The end of a sentence about classes that have not enough; nothing where there are none."""
    if not classes:
        return ""
    have = "1 class has" if len(classes) == 1 else f"{len(classes):,} classes have"
    return f"; {have} {what}: {_quoted(classes)}"


def _quoted(names: Sequence[str]) -> str:
    """The first of many names, for people."""
    shown = ", ".join(f"'{shown_name(name)}'" for name in names[:5])
    return f"{shown}, ..." if len(names) > 5 else shown


def _shown(data: Any) -> str:
    if isinstance(data, str | Path):
        return shown_name(data)
    if isinstance(data, Sequence):
        return ", ".join(map(_shown, data))
    return type(data).__name__
