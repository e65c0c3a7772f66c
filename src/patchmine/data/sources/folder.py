"""Images, videos or folders of frames that lie as files, below a folder of any nesting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.video import FrameFiles, in_counting_order
from patchmine.data.sources import contract, members, parts
from patchmine.data.sources import index as indices
from patchmine.errors import shown_name

BACK = "link to a folder that is listed anyway"
UPWARDS = "link to a folder that it lies in"


class FileSource(indices.IndexedSource):
    """Files below ``root`` or at absolute paths, with the classes of their list or folders."""

    def __init__(self, root: Path, index: indices.Index, name: str, kind: contract.Kind) -> None:
        super().__init__(name, index)
        self.root, self.kind = root, kind
        # A list may name folders of frames instead.
        self.encoded = len(index) > 0 and os.path.isfile(self.path(0))  # noqa: PTH113

    def read(self, index: int) -> Any:
        return self.kind.read(self.path(index))

    def identity(self, index: int) -> bytes | None:
        return indices.file_identity(self.path(index))

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.index.path(index))  # noqa: PTH118, once per image

    def labels(self) -> contract.Labels | None:
        if "label" in self.index.columns:
            ids = self.index.columns["label"].astype(np.int64)
            return contract.Labels(ids, list(self.index.stamp["names"]))
        if self.index.stamp["listed"]:
            return None
        return contract.folder_classes(map(self.index.path, range(len(self))))


class FrameFolders(contract.Source):
    """Videos as folders of images: the folders below a root that hold images, sorted by path."""

    def __init__(self, frames: FileSource) -> None:
        self.frames = frames
        found: dict[str, list[int]] = {}
        for number in range(len(frames)):
            found.setdefault(frames.key(number).rpartition("/")[0], []).append(number)
        self.folders, passed_over = sorted(found), members.PassedOver()
        self._numbers = [self._video(folder, found[folder], passed_over) for folder in self.folders]
        # Which images are frames too, because another rule makes other videos of equal files; but
        # where every image is one, the fingerprint stays that of earlier versions.
        chosen = self._numbers if passed_over.found else []
        fingerprint = contract.fingerprint_of([b"frames", frames.fingerprint.encode(), *chosen])
        notes = [f"data={shown_name(frames.name)}: {note}" for note in passed_over.note()]
        super().__init__(frames.name, fingerprint, (*frames.notes, *notes))
        self.passed_over = frames.passed_over

    def _video(
        self, folder: str, numbers: list[int], passed_over: members.PassedOver
    ) -> NDArray[np.int32]:
        """The numbers of a folder's frames; UserError where it holds those of several videos."""
        by_name = {self.frames.key(number): number for number in numbers}
        try:
            chosen, others = members.frames_of(list(by_name))
        except DecodeError as error:
            place = shown_name(self.frames.root / folder)
            raise contract.data_error(self.frames.name, f"the folder {place} {error}") from error
        for name in others:
            passed_over.add(members.OTHER_SERIES, name)
        return np.array([by_name[name] for name in chosen], np.int32)

    def __len__(self) -> int:
        return len(self.folders)

    def read(self, index: int) -> FrameFiles:
        paths = [self.frames.path(number) for number in self._numbers[index].tolist()]
        return FrameFiles(tuple(sorted(paths, key=in_counting_order)))

    def path(self, index: int) -> str:
        return os.path.join(self.frames.root, self.folders[index])  # noqa: PTH118, once per video

    def key(self, index: int) -> str:
        return self.folders[index]

    def labels(self) -> contract.Labels | None:
        return contract.folder_classes(self.folders)


def open_folder(
    root: Path, name: str, cache_dir: Path | None, kind: contract.Kind = contract.IMAGES
) -> FileSource:
    """All files below a folder that count, sorted by path; maybe none."""
    try:
        index = indices.kept_index(
            cache_dir, "folder", kind, [root.resolve()], lambda: list_folder(root, kind)
        )
    except OSError as error:
        at = shown_name(os.fsdecode(error.filename or root))
        raise contract.data_error(name, f"{at} cannot be listed ({error.strerror})") from error
    return FileSource(root, index, name, kind)


def list_folder(root: Path, kind: contract.Kind = contract.IMAGES) -> indices.Index:
    """The index of a folder, which depends on all folders in it and on what may come to count."""
    paths, listing = indices.PathList(), _Listing(os.fsencode(root), kind)
    counts = parts.Counts(kind, listing.marks, listing.passed_over)
    for path in listing.paths():
        if counts.add(os.fsdecode(path), os.fsdecode(listing.root + b"/" + path)):
            paths.add(path)
    columns = counts.columns()
    return indices.new_index(kind, paths, listing.marks, listing.passed_over, columns, listed=False)


class _Listing:
    """One walk through a folder, in bytes, so that no name is too odd."""

    def __init__(self, root: bytes, kind: contract.Kind) -> None:
        self.root, self.kind = root, kind
        self.marks, self.passed_over = indices.Marks(), members.PassedOver()
        self._real_root = os.path.realpath(root)
        self._linked: set[bytes] = set()  # names (with a slash) that are links to folders outside
        self._seen: set[tuple[int, int]] = set()  # folders that were met behind such links

    def paths(self) -> Iterator[bytes]:
        """Paths of what counts, below the root, in the order of all paths sorted."""
        # A stack of our own, because folders may be nested deeper than calls.
        stack = [(b"", self._names(b""), False)]
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
        """Whether a folder behind a link was not met before; so the walk comes to an end."""
        info = indices.stat_of(self.root + b"/" + path)
        if info is None:
            return True  # which `_names` will tell
        identity = (info.st_dev, info.st_ino)
        if identity in self._seen:
            self.passed_over.add(BACK, os.fsdecode(path))
            return False
        self._seen.add(identity)
        return True

    def _names(self, prefix: bytes) -> list[bytes]:
        """Names in a folder that count, the last first; OSError only of the root."""
        folder = self.root + b"/" + prefix if prefix else self.root
        names = []
        try:
            self.marks.note(os.fsdecode(prefix), os.stat(folder))  # noqa: PTH116, bytes paths
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = self._counted(entry, folder, prefix)
                    if name is not None:
                        names.append(name)
        except OSError:
            if not prefix:
                raise
            self.passed_over.add(f"folder {members.NOT_OPENED}", os.fsdecode(prefix))
        names.sort(reverse=True)
        return names

    def _counted(self, entry: os.DirEntry[bytes], folder: bytes, prefix: bytes) -> bytes | None:
        """The entry's name where it counts, with a slash behind a folder's."""
        text, place = os.fsdecode(entry.name), folder + b"/" + entry.name
        reason: str | None
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # links that lead to each other
            is_folder, is_file = False, False
        if is_folder and members.is_array_folder(text, self.kind):
            is_folder, is_file = False, True
        if is_folder and members.is_hidden(text):
            reason = members.HIDDEN
        elif is_folder:
            reason = self._reason_against_link(entry, place, prefix)
        elif is_file or members.is_hidden(text):
            reason = members.reason_against(text, self.kind, partial(members.head_of, place))
        else:
            broken = entry.is_symlink() and indices.stat_of(place) is None
            reason = members.NO_LINK if broken else members.NO_FILE
        slash = b"/" * is_folder
        if reason is None:
            return entry.name + slash
        self.passed_over.add(reason, os.fsdecode(prefix + entry.name + slash))
        if members.may_change(reason):
            self.marks.note(os.fsdecode(prefix + entry.name), indices.stat_of(place))
        return None

    def _reason_against_link(
        self, entry: os.DirEntry[bytes], place: bytes, prefix: bytes
    ) -> str | None:
        """None of a folder that is no link, or a link to one that is not reached otherwise."""
        if not entry.is_symlink():
            return None
        target = os.path.realpath(place)
        inside = target.removeprefix(self._real_root.rstrip(b"/") + b"/")
        if (self._real_root + b"/").startswith(target.rstrip(b"/") + b"/"):
            return UPWARDS
        if inside != target and not members.is_hidden(os.fsdecode(inside)):
            return BACK
        self._linked.add(prefix + entry.name + b"/")
        return None
