"""Images, or videos, that lie as files: a folder of any nesting, or whatever a list file names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.contract import IMAGES, ClassNames, Kind, Labels, fingerprint_of
from patchmine.data.index import Index, PathList, index_file, load, save
from patchmine.errors import UserError

NoteFolder = Callable[[bytes, int], None]

RECENT = 2_000_000_000
"""Nanoseconds: a folder changed so shortly before it was listed could change again without a new time stamp."""


class FileSource:
    """Files below ``root``, or elsewhere where a list gives absolute paths.

    ``index`` holds their paths; its column ``label`` and the stamp's ``names`` hold the classes, where a list gave any.
    """

    def __init__(self, root: Path, index: Index, name: str, kind: Kind = IMAGES) -> None:
        self.root, self.index, self.name, self.kind = root, index, name, kind
        self.fingerprint: str = index.stamp["fingerprint"]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> Any:
        """The file's bytes; of a video, what opens it."""
        return self.kind.read(self.path(index))

    def path(self, index: int) -> str:
        """Where the file lies."""
        return os.path.join(self.root, self.index.path(index))  # noqa: PTH118, once per image

    def key(self, index: int) -> str:
        """The path below the root, as listed."""
        return self.index.path(index)

    def labels(self) -> Labels | None:
        """The list's classes, or the first folder below the root; None where a file has none."""
        if "label" in self.index.columns:
            return Labels(self.index.columns["label"].astype(np.int64), list(self.index.stamp["names"]))
        return _class_folders(self.index) if self.index.stamp["kind"] == "folder" else None


def open_folder(root: Path, name: str, cache_dir: Path | None, kind: Kind = IMAGES) -> FileSource:
    """All images (or what else ``kind`` says) below a folder, sorted by path.

    Hidden names and links that lead nowhere are passed over.

    The listing is kept in ``cache_dir`` and used again as long as no folder in it has changed.  A source without items
    is given back as such.  UserError when a folder may not be read.
    """
    file = index_file(cache_dir, f"folder-{kind.name}", os.fspath(root.resolve())) if cache_dir else None
    kept = load(file) if file else None
    if kept is not None and _is_fresh(kept, root):
        return FileSource(root, kept, name, kind)
    try:
        index = list_folder(root, kind)
    except OSError as error:
        raise UserError(f"data={name}: {error.filename or root} cannot be listed ({error.strerror})") from error
    return FileSource(root, save(index, file) if file and len(index) else index, name, kind)


def list_folder(root: Path, kind: Kind = IMAGES) -> Index:
    """The index of a folder, which also remembers when each folder in it last changed."""
    paths, folders, changed = PathList(), PathList(), list[int]()
    started = time.time_ns()

    def note(folder: bytes, modified: int) -> None:
        folders.add(folder)
        changed.append(modified if modified < started - RECENT else -1)

    suffixes = tuple(suffix.encode() for suffix in kind.suffixes)
    for path in _walk(os.fsencode(root), b"", suffixes, frozenset(), note):
        paths.add(path)
    columns = paths.columns()
    folder_columns = {f"folder_{key}": values for key, values in folders.columns().items()}
    times = {"folder_changed": np.array(changed, np.int64)}
    stamp = {"kind": "folder", "fingerprint": fingerprint_of([columns["offsets"], columns["blob"]])}
    return Index({**columns, **folder_columns, **times}, stamp)


def _walk(
    folder: bytes, prefix: bytes, suffixes: tuple[bytes, ...], above: frozenset[tuple[int, int]], note: NoteFolder
) -> Iterator[bytes]:
    """Paths of what counts below ``folder``, each with ``prefix`` before it, in the order of all paths sorted."""
    info = os.stat(folder)  # noqa: PTH116, bytes paths, so that no name is too odd
    if (info.st_dev, info.st_ino) in above:
        return  # a link back to a folder that we are in
    note(prefix, info.st_mtime_ns)
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                names.append(entry.name + b"/")  # with its slash a folder sorts among files as its contents do
            elif entry.name.lower().endswith(suffixes) and entry.is_file():
                names.append(entry.name)
    names.sort(reverse=True)
    while names:  # popped, so that the names go as the paths come
        name = names.pop()
        if name.endswith(b"/"):
            inner, above_it = folder + b"/" + name[:-1], above | {(info.st_dev, info.st_ino)}
            yield from _walk(inner, prefix + name, suffixes, above_it, note)
        else:
            yield prefix + name


def _is_fresh(kept: Index, root: Path) -> bool:
    """Whether every folder of the listing still bears the time stamp that it had."""
    columns = kept.columns
    folders = Index({"blob": columns["folder_blob"], "offsets": columns["folder_offsets"]}, {})
    try:
        return all(
            (root / folders.path(number)).stat().st_mtime_ns == changed
            for number, changed in enumerate(columns["folder_changed"])
        )
    except OSError:
        return False


def _class_folders(index: Index) -> Labels | None:
    blob, offsets = index.columns["blob"], index.columns["offsets"]
    slashes: NDArray[Any] = np.flatnonzero(blob == ord("/"))
    starts, ends = offsets[:-1], offsets[1:]
    # The first slash at or behind each path's start, if it comes before the path's end.
    place = np.searchsorted(slashes, starts)
    first = np.append(slashes, len(blob))[place]
    if (first >= ends).any():
        return None
    classes = ClassNames()
    for start, end in zip(starts.tolist(), first.tolist(), strict=True):
        classes.add(os.fsdecode(blob[start:end].tobytes()))
    return classes.finish()
