"""Images, or videos, that lie as files: a folder of any nesting, or whatever a list file names."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchmine.data.sources.classes import folder_classes
from patchmine.data.sources.contract import IMAGES, Kind, Labels, fingerprint_of
from patchmine.data.sources.index import Index, PathList, index_file, is_recent, load, mark_of, save
from patchmine.data.sources.members import (
    HIDDEN,
    NO_FILE,
    NO_LINK,
    NOT_OPENED,
    PassedOver,
    head_of,
    is_hidden,
    may_change,
    passed_over_note,
    reason_against,
    rule_of,
)
from patchmine.errors import UserError, shown_name

BACK = "link to a folder that is listed anyway"


class FileSource:
    """Files below ``root``, or elsewhere where a list gives absolute paths.

    ``index`` holds their paths; its column ``label`` and the stamp's ``names`` hold the classes,
    where a list gave any.
    """

    def __init__(self, root: Path, index: Index, name: str, kind: Kind = IMAGES) -> None:
        self.root, self.index, self.name, self.kind = root, index, name, kind
        self.fingerprint: str = index.stamp["fingerprint"]
        self.notes = (
            *index.stamp.get("notes", ()),
            *passed_over_note(name, index.stamp["passed_over"]),
        )

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
        """The list's classes, or those of `folder_classes`."""
        if "label" in self.index.columns:
            return Labels(
                self.index.columns["label"].astype(np.int64), list(self.index.stamp["names"])
            )
        return (
            folder_classes(map(self.index.path, range(len(self))))
            if self.index.stamp["kind"] == "folder"
            else None
        )


def open_folder(root: Path, name: str, cache_dir: Path | None, kind: Kind = IMAGES) -> FileSource:
    """All files below a folder that count (``data.members``), sorted by path; notes say how many do
    not, and why.

    The listing is kept in ``cache_dir`` and used again as long as no folder in it has changed.  A
    source without items is given back as such.  UserError when the folder may not be read.
    """
    file = (
        index_file(cache_dir, f"folder-{kind.name}", os.fspath(root.resolve()))
        if cache_dir
        else None
    )
    kept = load(file) if file else None
    if kept is not None and kept.stamp["rule"] == rule_of(kind) and _is_fresh(kept, root):
        return FileSource(root, kept, name, kind)
    try:
        index = list_folder(root, kind)
    except OSError as error:
        place = shown_name(os.fsdecode(error.filename or root))
        raise UserError(
            f"data={shown_name(name)}: {place} cannot be listed ({error.strerror})"
        ) from error
    return FileSource(root, save(index, file) if file and len(index) else index, name, kind)


def list_folder(root: Path, kind: Kind = IMAGES) -> Index:
    """The index of a folder, which also remembers the marks of what it depends on: each folder in
    it, and what was passed over for its contents or for a link that led nowhere.
    """
    paths, listing = PathList(), _Listing(os.fsencode(root), kind)
    for path in listing.paths():
        paths.add(path)
    columns = paths.columns()
    marked = {f"marked_{key}": values for key, values in listing.marked.columns().items()}
    marks = {"marks": np.frombuffer(listing.marks, np.int64)}
    fingerprint = fingerprint_of([columns["offsets"], columns["blob"]])
    stamp = {"kind": "folder", "rule": rule_of(kind), "fingerprint": fingerprint}
    return Index(
        {**columns, **marked, **marks}, {**stamp, "passed_over": listing.passed_over.facts()}
    )


class _Listing:
    """One walk through a folder."""

    def __init__(self, root: bytes, kind: Kind) -> None:
        self.root, self.kind = root, kind
        self.marked, self.marks, self.passed_over = PathList(), array("q"), PassedOver()
        self._real_root = os.path.realpath(root)
        self._started = time.time_ns()
        self._linked: set[bytes] = set()  # names (with a slash) that are links to folders outside
        self._seen: set[tuple[int, int]] = set()  # folders that were met behind such links

    def paths(self) -> Iterator[bytes]:
        """Paths of what counts, below the root, in the order of all paths sorted."""
        stack = [
            (b"", self._names(b""), False)
        ]  # a stack of our own: folders may be nested deeper than calls
        while stack:
            prefix, names, behind_link = stack[-1]
            if not names:
                stack.pop()
                continue
            path = prefix + names.pop()  # popped, so that the names go as the paths come
            if not path.endswith(b"/"):
                yield path
                continue
            behind_link = behind_link or path in self._linked
            if not behind_link or self._is_new(path):
                stack.append((path, self._names(path), behind_link))

    def _is_new(self, path: bytes) -> bool:
        """Whether a folder behind a link was not met before; so a walk through linked folders comes
        to an end.
        """
        try:
            info = os.stat(self.root + b"/" + path)  # noqa: PTH116, bytes paths, so that no name is too odd
        except OSError:
            return True  # which `_names` will tell
        identity = (info.st_dev, info.st_ino)
        if identity in self._seen:
            self.passed_over.add(BACK, os.fsdecode(path))
            return False
        self._seen.add(identity)
        return True

    def _names(self, prefix: bytes) -> list[bytes]:
        """Names in a folder that count, the last one first; a folder has a slash, with which it
        sorts as its contents.

        OSError of the root; another folder that cannot be read is passed over.
        """
        folder = self.root + b"/" + prefix if prefix else self.root
        names = []
        try:
            self._note(prefix, os.stat(folder))  # noqa: PTH116
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = self._counted(entry, folder, prefix)
                    if name is not None:
                        names.append(name)
        except OSError:
            if not prefix:
                raise
            self.passed_over.add(f"folder {NOT_OPENED}", os.fsdecode(prefix))
        names.sort(reverse=True)
        return names

    def _note(self, path: bytes, info: os.stat_result | None) -> None:
        """The listing stands as long as this path bears this mark; one that is too young is none
        that could be met.
        """
        self.marked.add(path)
        recent = info is not None and is_recent(info, self._started)
        self.marks.extend([-1] * len(_NOTHING) if recent else mark_of(info) if info else _NOTHING)

    def _counted(self, entry: os.DirEntry[bytes], folder: bytes, prefix: bytes) -> bytes | None:
        """The entry's name where it counts."""
        text = os.fsdecode(entry.name)
        reason: str | None
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # links that lead to each other
            is_folder, is_file = False, False
        if is_folder:
            reason = HIDDEN if is_hidden(text) else self._reason_against_link(entry, folder, prefix)
            text += "/"
        elif is_file or is_hidden(text):
            reason = reason_against(text, self.kind, partial(head_of, folder + b"/" + entry.name))
        else:
            reason = (
                NO_LINK
                if entry.is_symlink() and _stat(folder + b"/" + entry.name) is None
                else NO_FILE
            )
        if reason is not None:
            self.passed_over.add(reason, os.fsdecode(prefix) + text)
            if may_change(reason):
                self._note(prefix + entry.name, _stat(folder + b"/" + entry.name))
            return None
        return entry.name + b"/" if is_folder else entry.name

    def _reason_against_link(
        self, entry: os.DirEntry[bytes], folder: bytes, prefix: bytes
    ) -> str | None:
        """None of a folder that is no link, or a link to one that is not reached otherwise."""
        if not entry.is_symlink():
            return None
        target = os.path.realpath(folder + b"/" + entry.name)
        inside = target.removeprefix(self._real_root.rstrip(b"/") + b"/")
        if (self._real_root + b"/").startswith(target.rstrip(b"/") + b"/"):
            return "link to a folder that it lies in"
        if inside != target and not is_hidden(os.fsdecode(inside)):
            return BACK
        self._linked.add(prefix + entry.name + b"/")
        return None


def _stat(path: str | bytes) -> os.stat_result | None:
    """None where there is nothing of that name, or a link leads nowhere."""
    try:
        return os.stat(path)  # noqa: PTH116, bytes paths
    except OSError:
        return None


_NOTHING = [0, 0, 0, 0]
"""The mark of what is not there."""


def _is_fresh(kept: Index, root: Path) -> bool:
    """Whether everything that the listing depends on still bears the mark that it had."""
    columns = kept.columns
    marked = Index({"blob": columns["marked_blob"], "offsets": columns["marked_offsets"]}, {})
    marks = columns["marks"].reshape(len(marked), -1)
    for number, mark in enumerate(marks.tolist()):
        info = _stat(os.path.join(root, marked.path(number)))  # noqa: PTH118, once per folder
        if (mark_of(info) if info else _NOTHING) != mark:
            return False
    return True
