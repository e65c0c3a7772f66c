"""A table about a source's items: a CSV file with a head, and a row for each item.

A million rows are read one by one; what is kept of each is its item and its number.
"""

from __future__ import annotations

import csv
import difflib
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

from patchmine.data.sources.contract import Source
from patchmine.data.sources.listfile import LABEL_HEAD, PATH_HEAD, lines_of
from patchmine.errors import UserError, foreign_parser, shown_name

_DELIMITERS = ",;\t"
_SEVERAL = -1

# What a table may call item i, in the order of trust.
_NAMES: tuple[Callable[[Source, int], str], ...] = (
    lambda source, i: source.key(i),
    lambda source, i: source.path(i),
    lambda source, i: source.key(i).partition("/")[2] or source.key(i),  # without first folder
    lambda source, i: source.key(i).rpartition(".")[0] or source.key(i),  # without ending
)


class Table:
    """The rows of a table with the items that they name.

    Args:
        file: of UTF-8, or UTF-16 with a byte order mark; commas, semicolons or tabs between cells.
        source: the items.
        file_column: that names them.  None: the one called file, image or path, else the first.

    Attributes:
        header: names of the columns.
        items: places in the source of the rows that `cells` has given so far.
        numbers: the number of each of these rows; the head is row 1.
    """

    def __init__(self, file: Path, source: Source, file_column: str | None) -> None:
        self.name, self.source = f"labels={shown_name(file)}", source
        self.items, self.numbers = array("q"), array("q")
        self._of_source = f"data={shown_name(source.name)}"
        self._find = _finder(source)
        self._rows = self._read(file)
        _, head = next(self._rows, (0, []))
        self.header = [cell.strip() for cell in head]
        if len(self.header) < 2:
            told = f"one column, {quoted(self.header[0])}" if self.header else "no rows"
            raise self.error(f"has {told}; a table has a column of files and one of labels")
        twice = next((name for name in self.header if self.header.count(name) > 1), None)
        if twice is not None:
            raise self.error(f"has two columns {quoted(twice)}")
        heads = [i for i, name in enumerate(self.header) if PATH_HEAD.fullmatch(name.lower())]
        self._file = self._place(file_column) if file_column is not None else [*heads, 0][0]

    def error(self, what: str, row: int | None = None) -> UserError:
        """What is wrong with the table, or with one row."""
        return UserError(f"{self.name}: {'' if row is None else f'row {row}: '}{what}")

    def head_item(self) -> int | None:
        """The item that the head names, which then is a row as any other."""
        return self._find(self.header[self._file])

    def columns(self, column: str | None) -> list[int]:
        """Places of the columns that a person names, or of the only one that can be meant."""
        if column is not None:
            names = [column] if column in self.header else column.split(",")
            places = [self._place(name.strip()) for name in names]
            if self._file in places:
                told = f"column={column}: {quoted(self.header[self._file])} names the files"
                raise self.error(f"{told}; choose a column of labels")
            return places
        others = [i for i in range(len(self.header)) if i != self._file]
        labels = [i for i in others if LABEL_HEAD.fullmatch(self.header[i].lower())]
        found = others if len(others) == 1 else labels
        if len(found) != 1:
            raise self.error(f"has {self._shown_header()}: choose one with column=...")
        return found

    def cells(self, places: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
        """Number of each row and its cells at ``places``; UserError where it names no item."""
        width, strangers, first = len(self.header), 0, (0, "")
        for number, row in self._rows:
            if any(row[width:]):
                told = f"has {len(row)} cells, the head {width}"
                raise self.error(f"{told}: a cell with a delimiter needs quotation marks", number)
            row += [""] * (width - len(row))
            item = self._find(row[self._file].strip())
            if item is None or item == _SEVERAL:
                first = first if strangers else (number, row[self._file].strip())
                strangers += 1
                continue
            self.items.append(item)
            self.numbers.append(number)
            yield number, [row[place] for place in places]
        if strangers:
            raise self._strange(strangers, *first)
        if not self.items:
            raise self.error("has a head and no rows below it")

    def _strange(self, count: int, number: int, cell: str) -> UserError:
        such = f" ({count:,} such rows)" if count > 1 else ""
        if self._find(cell) == _SEVERAL:
            told = f"{quoted(cell)} may be several items of {self._of_source}{such}"
            return self.error(f"{told}: write more of the path", number)
        told = f"{quoted(cell)} is no item of {self._of_source}{such}"
        return self.error(f"{told}, which are named like {quoted(self.source.key(0))}", number)

    def _place(self, name: str) -> int:
        if name in self.header:
            return self.header.index(name)
        near = difflib.get_close_matches(name, self.header, n=3)
        known = f"near: {', '.join(map(shown_name, near))}" if near else self._shown_header()
        raise self.error(f"has no column {quoted(name)}; {known}")

    def _shown_header(self) -> str:
        names = [shown_name(name) for name in self.header[:10]]
        return f"the columns {', '.join(names)}{', ...' if len(self.header) > 10 else ''}"

    def _read(self, file: Path) -> Iterator[tuple[int, list[str]]]:
        """Number and cells of the rows that are not blank."""
        if not file.is_file():  # a pipe would be waited for
            raise self.error("is no file" if file.exists() else "does not exist")
        number = 0

        def refuse(reason: str) -> UserError:
            return self.error(f"cannot be read ({reason})", number + 1)

        with foreign_parser(refuse):
            lines = lines_of(file, "")
            head = next(lines, "")
            widths = {
                mark: len(next(csv.reader([head], delimiter=mark), "")) for mark in _DELIMITERS
            }
            delimiter = max(_DELIMITERS, key=widths.__getitem__)
            rows = csv.reader(
                chain([head], lines), delimiter=delimiter, skipinitialspace=True, strict=True
            )
            for number, row in enumerate(rows, 1):  # which `refuse` tells
                if any(row):
                    yield number, row


def quoted(cell: str) -> str:
    """A cell for people."""
    return f"'{shown_name(cell)}'"


def _finder(source: Source) -> Callable[[str], int | None]:
    """From a name to the place of its item; None for a stranger, `_SEVERAL` where it is not one."""

    @cache
    def places(form: int) -> dict[str, int]:
        name, found = _NAMES[form], dict[str, int]()
        for i in range(len(source)):
            text = name(source, i)
            found[text] = i if text not in found else _SEVERAL
        return found

    def find(name: str) -> int | None:
        without_folder = name.replace("\\", "/").partition("/")[2]
        several = None
        for form, text in ((0, name), (0, without_folder), (1, name), (2, name), (3, name)):
            place = places(form).get(text)
            if place is not None and place != _SEVERAL:
                return place
            several = place if several is None else several
        return several

    return find
