"""Videos as folders of images: every folder that holds images is one video."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import FrameFiles, in_counting_order
from patchmine.data.sources.classes import folder_classes
from patchmine.data.sources.contract import IMAGES, Kind, Labels, fingerprint_of
from patchmine.data.sources.folder import FileSource, open_folder
from patchmine.data.sources.members import PassedOver, passed_over_note
from patchmine.data.sources.series import OTHER_SERIES, frames_of
from patchmine.errors import UserError, shown_name


class FrameFolders:
    """The folders below a root that hold images, sorted by path; the class is that of
    `folder_classes`.

    UserError where a folder holds the frames of several videos.
    """

    def __init__(self, frames: FileSource) -> None:
        self.frames, self.name = frames, frames.name
        folders: dict[str, list[int]] = {}
        for number in range(len(frames)):
            folders.setdefault(os.path.dirname(frames.key(number)), []).append(number)  # noqa: PTH120, once per frame
        self.folders = sorted(folders)
        passed_over = PassedOver()
        self._numbers = [
            self._frames_in(folder, folders[folder], passed_over) for folder in self.folders
        ]
        self.notes = (*frames.notes, *passed_over_note(frames.name, passed_over.facts()))
        # The frames too, because another rule of which images are frames makes other videos of
        # equal files.
        self.fingerprint = fingerprint_of(
            [b"frames", frames.fingerprint.encode(), *self._left_out(passed_over)]
        )

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
        """The classes by folders; None where a video lies in the root itself or right below it."""
        return folder_classes(self.folders)

    def _frames_in(
        self, folder: str, numbers: list[int], passed_over: PassedOver
    ) -> NDArray[np.int32]:
        by_name = {self.frames.key(number): number for number in numbers}
        try:
            frames, others = frames_of(list(by_name))
        except DecodeError as error:
            place = shown_name(os.path.join(self.frames.root, folder))  # noqa: PTH118
            raise UserError(f"data={shown_name(self.name)}: the folder {place} {error}") from error
        for name in others:
            passed_over.add(OTHER_SERIES, name)
        return np.array([by_name[name] for name in frames], np.int32)

    def _left_out(self, passed_over: PassedOver) -> list[NDArray[np.int32]]:
        """Nothing where every image is a frame, so that fingerprints of such folders stay what they
        were.
        """
        return self._numbers if passed_over.facts() else []


def open_frame_folders(
    root: Path, name: str, cache_dir: Path | None, kind: Kind = IMAGES
) -> FrameFolders:
    """All folders with images below ``root``; a source without items is given back as such."""
    return FrameFolders(open_folder(root, name, cache_dir, kind))
