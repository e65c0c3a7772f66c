"""What is learnt of each item, from a column of a table: classes, sets of labels, or numbers."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchmine.data.sources.contract import ClassNames, Source, plain_spelling
from patchmine.data.sources.selected import Values
from patchmine.data.sources.table import Table, quoted
from patchmine.errors import shown_name

_SEPARATOR = re.compile(r"[|;]")  # between the labels of one cell
_NO_LABEL = {"", "nan", "#n/a"}  # as pandas and Excel write it
_SWITCHES = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
_LARGEST = float(np.finfo(np.float32).max)
_MOST_LABELS = 2**31  # numbers in a table of items and labels: 8 GB


@dataclass(frozen=True)
class Targets:
    """What a table says of a source's items.

    Attributes:
        indices: (n,) int64, places in the source, ascending: all of them.
        values: (n,) int64, places in ``names``; or (n, K) float32, a column for each of ``names``.
        names: of the classes in the order of `ClassNames`, or of the columns.
    """

    indices: NDArray[np.int64]
    values: Values
    names: list[str]


def read_targets(
    table: str | Path,
    source: Source,
    *,
    column: str | None,
    file_column: str | None = None,
    loss: Literal["ce", "bce", "mse"],
) -> Targets:
    """What a table says of every item.

    Args:
        table: a CSV file with a head, and ``,``, ``;`` or tabs between cells.
        source: whose items the rows name: by key or path, also, where that is unique, without the
            first folder or without the ending.
        column: what is learnt; with bce and mse also several columns, with commas between them.
            None: the one beside the files', or the one called label, class or target.
        file_column: what names the items.  None: the one called file, image or path, else the
            first.
        loss: "ce": the text of a cell is a class.  "bce": a cell holds any number of labels, with
            ``|`` or ``;`` between them, or 0 or 1.  "mse": a cell is a number.

    Raises:
        UserError: the table cannot be read, an item has no row or rows that differ, a row has no
            item, or a label is missing, no number, or written in two ways.
    """
    rows = Table(Path(table), source, file_column)
    places = rows.columns(column)
    if loss == "ce" and len(places) > 1:
        raise rows.error(f"column={column} names {len(places)} columns, and loss=ce learns one")
    values: Values
    if loss == "ce":
        values, names = _classes(rows, places[0])
    elif loss == "bce" and len(places) == 1:
        values, names = _label_sets(rows, places[0])
    else:
        values, names = _numbers(rows, places, loss)
    targets = _in_order(rows, values, names)
    if loss == "ce" and len(names) == 1:
        one = f"all rows have the label {quoted(names[0])}"
        raise rows.error(f"{one}: with one class there is nothing to tell apart")
    return targets


def _classes(rows: Table, place: int) -> tuple[NDArray[np.int64], list[str]]:
    """(rows,) the class of each, and their names."""
    names, spellings = ClassNames(), _Spellings(rows)
    for number, (cell,) in rows.cells([place]):
        names.add(spellings.name(cell, number))
    labels = names.finish()
    return labels.ids, labels.names


def _label_sets(rows: Table, place: int) -> tuple[NDArray[np.float32], list[str]]:
    """(rows, K) which labels each cell holds, and their names."""
    names, spellings, counts = ClassNames(), _Spellings(rows), array("q")
    for number, (cell,) in rows.cells([place]):
        parts = [part.strip() for part in _SEPARATOR.split(cell) if part.strip()]
        for part in parts:
            names.add(spellings.name(part, number))
        counts.append(len(parts))
    labels, column = names.finish(), rows.header[place]
    if not labels.names:
        raise rows.error(f"no cell of column {quoted(column)} holds a label")
    if {*labels.names} <= {"0", "1"}:  # not two labels: the column is one
        other = np.flatnonzero(np.array(counts) != 1)
        if len(other):
            raise rows.error(f"{shown_name(column)} is neither 0 nor 1", rows.numbers[other[0]])
        ones = np.array([name == "1" for name in labels.names], np.float32)
        return ones[labels.ids][:, None], [column]
    if len(counts) * len(labels.names) > _MOST_LABELS:
        many = f"{len(labels.names):,} different labels in {len(counts):,} rows"
        raise rows.error(f"column {quoted(column)} holds {many}: choose a column of labels")
    values = np.zeros((len(counts), len(labels.names)), np.float32)
    values[np.repeat(np.arange(len(counts)), counts), labels.ids] = 1
    return values, labels.names


def _numbers(
    rows: Table, places: Sequence[int], loss: str
) -> tuple[NDArray[np.float32], list[str]]:
    """(rows, K) the numbers of K columns, with bce 0 or 1, and the columns' names."""
    names, numbers = [rows.header[place] for place in places], array("f")
    for number, cells in rows.cells(places):
        for name, cell in zip(names, cells, strict=True):
            value = _SWITCHES.get(cell.strip().lower()) if loss == "bce" else _number(cell)
            if value is None and not cell.strip():
                raise rows.error(f"{shown_name(name)} is missing", number)
            if value is None:
                wanted = "neither 0 nor 1" if loss == "bce" else "no finite number"
                hint = ": write a decimal point" if re.fullmatch(r"[+-]?\d+,\d+", cell) else ""
                raise rows.error(f"{shown_name(name)}={quoted(cell)} is {wanted}{hint}", number)
            numbers.append(value)
    return np.frombuffer(numbers, np.float32).reshape(-1, len(places)), names


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= _LARGEST else None


def _in_order(rows: Table, values: Values, names: list[str]) -> Targets:
    """The rows' values in the order of the source; UserError unless each item has one."""
    items = np.frombuffer(rows.items, np.int64)
    order = np.argsort(items, kind="stable")  # rows of one item are neighbours then
    again = np.diff(items[order]) == 0
    first, second = order[:-1][again], order[1:][again]
    unlike = values[first] != values[second]
    differs = np.flatnonzero(unlike.any(1) if unlike.ndim > 1 else unlike)
    if len(differs):
        row, other = first[differs[0]], second[differs[0]]
        twice = f"{shown_name(rows.source.key(int(items[row])))} has {_told(values[other], names)}"
        before = f"{_told(values[row], names)} in row {rows.numbers[row]}"
        raise rows.error(f"{twice} here and {before}: keep one of the two", rows.numbers[other])
    order = order[np.append(True, ~again)]
    indices = items[order]
    if missing := len(rows.source) - len(indices):
        lacking = np.setdiff1d(np.arange(len(rows.source)), indices, assume_unique=True)
        head = rows.head_item()
        if head is not None and head in lacking:
            told = f"{quoted(rows.source.key(head))} is an item, not the head of a column"
            raise rows.error(f"{told}: begin with a row as 'file,label'", 1)
        such = f"{missing:,} of the {len(rows.source):,} items of data={rows.source.name}"
        example = f"the first is {shown_name(rows.source.key(int(lacking[0])))}"
        raise rows.error(f"has no row for {such} ({example}): label them, or leave them out")
    return Targets(indices, values[order], names)


def _told(value: Any, names: list[str]) -> str:
    """A label for people."""
    if np.ndim(value) == 0:
        return f"the label {quoted(names[int(value)])}"
    return shown_name(", ".join(f"{name}={x:g}" for name, x in zip(names, value, strict=True)))


class _Spellings:
    """Sees to it that a class is written in one way."""

    def __init__(self, rows: Table) -> None:
        self._rows = rows
        self._names: dict[str, str] = {}  # by cell
        self._first: dict[str, tuple[str, int]] = {}  # by what all spellings have in common

    def name(self, cell: str, number: int) -> str:
        """The class that a cell of row ``number`` names."""
        known = self._names.get(cell)
        if known is None:
            known = self._names[cell] = self._new(cell, number)
        return known

    def _new(self, cell: str, number: int) -> str:
        name = cell.strip()
        if name.lower() in _NO_LABEL:
            told = f"the label is {quoted(name)}" if name else "the label is missing"
            raise self._rows.error(f"{told}: give the item one, or leave it out", number)
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # a byte that is no UTF-8
            told = f"the label {quoted(name)} is not in UTF-8: save the table in that encoding"
            raise self._rows.error(told, number)
        before, row = self._first.setdefault(plain_spelling(cell), (cell, number))
        if before != cell:
            same = f"the label {quoted(cell)} differs from {quoted(before)} in row {row}"
            only = "only in case, blanks or Unicode form: write the class in one way"
            raise self._rows.error(f"{same} {only}", number)
        return name
