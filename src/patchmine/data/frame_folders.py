"""Videos as folders of images: every folder that holds images is one video."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchmine.data.contract import ClassNames, Labels, fingerprint_of
from patchmine.data.folder import FileSource, open_folder
from patchmine.data.video import FrameFiles, in_counting_order


class FrameFolders:
    """The folders below a root that hold images, sorted by path; the class is the first folder below the root."""

    notes: tuple[str, ...] = ()

    def __init__(self, frames: FileSource) -> None:
        self.frames, self.name = frames, frames.name
        folders: dict[str, list[int]] = {}
        for number in range(len(frames)):
            folders.setdefault(os.path.dirname(frames.key(number)), []).append(number)  # noqa: PTH120, once per frame
        self.folders = sorted(folders)
        self._numbers: list[NDArray[np.int32]] = [np.array(folders[folder], np.int32) for folder in self.folders]
        self.fingerprint = fingerprint_of([b"frames", frames.fingerprint.encode()])

    def __len__(self) -> int:
        return len(self.folders)

    def read(self, index: int) -> FrameFiles:
        """Where the frames lie, in counting order."""
        paths = [self.frames.path(number) for number in self._numbers[index].tolist()]
        return FrameFiles(tuple(sorted(paths, key=in_counting_order)))

    def path(self, index: int) -> str:
        """The folder of the frames."""
        return os.path.join(self.frames.root, self.folders[index])  # noqa: PTH118, a root may be no Path of ours

    def key(self, index: int) -> str:
        """The folder below the root."""
        return self.folders[index]

    def labels(self) -> Labels | None:
        """The first folder below the root; None where a video lies in the root itself or right below it."""
        classes = ClassNames()
        for folder in self.folders:
            first, slash, _ = folder.partition("/")
            if not slash:
                return None
            classes.add(first)
        return classes.finish()


def open_frame_folders(root: Path, name: str, cache_dir: Path | None) -> FrameFolders:
    """All folders with images below ``root``; a source without items is given back as such."""
    return FrameFolders(open_folder(root, name, cache_dir))
