"""List files: one image (or video) a line, with a label where there is one.

``.txt``: ``path`` or ``path label``, where the label is the last word behind the image's own ending; lines that start
with ``#`` are remarks.  ``.csv`` and ``.tsv``: columns ``path`` and ``label``, by a head line of these names or in
this order.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchmine.data.contract import IMAGES, ClassNames, Kind, fingerprint_of
from patchmine.data.folder import FileSource
from patchmine.data.index import Index, PathList, index_file, load, save
from patchmine.errors import UserError

LIST_SUFFIXES = (".txt", ".csv", ".tsv")

PATH_HEADS = ("path", "file", "filename", "image", "video")
LABEL_HEADS = ("label", "class", "target")


class Line(NamedTuple):
    """One entry of a list."""

    number: int
    path: str
    label: str | None


def open_list(file: Path, name: str, cache_dir: Path | None, kind: Kind = IMAGES) -> FileSource:
    """The images (or what else ``kind`` says) that a list names, in its order; paths count from the list's own folder.

    The list is read again when its size or time stamp has changed.  UserError when it cannot be read, is empty, names a
    file that does not exist, or gives a label to some images only.
    """
    root = file.parent
    try:
        info = file.stat()
        state = {"size": info.st_size, "changed": info.st_mtime_ns}
        kept_in = index_file(cache_dir, f"list-{kind.name}", os.fspath(file.resolve())) if cache_dir else None
        kept = load(kept_in) if kept_in else None
        if kept is not None and kept.stamp["state"] == state:
            return FileSource(root, kept, name, kind)
        index = _index(file, name, kind)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data={name}: the list cannot be read as UTF-8 text ({error})") from error
    index.stamp["state"] = state
    return FileSource(root, save(index, kept_in) if kept_in else index, name, kind)


def _index(file: Path, name: str, kind: Kind) -> Index:
    paths, classes = PathList(), ClassNames()
    missing, first_missing = 0, Line(0, "", None)
    for line in _text_lines(file, kind) if file.suffix.lower() == ".txt" else _table_lines(file, kind):
        place = file.parent / line.path
        if not (place.is_file() or (kind.folders and place.is_dir())):
            missing += 1
            first_missing = line if missing == 1 else first_missing
        if len(paths) and (line.label is not None) != (len(classes) > 0):
            now, before = ("has a", "have none") if line.label is not None else ("has no", "have one")
            raise UserError(
                f"data={name}: line {line.number} {now} label, the lines before it {before}; give every "
                f"{kind.name} a label, or none"
            )
        paths.add(os.fsencode(line.path))
        if line.label is not None:
            classes.add(line.label)
    if missing:
        raise UserError(
            f"data={name}: line {first_missing.number} names {first_missing.path!r}, which does not exist "
            f"({missing:,} such line{'s' * (missing > 1)}); paths count from the list's folder, {file.parent}"
        )
    if not len(paths):
        raise UserError(
            f"data={name}: the list names no {kind.name}; write one path a line, and a label behind it if you like"
        )
    return _finish(paths, classes)


def _finish(paths: PathList, classes: ClassNames) -> Index:
    columns = paths.columns()
    stamp: dict[str, Any] = {"kind": "list", "fingerprint": fingerprint_of([columns["offsets"], columns["blob"]])}
    if len(classes):
        labels = classes.finish()
        columns["label"], stamp["names"] = labels.ids.astype(np.int32), labels.names
    return Index(columns, stamp)


def _text_lines(file: Path, kind: Kind) -> Iterator[Line]:
    with file.open(encoding="utf-8-sig") as text:
        for number, raw in enumerate(text, 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            # A path may hold blanks, so a line that ends like an image is all path.
            head, blank, label = line.rpartition("\t" if "\t" in line else " ")
            if blank and not line.lower().endswith(kind.suffixes):
                yield Line(number, head.strip(), label.strip())
            else:
                yield Line(number, line, None)


def _table_lines(file: Path, kind: Kind) -> Iterator[Line]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        path_column, label_column = 0, 1
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            heads = [cell.lower() for cell in cells]
            if rows.line_num == 1 and not cells[0].lower().endswith(kind.suffixes) and set(heads) & set(PATH_HEADS):
                path_column = next(place for place, head in enumerate(heads) if head in PATH_HEADS)
                label_column = next((place for place, head in enumerate(heads) if head in LABEL_HEADS), len(heads))
                continue
            path = cells[path_column] if path_column < len(cells) else ""
            label = cells[label_column] if label_column < len(cells) else ""
            yield Line(rows.line_num, path, label or None)
