"""Raw videos become frames: any of them, by their numbers.

A *raw video* is what a source of videos gives: a file, encoded bytes, frames as encoded images, or
all frames as an array.  Frame i is the i-th in the order of presentation times.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding import pyav
from patchmine.data.decoding.arrays import fit_channels
from patchmine.data.decoding.bounds import DecodeError, check_frames
from patchmine.data.decoding.decode import decode
from patchmine.data.decoding.reading import open_regular
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.sources.contract import IMAGES, Kind, contents
from patchmine.data.sources.members import NO_FILE, OTHER_SERIES, frames_of, head_of, reason_against
from patchmine.errors import UserError

VIDEO_SUFFIXES = (
    *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".ogg", ".asf", ".vob", ".mxf", ".gif"),
)
"""Endings (in any case) by which a file in a folder or a shard counts as a video."""


@dataclass(frozen=True)
class VideoFile:
    """A video file, of which a decoder reads no more than it needs."""

    path: str


@dataclass(frozen=True)
class FrameFiles:
    """A video whose frames lie as images in files of their own, in this order."""

    paths: tuple[str, ...]


def frames_in(
    folder: str, note: Callable[[str, str], None] = lambda reason, name: None
) -> FrameFiles:
    """The frames in a folder: ``2.jpg`` comes before ``10.jpg``.

    ``note`` is told reason and name of what is passed over.  DecodeError where there is no image,
    or where there are the frames of several videos; OSError where the folder cannot be read.
    """
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            head = partial(head_of, entry.path)
            reason = reason_against(entry.name, IMAGES, head) if entry.is_file() else NO_FILE
            if reason is None:
                names.append(entry.name)
            elif not entry.is_dir():
                note(reason, entry.name)
    if not names:
        raise DecodeError("is a folder without images; a video in single frames has them in it")
    frames, others = frames_of(sorted(names, key=in_counting_order))
    for name in others:
        note(OTHER_SERIES, name)
    return FrameFiles(tuple(f"{folder}/{name}" for name in frames))


def in_counting_order(name: str) -> list[tuple[int, str]]:
    """A key to sort by, in which whole numbers within a name count as such."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _raw(path: str) -> VideoFile | FrameFiles:
    is_folder = os.path.isdir(path)  # noqa: PTH112, once per clip
    return frames_in(path) if is_folder else VideoFile(path)


VIDEOS = Kind("video", VIDEO_SUFFIXES, _raw, folders=frames_in)


RawVideo = VideoFile | FrameFiles | bytes | Sequence[bytes] | np.ndarray | Tensor


class VideoReader(Protocol):
    """An opened video: not to be sent to another process."""

    @property
    def num_frames(self) -> int: ...

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) uint8, RGB where it was encoded, in the order of ``indices``.

        DecodeError where one of them cannot be decoded, IndexError where there is no frame of that
        number.
        """


def open_video(raw: RawVideo | VideoReader, max_pixels: int = MAX_PIXELS) -> VideoReader:
    """A reader of a raw video; a reader is given back as it is.

    DecodeError for what is no video, holds no frame, is damaged or has frames of more than
    ``max_pixels``; OSError for a file that cannot be read; UserError where no decoder is installed.
    """
    if isinstance(raw, VideoFile):
        with open_regular(raw.path) as handle:  # an OSError here names the file
            info = os.fstat(handle.fileno())
        key = (raw.path, info.st_size, info.st_mtime_ns)
        return _encoded(raw.path if info.st_size else b"", key, max_pixels)
    if isinstance(raw, bytes | bytearray | memoryview):
        return _encoded(bytes(raw), None, max_pixels)
    if isinstance(raw, FrameFiles):
        return _Frames([partial(contents, path) for path in raw.paths], max_pixels)
    if isinstance(raw, np.ndarray | Tensor):
        return _Array(raw)
    if isinstance(raw, list | tuple):
        return _Frames([partial(bytes, frame) for frame in raw], max_pixels)
    if hasattr(raw, "frames") and hasattr(raw, "num_frames"):
        return raw
    raise DecodeError(
        f"is a {type(raw).__name__}; a video is a file, bytes, a list of encoded frames or an array"
    )


def _encoded(source: str | bytes, key: Hashable | None, max_pixels: int) -> VideoReader:
    if not source:
        raise DecodeError("is empty (0 bytes); fetch it again or remove it")
    backend_name()
    return pyav.PyAVReader(source, key, max_pixels)


def fit_frames(frames: Tensor, channels: int) -> Tensor:
    """(n, C, H, W) with the channels of a run, by the rules of images; raises DecodeError."""
    if frames.shape[1] == channels:
        return frames
    number, stored, height, width = frames.shape
    image = frames.transpose(0, 1).reshape(stored, number * height, width)  # one tall image
    fitted = fit_channels(image, channels, has_alpha=stored in {2, 4})
    return fitted.reshape(channels, number, height, width).transpose(0, 1)


@cache
def backend_name() -> str:
    """What decodes videos, with its version.  UserError where nothing does: what to install."""
    found = pyav.version()
    if found is None:
        raise UserError("Videos need PyAV, which brings its own FFmpeg: pip install av")
    return f"PyAV {found}"


class _Frames:
    """Frames that are images by themselves, read when they are asked for."""

    def __init__(self, frames: Sequence[Callable[[], bytes]], max_pixels: int) -> None:
        if not frames:
            raise DecodeError("holds no frame")
        self._contents, self._max_pixels = frames, max_pixels

    @property
    def num_frames(self) -> int:
        return len(self._contents)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(n, 3, H, W) uint8."""
        images = [self._frame(index, len(indices)) for index in indices]
        if len({image.shape for image in images}) > 1:
            sizes = sorted({f"{image.shape[2]}x{image.shape[1]}" for image in images})
            raise DecodeError(
                f"has frames of different sizes ({', '.join(sizes)}); make them equal"
            )
        return torch.stack(images)

    def _frame(self, index: int, of: int) -> Tensor:
        """One of ``of`` frames that are wanted at once."""
        try:
            data = self._contents[index]()
            image = decode(data, 3, self._max_pixels)
            check_frames(image.shape[1], image.shape[2], of, self._max_pixels, len(data) * of)
        except DecodeError as error:
            raise DecodeError(f"has a frame, number {index}, that {error}") from error
        if image.dtype == torch.uint8:
            return image
        return image.mul(255).round_().clamp_(0, 255).to(torch.uint8)


class _Array:
    """All frames, decoded already: (F, H, W), (F, H, W, C) or (F, C, H, W) bytes."""

    def __init__(self, array: np.ndarray | Tensor) -> None:
        frames = torch.as_tensor(array)
        if frames.dtype != torch.uint8:
            kind = str(frames.dtype).removeprefix("torch.")
            raise DecodeError(f"holds values of type {kind}; a video is of uint8")
        if frames.ndim == 3:
            frames = frames[:, None]
        if frames.ndim != 4 or 0 in frames.shape:
            raise DecodeError(
                f"has shape {tuple(array.shape)}; a video is (frames, height, width[, channels]) "
                "or (frames, channels, height, width)"
            )
        # As with images: the shorter of the two axes that may be it holds the channels.
        self._frames = frames.permute(0, 3, 1, 2) if frames.shape[3] <= frames.shape[1] else frames

    @property
    def num_frames(self) -> int:
        return self._frames.shape[0]

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) uint8."""
        return self._frames[list(indices)]
