"""List files: one image (or video) a line, with a label where there is one.

``.txt``: ``path`` or ``path label``, where the label is the last word behind the image's own
ending, or what stands behind a path in quotation marks.  ``.csv`` and ``.tsv``: columns ``path``
and ``label``, by a head line of these (or similar) names or in this order.  Lines that start with
``#`` are remarks.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from patchmine.data.decoding.decode import DecodeError
from patchmine.data.sources.contract import IMAGES, ClassNames, Kind, fingerprint_of
from patchmine.data.sources.folder import FileSource
from patchmine.data.sources.index import Index, PathList, index_file, is_recent, load, mark_of, save
from patchmine.data.sources.members import (
    HIDDEN,
    NO_FILE,
    PassedOver,
    head_of,
    is_hidden,
    outside_of_root,
    reason_against,
    rule_of,
)
from patchmine.errors import UserError, foreign_parser, shown_name

LIST_SUFFIXES = (".txt", ".csv", ".tsv")

PATH_HEADS = (
    *(
        "path",
        "file",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "image_file",
        "img",
    ),
    *("img_path", "video", "video_path", "video_file"),
)
LABEL_HEADS = (
    "label",
    "class",
    "target",
    "category",
    "labels",
    "class_name",
    "label_name",
    "class_id",
    "label_id",
)

_QUOTED = re.compile(r'"([^"]+)"\s*([^"]*)')

LONGEST_LINE = 65_536
"""Letters.  Paths have 4,096 bytes at most, so what is longer is no list."""


class Line(NamedTuple):
    """One entry of a list."""

    number: int
    path: str
    label: str | None


def open_list(file: Path, name: str, cache_dir: Path | None, kind: Kind = IMAGES) -> FileSource:
    """The images (or what else ``kind`` says) that a list names, in its order; paths count from the
    list's own folder.

    The list is read again when the file has changed.  Notes say how many lines are passed over, and
    why.  UserError when it cannot be read, is empty, names a file that does not exist, or gives a
    label to some images only.
    """
    root, started = file.parent, time.time_ns()
    with foreign_parser(
        lambda reason: UserError(f"data={shown_name(name)}: the list cannot be read ({reason})")
    ):
        info = file.stat()
        kept_in = (
            index_file(cache_dir, f"list-{kind.name}", os.fspath(file.parent.resolve() / file.name))
            if cache_dir
            else None
        )
        kept = load(kept_in) if kept_in else None
        if (
            kept is not None
            and kept.stamp["rule"] == rule_of(kind)
            and kept.stamp["mark"] == mark_of(info)
        ):
            return FileSource(root, kept, name, kind)
        index = _index(file, name, kind)
    is_kept = index.stamp["settled"] and not is_recent(info, started)
    index.stamp |= {"rule": rule_of(kind), "mark": mark_of(info) if is_kept else None}
    return FileSource(root, save(index, kept_in) if kept_in else index, name, kind)


def _index(file: Path, name: str, kind: Kind) -> Index:
    paths, classes, passed_over = PathList(), ClassNames(), PassedOver()
    missing, first_missing = 0, ""
    known, repeated = set[int](), 0
    for line in (
        _text_lines(file, kind) if file.suffix.lower() == ".txt" else _table_lines(file, kind)
    ):
        try:
            reason = _reason_against(file.parent, line.path, kind, passed_over)
        except (OSError, DecodeError) as error:
            missing += 1
            first_missing = (
                first_missing
                or f"line {line.number} names '{shown_name(line.path)}', {_why(error)}"
            )
            continue
        if reason is not None:
            passed_over.add(reason, line.path)
            continue
        if len(paths) and (line.label is not None) != (len(classes) > 0):
            now, before = (
                ("has a", "have none") if line.label is not None else ("has no", "have one")
            )
            raise UserError(
                f"data={shown_name(name)}: line {line.number} {now} label, the lines before it {before}; give every "
                f"{kind.name} a label, or none"
            )
        paths.add(os.fsencode(line.path))
        if line.label is not None:
            classes.add(line.label)
        number = hash(line.path)
        repeated += number in known
        known.add(number)
    if missing:
        raise _missing_error(file, name, missing, first_missing)
    if not len(paths):
        found = "; ".join(
            f"{reason}: {count:,}, as {first}" for reason, count, first in passed_over.facts()[:4]
        )
        raise UserError(
            f"data={shown_name(name)}: the list names no {kind.name}{f' ({found})' if found else ''}; write one path a "
            "line, and a label behind it if you like"
        )
    return _finish(paths, classes, passed_over, _repeats_note(name, repeated, kind))


def _missing_error(file: Path, name: str, missing: int, first: str) -> UserError:
    such = f"{missing:,} such line{'s' * (missing > 1)}"
    if file.suffix.lower() != ".txt" and re.match("line [12] ", first):
        such += "; a head line names its columns path and label"
    return UserError(
        f"data={shown_name(name)}: {first} ({such}); paths count from the list's folder, {shown_name(file.parent)}"
    )


def _repeats_note(name: str, repeated: int, kind: Kind) -> list[str]:
    if not repeated:
        return []
    lines = f"{repeated:,} lines name" if repeated > 1 else "1 line names"
    return [
        f"data={shown_name(name)}: {lines} what another {kind.name}'s line names already; it counts each time."
    ]


def _reason_against(folder: Path, path: str, kind: Kind, passed_over: PassedOver) -> str | None:
    """Why a listed path does not count; OSError where there is nothing of that name, DecodeError of
    a wrong folder.
    """
    place = os.path.join(folder, path)  # noqa: PTH118, once a line
    try:
        mode = os.stat(place).st_mode  # noqa: PTH116, likewise
    except ValueError as error:  # a NUL
        raise FileNotFoundError(str(error)) from error
    inside = os.path.relpath(path, folder) if os.path.isabs(path) else path  # noqa: PTH117
    if inside.startswith("../"):
        inside = outside_of_root(path)
    if stat.S_ISDIR(mode):
        if kind.folders is None:
            raise IsADirectoryError("a folder")
        if is_hidden(inside):
            return HIDDEN
        kind.folders(place, lambda reason, name: passed_over.add(reason, f"{path}/{name}"))
        return None
    if not stat.S_ISREG(mode):
        return NO_FILE
    return reason_against(inside, kind, partial(head_of, place), listed=True)


def _why(error: OSError | DecodeError) -> str:
    if isinstance(error, DecodeError):
        return f"which {error}"
    if isinstance(error, IsADirectoryError):
        return "which is a folder"
    return (
        f"which cannot be reached ({error.strerror})"
        if isinstance(error, PermissionError)
        else "which does not exist"
    )


def _finish(
    paths: PathList, classes: ClassNames, passed_over: PassedOver, notes: list[str]
) -> Index:
    columns = paths.columns()
    fingerprint = fingerprint_of([columns["offsets"], columns["blob"]])
    stamp: dict[str, Any] = {"kind": "list", "fingerprint": fingerprint}
    stamp |= {"passed_over": passed_over.facts(), "settled": passed_over.is_final(), "notes": notes}
    if len(classes):
        labels = classes.finish()
        columns["label"], stamp["names"] = labels.ids.astype(np.int32), labels.names
    return Index(columns, stamp)


def _open(file: Path, newline: str | None) -> IO[str]:
    """The list as text: UTF-8, or UTF-16 where its first bytes say so; names that are no UTF-8 keep
    their bytes.
    """
    with file.open("rb") as handle:
        start = handle.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return file.open(encoding="utf-16", newline=newline)
    return file.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _lines(text: IO[str]) -> Iterator[str]:
    """The lines of a file that is a list; ValueError where it cannot be one."""
    number = 0
    while line := text.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise ValueError(
                f"line {number} has {LONGEST_LINE:,} letters or more; a list has one path a line"
            )
        if "\0" in line:
            raise ValueError(f"line {number} holds a NUL: this is no text, or not in UTF-8")
        yield line


def _text_lines(file: Path, kind: Kind) -> Iterator[Line]:
    with _open(file, None) as text:
        for number, raw in enumerate(_lines(text), 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            quoted = _QUOTED.fullmatch(line)
            if quoted:
                yield Line(number, quoted[1], quoted[2] or None)
                continue
            # A path may hold blanks, so a line that ends like an image is all path.
            head, blank, label = line.rpartition("\t" if "\t" in line else " ")
            if (
                blank
                and not line.lower().endswith(kind.suffixes)
                and not _is_one_path(file.parent, line, head, kind)
            ):
                yield Line(number, head.strip(), label.strip())
            else:
                yield Line(number, line, None)


def _is_one_path(folder: Path, line: str, head: str, kind: Kind) -> bool:
    """Whether a line with blanks is a path without a label: where endings do not tell, the disk
    does.
    """
    if head.strip().lower().endswith(kind.suffixes):
        return False
    whole, named = (os.path.join(folder, name) for name in (line, head.strip()))  # noqa: PTH118
    return os.path.lexists(whole) and not os.path.lexists(named)


def _table_lines(file: Path, kind: Kind) -> Iterator[Line]:
    with _open(file, "") as text:
        rows = csv.reader(_lines(text), delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        path_column, label_column, first = 0, 1, True
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells) or (
                cells[0].startswith("#") and not cells[0].lower().endswith(kind.suffixes)
            ):
                continue
            heads = [cell.lower() for cell in cells]
            if (
                first
                and not cells[0].lower().endswith(kind.suffixes)
                and set(heads) & set(PATH_HEADS)
            ):
                path_column = next(place for place, head in enumerate(heads) if head in PATH_HEADS)
                label_column = next(
                    (place for place, head in enumerate(heads) if head in LABEL_HEADS), len(heads)
                )
                first = False
                continue
            first = False
            path = cells[path_column] if path_column < len(cells) else ""
            label = cells[label_column] if label_column < len(cells) else ""
            yield Line(rows.line_num, path, label or None)
