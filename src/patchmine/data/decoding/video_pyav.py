"""Videos by PyAV, which brings its own FFmpeg.

A file's packets are gone through once to learn when each frame is shown and which frames can be
decoded without others; a process keeps that index in memory and uses it again whenever it opens the
same file.  A clip is then decoded from the last such frame before it on, and pictures that are
neither wanted nor referred to are left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchmine.data.decoding.bounds import DecodeError, decoding
from patchmine.data.decoding.orientation import upright
from patchmine.data.decoding.video_matrix import of_frame
from patchmine.data.decoding.video_torchcodec import (
    check_complete,
    check_frames,
    check_range,
    size_of,
)
from patchmine.data.settings import MAX_PIXELS

MOST_FRAMES = 5_000_000
"""Frames whose times a process remembers, 9 bytes each; beyond that the file used longest ago is
forgotten.
"""

# FFmpeg can leave out pictures to which no other refers; of these decoders it is known that all
# others stay the same.
_CAN_SKIP = ("h264", "hevc")
# Formats without presentation times: FFmpeg's guesses are not in order, the frames as they leave
# the decoder are.
_UNTIMED = ("avi", "h264", "hevc", "m4v", "mpegvideo")


@dataclass(frozen=True)
class FrameIndex:
    """``times`` (F,) int64, ascending presentation times in the stream's unit; ``is_key`` (F,)
    bool, whether decoding can begin there.  ``timed``: whether frames leave the decoder with these
    times.
    """

    times: NDArray[np.int64]
    is_key: NDArray[np.bool_]
    timed: bool

    def __len__(self) -> int:
        return len(self.times)


_indices: OrderedDict[Hashable, FrameIndex] = OrderedDict()


def is_installed() -> bool:
    """Whether PyAV is here."""
    return importlib.util.find_spec("av") is not None


def version() -> str:
    """The installed version."""
    return importlib.metadata.version("av")


class PyAVReader:
    """One video: the path of a file, or its contents; ``key`` stands for the contents, where
    anything does.

    ``max_pixels``: frames of more are refused, before they are decoded.
    """

    def __init__(
        self, source: str | bytes, key: Hashable | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._source, self._max_pixels, self._stored = source, max_pixels, size_of(source)
        self._open()
        index = _indices.get(key) if key is not None else None
        if index is None:
            with decoding("cannot be read as a video"):
                index = _make_index(self._container, self._stream)
            _remember(key, index)
            self._open()  # at the start again, also where nothing can be sought
        else:
            _indices.move_to_end(key)
        self.index = index

    @property
    def num_frames(self) -> int:
        """How many frames there are."""
        return len(self.index)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(n, 3, H, W) uint8; DecodeError where one of them cannot be decoded."""
        check_range(indices, self.num_frames)
        wanted = sorted({int(index) for index in indices})
        self._check_size(len(wanted))
        found: dict[int, NDArray[np.uint8]] = {}
        trouble = ""
        try:
            with decoding(""):
                self._decode(wanted, found)
        except DecodeError as error:
            trouble = str(error)
        missing = next((number for number in wanted if number not in found), None)
        if missing is not None:
            raise DecodeError(
                f"stops decoding before frame {missing} of {self.num_frames}{trouble}; remove it"
            )
        if len({frame.shape for frame in found.values()}) > 1:
            raise DecodeError("changes the size of its frames half way; encode it again")
        return torch.from_numpy(np.stack([found[int(index)] for index in indices])).permute(
            0, 3, 1, 2
        )

    def _decode(self, wanted: list[int], found: dict[int, NDArray[np.uint8]]) -> None:
        """Fills ``found`` with the frames that are ``wanted``, ascending, as far as they can be
        decoded.
        """
        if self.index.timed:
            for start, group in _groups(wanted, self.index.is_key):
                found |= self._from_key(start, group)
        if len(found) < len(
            wanted
        ):  # no times, or a format in which places cannot be sought exactly
            found |= self._from_start([number for number in wanted if number not in found])

    def _open(self) -> None:
        with decoding("cannot be opened as a video"):
            import av

            file = self._source if isinstance(self._source, str) else io.BytesIO(self._source)
            # A playlist may name anything: what it names is taken from the disk or not at all.
            self._container = av.open(file, options={"protocol_whitelist": "file"})
            streams = self._container.streams.video
            if not streams:
                raise DecodeError("has no pictures, only sound or text; remove it")
            self._stream = streams[0]
            context = self._stream.codec_context
            if context is None:
                raise DecodeError("is coded in a way that this FFmpeg cannot decode")
            context.thread_count = 1  # the loader's workers share the cores
            context.options = {
                "max_pixels": str(self._max_pixels)
            }  # of frames larger than the header says
            rate = self._stream.average_rate
            self.fps: float | None = float(rate) if rate else None
            self._converter = av.video.reformatter.VideoReformatter()
        self._check_size(1)

    def _check_size(self, frames: int) -> None:
        context = self._stream.codec_context
        check_frames(context.height, context.width, frames, self._max_pixels, self._stored)

    def _from_key(self, start: int, wanted: list[int]) -> dict[int, NDArray[np.uint8]]:
        """Those of ``wanted``, ascending, that are met when decoding begins at the key frame
        ``start``.
        """
        times = self.index.times
        numbers: dict[int, list[int]] = {}
        for number in wanted:
            numbers.setdefault(int(times[number]), []).append(number)
        context, found = self._stream.codec_context, dict[int, NDArray[np.uint8]]()
        can_skip = context.name in _CAN_SKIP
        self._container.seek(int(times[start]), stream=self._stream)
        first = True
        try:
            for packet in self._container.demux(self._stream):
                if first and (
                    not packet.is_keyframe or packet.pts is None or packet.pts > times[start]
                ):
                    break
                first = False
                if can_skip:
                    context.skip_frame = (
                        "DEFAULT" if packet.pts is None or packet.pts in numbers else "NONREF"
                    )
                for frame in packet.decode():
                    for number in numbers.get(frame.pts, ()):
                        found[number] = self._picture(frame)
                if len(found) == len(wanted):
                    break
        finally:
            context.skip_frame = "DEFAULT"
        return found

    def _from_start(self, wanted: list[int]) -> dict[int, NDArray[np.uint8]]:
        """Those of ``wanted``, ascending, that are met when the whole file is decoded."""
        self._open()
        found: dict[int, NDArray[np.uint8]] = {}
        for number, frame in enumerate(self._container.decode(self._stream)):
            if number in wanted:
                found[number] = self._picture(frame)
            if number >= wanted[-1]:
                break
        return found

    def _picture(self, frame: Any) -> NDArray[np.uint8]:
        """(H, W, 3), turned and mirrored as the file asks for."""
        picture = self._converter.reformat(frame, format="rgb24").to_ndarray()
        orientation = of_frame(frame)
        if orientation == 1:
            return picture
        return np.ascontiguousarray(
            np.moveaxis(upright(np.moveaxis(picture, 2, 0), orientation), 0, 2)
        )


def _groups(wanted: list[int], is_key: NDArray[np.bool_]) -> Iterator[tuple[int, list[int]]]:
    """The last key frame before each number, 0 where there is none, with all numbers that it
    serves.
    """
    keys = np.flatnonzero(is_key).tolist()
    for start, group in groupby(
        wanted, lambda number: keys[max(0, bisect_right(keys, number) - 1)] if keys else 0
    ):
        yield start, list(group)


def _make_index(container: Any, stream: Any) -> FrameIndex:
    """One pass over the packets; what the file's edit list leaves out is no frame."""
    times, keys, lengths = list[int](), list[bool](), list[int]()
    timed = not (container.format.name in _UNTIMED and stream.codec_context.has_b_frames)
    # As far as it can be read; whether that is all is asked next.
    with suppress(DecodeError), decoding("stops"):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard and not packet.is_corrupt:
                timed = timed and packet.pts is not None
                times.append(packet.pts if packet.pts is not None else len(times))
                keys.append(bool(packet.is_keyframe))
                lengths.append(packet.duration or 0)
    order = np.argsort(np.array(times, np.int64), kind="stable")
    sorted_times, unit = np.array(times, np.int64)[order], stream.time_base
    if times:
        seconds = float((sorted_times[-1] + lengths[order[-1]] - sorted_times[0]) * unit)
    stated = float(stream.duration * unit) if stream.duration and unit else None
    check_complete(len(times), seconds if times else 0.0, stated)
    return FrameIndex(sorted_times, np.array(keys, bool)[order], timed)


def _remember(key: Hashable | None, index: FrameIndex) -> None:
    if key is None:
        return
    _indices[key] = index
    while len(_indices) > 1 and sum(map(len, _indices.values())) > MOST_FRAMES:
        _indices.popitem(last=False)
