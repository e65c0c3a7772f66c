"""A list file of the items to keep, which ``data=`` reads."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Kind, Labels, Source
from patchmine.data.sources.folder import FileSource, FrameFolders
from patchmine.data.sources.listfile import listed_path, open_list
from patchmine.data.sources.windows import (
    TABLE_SUFFIXES,
    Row,
    WindowSource,
    image_in_list,
    window_writer,
)
from patchmine.errors import UserError, shown_name


def refuse_unlisted(source: Source, file: Path) -> None:
    """UserError where items are neither files of their own nor tiles, which a list could name."""
    setting = f"dedup={shown_name(file)}"
    if isinstance(source, WindowSource):
        if file.suffix.lower() not in TABLE_SUFFIXES:
            raise UserError(f"{setting}: a list of tiles ends in {' or '.join(TABLE_SUFFIXES)}")
        return
    parts = source.parts if isinstance(source, Joined) else [source]
    for part in parts:
        if not isinstance(part, FileSource | FrameFolders):
            what = f"the items of data={shown_name(part.name)} are no files that a list could name"
            raise UserError(f"{setting}: {what}; give the folder of images that it was made of")


def write_list(source: Source, kept: Sequence[int], new: Path, file: Path, kind: Kind) -> None:
    """Write ``new``, which is to become ``file`` beside it: the items ``kept``, with their classes.

    Paths count from the list's folder where they lie below it, else they are whole.

    Raises:
        UserError: there is none to keep, or a name cannot stand in such a list.
    """
    told = f"dedup={shown_name(file)}"
    if not len(kept):
        raise UserError(f"{told}: no {kind.name} of data={shown_name(source.name)} can be read")
    labels = _labels(source)
    if isinstance(source, WindowSource):
        _write_windows(source, labels, kept, new, file)
        return
    paths = [listed_path(source.path(index), file) for index in kept]
    names = [labels.names[labels.ids[index]] for index in kept] if labels else [""] * len(paths)
    with new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        if file.suffix.lower() == ".txt":
            handle.writelines(
                f'"{path}" {name}'.rstrip() + "\n" for path, name in zip(paths, names, strict=True)
            )
        else:
            delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
            writer = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
            writer.writerow(["path", "label"])
            writer.writerows(zip(paths, names, strict=True))
    # Opened as data= opens it: a name with a line break or a quotation mark, and a hidden folder
    # below the list's, cannot stand in every list.
    try:
        listed = open_list(new, told, None, kind)
        found = [listed.key(number) for number in range(len(listed))]
    except UserError:
        found = []
    if found != paths:
        pairs = zip(paths, [*found, *[""] * len(paths)], strict=False)
        lost = next((path for path, other in pairs if path != other), paths[0])
        raise UserError(
            f"{told}: the name {shown_name(lost)!r} cannot stand in this list; rename the file, or "
            "write the list to another folder, or as .csv"
        )


def _write_windows(
    source: WindowSource, labels: Labels | None, kept: Sequence[int], new: Path, file: Path
) -> None:
    with new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        write = window_writer(handle, file, labelled=labels is not None)
        for index in kept:
            window = source.read(index)
            height, width = window.scene or (0, 0)
            label = None if labels is None else labels.names[labels.ids[index]]
            path = image_in_list(window.path, file, "dedup")
            write([Row(path, window.level, window.box, (width, height), label)])


def _labels(source: Source) -> Labels | None:
    try:
        return source.labels()
    except UserError:  # which the report tells
        return None
