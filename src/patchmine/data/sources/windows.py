"""Lists of windows: each row is a tile of a huge image, which is read where it lies.

A table, .csv or .tsv, as `patchmine data tile` writes it.
"""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.orientation import Box
from patchmine.data.decoding.scenes import SLIDE_SUFFIXES
from patchmine.data.decoding.windows import Window
from patchmine.data.sources import contract, listfile, members
from patchmine.data.sources.index import (
    Index,
    IndexedSource,
    Marks,
    PathList,
    file_identity,
    kept_index,
    new_index,
)
from patchmine.errors import UserError, foreign_parser, reason_of, shown_name

SCENES = contract.Kind("scene", (*contract.PLAIN_SUFFIXES, *SLIDE_SUFFIXES), contract.contents)
"""What tiles are cut of: images, and slides, which are too large to be images of a run."""
TABLE_SUFFIXES = (".csv", ".tsv")

_PLACE = ("x", "y", "width", "height")
_NEEDED = ("path", "level", *_PLACE)
_SCENE = ("scene_width", "scene_height")  # by which a change of the image is noticed

_LARGEST = 2**31 - 1
_ODD = np.uint64(0x9E3779B97F4A7C15)  # by which hashes are multiplied, as Knuth has it
_BESIDE = (".mrxs", ".vms", ".vmu")  # slides whose pixels lie in other files


class Row(NamedTuple):
    """A window in a list: its image's path and level, its place there and the image's size.

    ``scene``: width and height of the image at that level, 0 where they are not told.
    """

    path: str
    level: int
    box: Box
    scene: tuple[int, int]
    label: str | None


def is_window_list(file: Path) -> bool:
    """Whether a file is a table with columns of places; False also of one that cannot be read."""
    if file.suffix.lower() not in TABLE_SUFFIXES or not file.is_file():
        return False
    try:
        with foreign_parser(ValueError, OSError):
            head = {cell.strip().lower() for cell in next(_rows(file), ())}
    except (ValueError, OSError):  # which opening it as any other list will tell
        return False
    return head.issuperset(("level", "x", "y"))


def window_writer(
    handle: IO[str], file: Path, *, labelled: bool
) -> Callable[[Iterable[Row]], None]:
    """What writes windows into an opened table that is to become ``file``; its head stands then."""
    writer = csv.writer(handle, delimiter=_delimiter(file), lineterminator="\n")
    writer.writerow([*_NEEDED, *_SCENE, *(["label"] if labelled else [])])

    def write(rows: Iterable[Row]) -> None:
        for path, level, (top, left, height, width), scene, label in rows:
            cells = [path, level, left, top, width, height, *scene]
            writer.writerow([*cells, label] if labelled else cells)

    return write


def image_in_list(path: str, file: Path, setting: str) -> str:
    """How the list ``file`` names an image; UserError, with the setting, if it would not count."""
    name = listfile.listed_path(path, file)
    with suppress(OSError, DecodeError):  # of what is not there any more, which reading tells
        reason = listfile.reason_against(file.parent, name, SCENES, members.PassedOver())
        if reason is not None:
            what = f"{shown_name(name)} would not count in a list there ({reason})"
            told = f"{setting}={shown_name(file)}: {what}"
            raise UserError(f"{told}; put the list into another folder")
    return name


def open_windows(
    file: Path, name: str, cache_dir: Path | None, kind: contract.Kind
) -> WindowSource:
    """The windows that a table names, in its order; paths count from the table's own folder.

    Raises:
        UserError: a row is no window, its image is not there, or ``kind`` is of videos.
    """
    if kind.name != "image":
        what = f"this lists windows of images, no {kind.name}s"
        raise contract.data_error(name, f"{what}; give a source of {kind.name}s")
    with foreign_parser(
        lambda reason: contract.data_error(name, f"the list cannot be read ({reason})")
    ):
        place = file.parent.resolve() / file.name
        index = kept_index(cache_dir, "windows", SCENES, [place], lambda: _index(file, name))
    return WindowSource(file.parent, index, name)


class WindowSource(IndexedSource):
    """Windows of images: ``index`` is of the images at a level, its columns are of the windows."""

    encoded = True

    def __init__(self, root: Path, index: Index, name: str) -> None:
        super().__init__(name, index)
        self.root = root

    def __len__(self) -> int:
        return len(self.index.columns["scene"])

    def read(self, index: int) -> Window:
        scene, columns = self._scene(index), self.index.columns
        width, height, level = (int(columns[name][scene]) for name in (*_SCENE, "level"))
        size = (height, width) if width else None
        return Window(self._file(scene), level, self._box(index), size)

    def _scene(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return int(self.index.columns["scene"][index])

    def _file(self, scene: int) -> str:
        return os.path.join(self.root, self.index.path(scene))  # noqa: PTH118, once per window

    def _box(self, index: int) -> Box:
        left, top, width, height = (int(self.index.columns[name][index]) for name in _PLACE)
        return top, left, height, width

    def _place(self, index: int) -> str:
        top, left, height, width = self._box(index)
        level = int(self.index.columns["level"][self._scene(index)])
        return f"level{level}_y{top:06d}_x{left:06d}_{width}x{height}"

    def identity(self, index: int) -> bytes | None:
        file = self._file(self._scene(index))
        if file.lower().endswith(_BESIDE):
            return None  # nothing tells the state of the files beside it
        identity = file_identity(file)
        return None if identity is None else b"%b\0%b" % (identity, self._place(index).encode())

    def path(self, index: int) -> str:
        return f"{self._file(self._scene(index))}#{self._place(index)}"

    def key(self, index: int) -> str:
        return f"{self.index.path(self._scene(index))}#{self._place(index)}"

    def labels(self) -> contract.Labels | None:
        ids = self.index.columns.get("label")
        if ids is None:
            return None
        return contract.Labels(ids.astype(np.int64), list(self.index.stamp["names"]))


class _Listing:
    """What is collected of a table: images at a level, and windows of them."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name
        self.paths, self.passed_over = PathList(), members.PassedOver()
        self.missing = members.PassedOver()
        self.scenes = {column: array("i") for column in ("level", *_SCENE)}
        self.windows = {column: array("i") for column in ("scene", *_PLACE)}
        self.classes = contract.ClassNames()
        self._numbers: dict[tuple[str, int, tuple[int, int]], int] = {}
        self._reasons: dict[str, tuple[members.PassedOver, str, str] | None] = {}

    def add(self, number: int, row: Row) -> None:
        """A row, which stands in that line; UserError where others have a label and it has none."""
        if row.path not in self._reasons:
            self._reasons[row.path] = self._against(number, row.path)
        reason = self._reasons[row.path]
        if reason is not None:
            where, why, what = reason
            where.add(why, what)
            return
        if len(self.windows["scene"]) and (row.label is not None) != (len(self.classes) > 0):
            raise listfile.half_labelled(self.name, number, row.label, "window")
        scene = self._numbers.setdefault((*row[:2], row.scene), len(self.paths))
        if scene == len(self.paths):
            self.paths.add(row.path)
            for column, value in zip(self.scenes, (row.level, *row.scene), strict=True):
                self.scenes[column].append(value)
        top, left, height, width = row.box
        for column, value in zip(self.windows, (scene, left, top, width, height), strict=True):
            self.windows[column].append(value)
        if row.label is not None:
            self.classes.add(row.label)

    def _against(self, number: int, path: str) -> tuple[members.PassedOver, str, str] | None:
        """Where it is to be counted that an image cannot be used, and why."""
        try:
            reason = listfile.reason_against(self.file.parent, path, SCENES, self.passed_over)
        except (OSError, DecodeError) as error:
            told = f"line {number} names '{shown_name(path)}', which {reason_of(error)}"
            return self.missing, "", told
        return None if reason is None else (self.passed_over, reason, path)


def _index(file: Path, name: str) -> Index:
    marks, listing = Marks(), _Listing(file, name)
    marks.note("", file.stat())
    for number, row in _read(file, name):
        listing.add(number, row)
    listfile.refuse_missing(file, name, listing.missing)
    found = "; ".join(listing.passed_over.facts()[:4])
    if not len(listing.paths):
        told = f"the list names no window{f' ({found})' if found else ''}"
        raise contract.data_error(name, f"{told}; `patchmine data tile` writes such lists")
    marks.settled = marks.settled and not any(map(members.may_change, listing.passed_over.found))
    columns = {
        column: np.frombuffer(values, np.int32)
        for column, values in (listing.scenes | listing.windows).items()
    }
    parts = [*listing.paths.columns().values(), *(columns[name] for name in sorted(columns))]
    labels = listing.classes.finish()
    stamp = {"names": labels.names, "fingerprint": contract.fingerprint_of(parts)}
    notes = _notes(listing, columns)
    columns |= {"label": labels.ids.astype(np.int32)} if len(listing.classes) else {}
    return new_index(SCENES, listing.paths, marks, listing.passed_over, columns, notes, **stamp)


def _notes(listing: _Listing, columns: dict[str, np.ndarray]) -> list[str]:
    count = len(columns["scene"])
    images = f"{len(listing.paths):,} image{'s' * (len(listing.paths) > 1)}"
    notes = [f"{count:,} windows of {images} are read where they lie."]
    hashes = np.zeros(count, np.uint64)
    for name in ("scene", *_PLACE):
        hashes = (hashes + columns[name].astype(np.uint64)) * _ODD
        hashes ^= hashes >> np.uint64(32)
    repeated = count - len(np.unique(hashes))
    if repeated:
        lines = f"{repeated:,} lines name" if repeated > 1 else "1 line names"
        notes.append(f"{lines} a window that another line names already; it counts each time.")
    return notes


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _rows(file: Path) -> Iterator[list[str]]:
    return csv.reader(listfile.lines_of(file, ""), delimiter=_delimiter(file), strict=True)


def _read(file: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Number of the line and the window of each row; UserError where it is none."""
    reader: Any = _rows(file)
    heads = [cell.strip().lower() for cell in next(reader)]
    columns = _columns(heads, name)
    for cells in reader:
        if not any(cells):
            continue
        try:
            yield reader.line_num, _row(cells, columns, len(heads))
        except _RowError as error:
            told = f"line {reader.line_num} {error}"
            remedy = "mend or remove it, or list the tiles again"
            raise contract.data_error(name, f"{told}; {remedy}") from error


def _columns(heads: Sequence[str], name: str) -> dict[str, int]:
    """Places of the columns; UserError where one is missing or comes twice."""

    def refuse(what: str) -> UserError:
        return contract.data_error(name, f"{what}; a list of windows has {', '.join(_NEEDED)}")

    twice = next((head for head in heads if head and heads.count(head) > 1), None)
    if twice is not None:
        raise refuse(f"the head has two columns {shown_name(twice)!r}")
    columns = {head: place for place, head in enumerate(heads) if head in _NEEDED + _SCENE}
    for column, pattern in (("path", listfile.PATH_HEAD), ("label", listfile.LABEL_HEAD)):
        place = next((place for place, head in enumerate(heads) if pattern.fullmatch(head)), None)
        if place is not None:
            columns[column] = place
    absent = [head for head in _NEEDED if head not in columns]
    if absent:
        raise refuse(f"the head has no column {absent[0]}")
    return columns


class _RowError(ValueError):
    """What is wrong with a row, behind its number."""


def _row(cells: Sequence[str], columns: dict[str, int], width: int) -> Row:
    """The window in a row."""
    if len(cells) != width:
        raise _RowError(f"has {len(cells)} cells, the head {width}")

    def number(column: str, least: int) -> int:
        text = cells[columns[column]].strip() if column in columns else "0"
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not least <= value <= _LARGEST:
            must = f"a whole number from {least} on"
            raise _RowError(f"says {column}={shown_name(text)!r}, which must be {must}")
        return value

    path = cells[columns["path"]]
    if not path:
        raise _RowError("has no path")
    left, top = number("x", 0), number("y", 0)
    box = (top, left, number("height", 1), number("width", 1))
    scene = (number("scene_width", 0), number("scene_height", 0))
    if all(scene) and (left + box[3] > scene[0] or top + box[2] > scene[1]):
        raise _RowError(f"names a window outside of its image of {scene[0]}x{scene[1]} pixels")
    label = cells[columns["label"]].strip() if "label" in columns else ""
    return Row(path, number("level", 0), box, scene if all(scene) else (0, 0), label or None)
