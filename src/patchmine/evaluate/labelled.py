"""From what the user typed to labelled images, or videos, for training and for testing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.sources.contract import Labels, Source, division_of
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError, shown_name

Index = NDArray[np.int64]

TEST_SHARE = 0.2
_IN_HALVES = ("embedded:photos", "embedded:moving-photos")


@dataclass(frozen=True)
class Part:
    """Some items of a source: ``indices`` (n,) of those that count, ``labels`` (N,) of all of its
    items, where there are labels.
    """

    source: Source
    indices: Index
    labels: Index | None

    def __len__(self) -> int:
        return len(self.indices)

    def sampled(self, count: int, seed: int = 0) -> Part:
        """At most ``count`` items, drawn by `stratified` where there are labels, in the order of
        the list.
        """
        if count >= len(self):
            return self
        labels = np.zeros(len(self), np.int64) if self.labels is None else self.labels[self.indices]
        return replace(self, indices=self.indices[stratified(labels, count, seed)])


@dataclass(frozen=True)
class LabelledData:
    """Images (or videos) to learn from and such to be tested on, with the same numbering of
    ``classes``.

    ``how``: a sentence for people.
    """

    train: Part
    test: Part
    classes: list[str]
    how: str


def everything(source: Source) -> Part:
    """All items of a source, with labels where it has any."""
    labels = source.labels()
    return Part(source, np.arange(len(source)), None if labels is None else labels.ids)


def open_items(data: Any, *, video: bool) -> Source:
    """The videos or the images that ``data`` names."""
    return open_source(data, "video" if video else "image")


def open_labelled(
    data: Any,
    test: Any = None,
    *,
    video: bool = False,
    settings: tuple[str, str] = ("data", "test"),
) -> LabelledData:
    """Labelled data from one or two sources (anything that ``open_source`` takes).

    ``test`` given: learn from ``data``, test on it.  Else ``data`` with the folders train and test
    (or val), or embedded:photos and embedded:moving-photos, is used as it is divided; of anything
    else the last fifth of each class, in the source's order, is the test.  ``settings``: what the
    two are called in messages.  Raises UserError where there are no labels, fewer than two classes,
    or nothing to test on.
    """
    kind = "video" if video else "image"
    if test is not None:
        return _of_two(
            data, test, kind, settings, f"learns from {_named(data)}, is tested on {_named(test)}"
        )
    if isinstance(data, str | Path):
        if str(data) in _IN_HALVES:
            return _of_two(
                f"{data}/train",
                f"{data}/test",
                kind,
                settings,
                f"the two disjoint halves of {data}",
            )
        inner = _folders(Path(data))
        if inner:
            return _of_two(
                *inner, kind, settings, f"learns from {inner[0]}, is tested on {inner[1]}"
            )
    source, labels = _open(data, kind, settings[0])
    kept, held_out = split_by_class(labels.ids, TEST_SHARE)
    if len(held_out) == 0:
        raise UserError(
            f"{settings[0]}={_named(data)} has one {kind} per class, so none can be tested on: give more, or test=..."
        )
    how = (
        f"{_named(data)} has no part for testing: the last fifth of each class, in the order of the list, is tested on "
        f"({len(held_out):,} of {len(labels.ids):,} {kind}s)"
    )
    return LabelledData(
        Part(source, kept, labels.ids), Part(source, held_out, labels.ids), labels.names, how
    )


def split_by_class(labels: Index, share: float) -> tuple[Index, Index]:
    """Places of the first items of each class and of its last ``share`` (of each at least one,
    unless the class has but one), both ascending.

    The end of the list rather than a random draw, because neighbours in a list are often
    near-duplicates.
    """
    last = np.zeros(len(labels), dtype=bool)
    for number in np.unique(labels):
        places = np.flatnonzero(labels == number)
        if len(places) > 1:
            last[places[-min(len(places) - 1, max(1, round(share * len(places)))) :]] = True
    return np.flatnonzero(~last), np.flatnonzero(last)


def stratified(labels: Index, count: int, seed: int = 0) -> Index:
    """A random draw in which each class keeps its share.

    Never every n-th item: a list in which the classes come in turn would give one class only.

    Args:
        labels: the class of each item, (N,).
        count: how many items to draw, at most N.
        seed: decides the draw.

    Returns:
        Places (count,), ascending.  Every class has at least one where ``count`` allows it, else
        the largest have.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, shuffled within each
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)  # of each item within its class
    size = np.repeat(sizes, sizes)
    # The rank as a share of the class: all classes are used up at the same speed.  The first of
    # each come before all.
    turn = np.where(rank == 0, -size.astype(float), (rank + 0.5) / size)
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def _folders(path: Path) -> tuple[Path, Path] | None:
    """The folders train and test of ``path``, where it has both."""
    try:
        with os.scandir(path) as entries:
            division = division_of([entry.name for entry in entries if entry.is_dir()])
    except OSError:  # no folder, or none that may be read: opening it tells
        return None
    return (path / division[0], path / division[1]) if division else None


def _of_two(data: Any, test: Any, kind: str, settings: tuple[str, str], how: str) -> LabelledData:
    (source, labels), (test_source, test_labels) = (
        _open(data, kind, settings[0]),
        _open(test, kind, settings[1]),
    )
    ids = test_labels.numbered_as(labels.names)
    every, every_test = np.arange(len(source)), np.arange(len(test_source))
    return LabelledData(
        Part(source, every, labels.ids), Part(test_source, every_test, ids), labels.names, how
    )


def _open(data: Any, kind: str, setting: str) -> tuple[Source, Labels]:
    try:
        source = open_items(data, video=kind == "video")
    except UserError as error:  # which calls every source data=
        raise UserError(re.sub("^data=", f"{setting}=", str(error))) from error
    labels = source.labels()
    if labels is None:
        raise UserError(
            f"{setting}={_named(data)} has no labels, which an evaluation needs: "
            "give a folder with one folder per class, "
            "or a list file with 'path label' lines"
        )
    if setting in ("data", "eval_data") and len(labels.names) < 2:
        only = shown_name(labels.names[0])
        raise UserError(
            f"{setting}={_named(data)} has only one class ({only}): an evaluation needs two or more"
        )
    return source, labels


def _named(data: Any) -> str:
    if isinstance(data, str | Path):
        return shown_name(data)
    if isinstance(data, Sequence):
        return ", ".join(map(_named, data))
    return type(data).__name__
