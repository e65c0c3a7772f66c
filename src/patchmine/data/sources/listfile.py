"""List files: one image (or video) a line, with a label where there is one.

``.txt``: ``path`` or ``path label``; paths with blanks may stand in quotation marks.  ``.csv`` and
``.tsv``: columns ``path`` and ``label``, by a head line or in this order.  ``#`` starts a remark.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
import stat
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.sources import members, parts
from patchmine.data.sources.contract import IMAGES, ClassNames, Kind, data_error
from patchmine.data.sources.folder import FileSource
from patchmine.data.sources.index import Index, Marks, PathList, kept_index, new_index
from patchmine.errors import UserError, foreign_parser, reason_of, shown_name

LONGEST_LINE = 65_536  # letters; paths have 4,096 bytes at most, so what is longer is no list

# Names of columns, in small letters
PATH_HEAD = re.compile(r"path|(image|img|video)(_path|_file)?|file(_?name|_?path)?")
LABEL_HEAD = re.compile(r"labels?|class|target|category|(class|label)_(name|id)")
_QUOTED = re.compile(r'"([^"]+)"\s*([^"]*)')

Line = tuple[int, str, str | None]
"""One entry of a list: its line's number, a path and a label."""


def open_list(file: Path, name: str, cache_dir: Path | None, kind: Kind = IMAGES) -> FileSource:
    """The items that a list names, in its order; paths count from the list's own folder."""
    with foreign_parser(lambda reason: data_error(name, f"the list cannot be read ({reason})")):
        place = file.parent.resolve() / file.name
        index = kept_index(cache_dir, "list", kind, [place], lambda: _index(file, name, kind))
    return FileSource(file.parent, index, name, kind)


def open_files(files: Sequence[str], kind: Kind = IMAGES) -> FileSource:
    """The items that are these files, in their order, without labels."""
    paths, marks, passed_over = PathList(), Marks(), members.PassedOver()
    counts = parts.Counts(kind, marks, passed_over)
    for file in files:
        if counts.add(file, file):
            paths.add(file)
    columns = counts.columns()
    index = new_index(kind, paths, marks, passed_over, columns, listed=True, names=[])
    return FileSource(Path(), index, files[0] if len(files) == 1 else f"{len(files)} files", kind)


def _index(file: Path, name: str, kind: Kind) -> Index:
    marks, paths = Marks(), PathList()
    marks.note("", file.stat())
    classes, passed_over, missing = ClassNames(), members.PassedOver(), members.PassedOver()
    counts = parts.Counts(kind, marks, passed_over)
    entries = _text_lines if file.suffix.lower() == ".txt" else _table_lines
    for number, path, label in entries(file, kind):
        try:
            reason = reason_against(file.parent, path, kind, passed_over)
        except (OSError, DecodeError) as error:
            missing.add("", f"line {number} names '{shown_name(path)}', which {reason_of(error)}")
            continue
        if reason is not None:
            passed_over.add(reason, path)
            continue
        if not counts.add(path, os.path.join(file.parent, path)):  # noqa: PTH118, once a line
            continue
        if len(paths) and (label is not None) != (len(classes) > 0):
            raise half_labelled(name, number, label, kind.name)
        paths.add(path)
        if label is not None:
            classes.add(label)
    refuse_missing(file, name, missing)
    if not len(paths):
        found = "; ".join(passed_over.facts()[:4])
        what = f"the list names no {kind.name}" + (f" ({found})" if found else "")
        raise data_error(name, f"{what}; write one path a line, and a label behind it if you like")
    marks.settled = marks.settled and not any(map(members.may_change, passed_over.found))
    labels = classes.finish()
    columns = counts.columns()
    columns |= {"label": labels.ids.astype(np.int32)} if len(classes) else {}
    notes = _repeats_note(paths, kind)
    stamp = {"listed": True, "names": labels.names}
    return new_index(kind, paths, marks, passed_over, columns, notes, **stamp)


def half_labelled(name: str, number: int, label: str | None, item: str) -> UserError:
    """What is wrong where some lines of a list have a label, and line ``number`` is not as they."""
    now, before = ("has no", "have one") if label is None else ("has a", "have none")
    what = f"line {number} {now} label, the lines before it {before}"
    return data_error(name, f"{what}; give every {item} a label, or none")


def refuse_missing(file: Path, name: str, missing: members.PassedOver) -> None:
    """UserError where lines name what cannot be used, with the first of them."""
    for count, first in missing.found.values():
        such = f"{count:,} such line{'s' * (count > 1)}"
        if file.suffix.lower() != ".txt" and re.match("line [12] ", first):
            such += "; a head line names its columns path and label"
        where = f"paths count from the list's folder, {shown_name(file.parent)}"
        raise data_error(name, f"{first} ({such}); {where}")


def _repeats_note(paths: PathList, kind: Kind) -> list[str]:
    repeated = paths.repeats()
    lines = f"{repeated:,} lines name" if repeated > 1 else "1 line names"
    what = f"{lines} what another {kind.name}'s line names already; it counts each time."
    return [what] if repeated else []


def reason_against(
    folder: Path, path: str, kind: Kind, passed_over: members.PassedOver
) -> str | None:
    """Why a listed path does not count; DecodeError where it names nothing that could be used."""
    place = os.path.join(folder, path)  # noqa: PTH118, once a line
    try:
        mode = os.stat(place).st_mode  # noqa: PTH116, likewise
    except PermissionError as error:
        raise DecodeError(f"cannot be reached ({error.strerror})") from error
    except (OSError, ValueError) as error:  # the latter of a NUL
        raise DecodeError("does not exist") from error
    inside = os.path.relpath(path, folder) if os.path.isabs(path) else path  # noqa: PTH117
    if inside.startswith("../"):
        inside = members.outside_of_root(path)
    if stat.S_ISDIR(mode) and not members.is_array_folder(path, kind):
        if kind.folders is None:
            raise DecodeError("is a folder")
        if members.is_hidden(inside):
            return members.HIDDEN
        kind.folders(place, lambda reason, name: passed_over.add(reason, f"{path}/{name}"))
        return None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return members.NO_FILE
    return members.reason_against(inside, kind, partial(members.head_of, place), listed=True)


def listed_path(path: str, file: Path) -> str:
    """How the list ``file`` names a path: from its own folder on, where it lies below that."""
    folder = os.path.abspath(file.parent).rstrip(os.sep) + os.sep  # noqa: PTH100, links stay
    return os.path.abspath(path).removeprefix(folder)  # noqa: PTH100


def lines_of(file: Path, newline: str | None) -> Iterator[str]:
    """A list's lines, UTF-16 where its first bytes say so; ValueError where it can be no list."""
    with file.open("rb") as handle:
        start = handle.read(4)
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
    with file.open(encoding=encoding, errors=errors, newline=newline) as text:
        number = 0
        while line := text.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                what = f"has {LONGEST_LINE:,} letters or more; a list has one path a line"
                raise ValueError(f"line {number} {what}")
            if "\0" in line:
                raise ValueError(f"line {number} holds a NUL: this is no text, or not in UTF-8")
            yield line


def _text_lines(file: Path, kind: Kind) -> Iterator[Line]:
    for number, raw in enumerate(lines_of(file, None), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if quoted := _QUOTED.fullmatch(line):
            yield number, quoted[1], quoted[2] or None
            continue
        # A path may hold blanks, so a line that ends like an image is all path.
        head, blank, label = line.rpartition("\t" if "\t" in line else " ")
        whole = not blank or line.lower().endswith(kind.suffixes)
        if whole or _is_one_path(file.parent, line, head.strip(), kind):
            yield number, line, None
        else:
            yield number, head.strip(), label.strip()


def _is_one_path(folder: Path, line: str, head: str, kind: Kind) -> bool:
    """Whether a line with blanks has no label: where endings do not tell, the disk does."""
    if head.lower().endswith(kind.suffixes):
        return False
    whole, named = (os.path.join(folder, name) for name in (line, head))  # noqa: PTH118
    return os.path.lexists(whole) and not os.path.lexists(named)


def _table_lines(file: Path, kind: Kind) -> Iterator[Line]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    rows = csv.reader(lines_of(file, ""), delimiter=delimiter)
    path_column, label_column, first = 0, 1, True
    for row in rows:
        cells = [cell.strip() for cell in row]
        is_path = bool(cells) and cells[0].lower().endswith(kind.suffixes)
        if not any(cells) or (cells[0].startswith("#") and not is_path):
            continue
        heads = [cell.lower() for cell in cells]
        is_head = first and not is_path and any(map(PATH_HEAD.fullmatch, heads))
        first = False
        if is_head:
            path_column = next(i for i, head in enumerate(heads) if PATH_HEAD.fullmatch(head))
            labels = (i for i, head in enumerate(heads) if LABEL_HEAD.fullmatch(head))
            label_column = next(labels, len(heads))
            continue
        path = cells[path_column] if path_column < len(cells) else ""
        label = cells[label_column] if label_column < len(cells) else ""
        yield rows.line_num, path, label or None
