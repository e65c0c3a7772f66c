"""Encoded videos by PyAV, which brings its own FFmpeg: any frames by their numbers.

A file's packets are gone through once to learn when each frame is shown and which can be decoded
without others; a process keeps that index.  A clip is decoded from the last such frame before it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchmine.data.decoding.bounds import DecodeError, check_frames, decoding
from patchmine.data.decoding.orientation import of_matrix, upright
from patchmine.data.settings import MAX_PIXELS

MOST_FRAMES = 5_000_000
"""Frames that a process remembers, 9 bytes each; then the file used longest ago is forgotten."""

# FFmpeg can leave out pictures to which no other refers; of these decoders it is known that all
# others stay the same.
_CAN_SKIP = ("h264", "hevc")
# Formats without presentation times: FFmpeg's guesses are not in order (wherever more than one
# B-frame stands between two others, as in UCF101), the frames as they leave the decoder are.
_UNTIMED = ("avi", "h264", "hevc", "m4v", "mpegvideo")
# Share of the time that a file's header states, and seconds, that may be missing: headers are not
# exact.
_MISSING, _SLACK = 0.02, 0.5


@dataclass(frozen=True)
class FrameIndex:
    """``times`` (F,) int64: presentation times, ascending, in the stream's unit.

    ``is_key`` (F,) bool: whether decoding can begin there.  ``timed``: whether frames leave the
    decoder with these times.
    """

    times: NDArray[np.int64]
    is_key: NDArray[np.bool_]
    timed: bool

    def __len__(self) -> int:
        return len(self.times)


_indices: OrderedDict[Hashable, FrameIndex] = OrderedDict()


def version() -> str | None:
    """The installed version of PyAV; None where there is none."""
    return importlib.metadata.version("av") if importlib.util.find_spec("av") else None


class PyAVReader:
    """One video: the path of a file, or its contents; ``key`` stands for the contents.

    ``max_pixels``: frames of more are refused, before they are decoded.
    """

    def __init__(
        self, source: str | bytes, key: Hashable | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._source, self._max_pixels = source, max_pixels
        self._stored = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        self._open()
        index = _indices.get(key) if key is not None else None
        if index is not None:
            _indices.move_to_end(key)
        else:
            with decoding("cannot be read as a video"):
                index = _make_index(self._container, self._stream)
            if key is not None:
                _indices[key] = index
                while len(_indices) > 1 and sum(map(len, _indices.values())) > MOST_FRAMES:
                    _indices.popitem(last=False)
            self._open()  # at the start again, also where nothing can be sought
        self.index = index

    @property
    def num_frames(self) -> int:
        """How many frames there are."""
        return len(self.index)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(n, 3, H, W) uint8; DecodeError where one of them cannot be decoded."""
        if indices and not 0 <= min(indices) <= max(indices) < self.num_frames:
            raise IndexError(f"frames {min(indices)} to {max(indices)} of {self.num_frames}")
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
        frames = np.stack([found[int(index)] for index in indices])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

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
            # Of frames larger than the header says
            context.options = {"max_pixels": str(self._max_pixels)}
            self._converter = av.video.reformatter.VideoReformatter()
        self._check_size(1)

    def _check_size(self, frames: int) -> None:
        context = self._stream.codec_context
        check_frames(context.height, context.width, frames, self._max_pixels, self._stored)

    def _decode(self, wanted: list[int], found: dict[int, NDArray[np.uint8]]) -> None:
        """Fills ``found`` with the frames ``wanted``, ascending, as far as they can be decoded."""
        if self.index.timed:
            keys = np.flatnonzero(self.index.is_key).tolist() or [0]
            starts = groupby(wanted, lambda number: keys[max(0, bisect_right(keys, number) - 1)])
            for start, group in starts:
                self._from_key(start, list(group), found)
        rest = [number for number in wanted if number not in found]
        if rest:  # no times, or a format in which places cannot be sought exactly: from the start
            self._open()
            for number, frame in enumerate(self._container.decode(self._stream)):
                if number in rest:
                    found[number] = self._picture(frame)
                if number >= rest[-1]:
                    break

    def _from_key(self, start: int, wanted: list[int], found: dict[int, NDArray[np.uint8]]) -> None:
        """Those of ``wanted``, ascending, met when decoding begins at the key frame ``start``."""
        times, context = self.index.times, self._stream.codec_context
        numbers: dict[int, list[int]] = {}
        for number in wanted:
            numbers.setdefault(int(times[number]), []).append(number)
        can_skip, first = context.name in _CAN_SKIP, True
        self._container.seek(int(times[start]), stream=self._stream)
        try:
            for packet in self._container.demux(self._stream):
                time = packet.pts
                if first and (not packet.is_keyframe or time is None or time > times[start]):
                    break
                first = False
                if can_skip:
                    needed = time is None or time in numbers
                    context.skip_frame = "DEFAULT" if needed else "NONREF"
                for frame in packet.decode():
                    for number in numbers.get(frame.pts, ()):
                        found[number] = self._picture(frame)
                if all(number in found for number in wanted):
                    break
        finally:
            context.skip_frame = "DEFAULT"

    def _picture(self, frame: Any) -> NDArray[np.uint8]:
        """(H, W, 3), turned and mirrored as the file asks for.

        FFmpeg tells an angle, which cannot say that a picture is mirrored: the matrix counts.
        """
        picture: NDArray[np.uint8] = self._converter.reformat(frame, format="rgb24").to_ndarray()
        for part in frame.side_data:
            if part.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = np.frombuffer(bytes(part), np.int32)[:5].tolist()
                turned = upright(np.moveaxis(picture, 2, 0), of_matrix(a, b, c, d))
                return np.ascontiguousarray(np.moveaxis(turned, 0, 2))
        return picture


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
    if not times:
        raise DecodeError("holds no frame that can be decoded")
    order = np.argsort(np.array(times, np.int64), kind="stable")
    sorted_times, unit = np.array(times, np.int64)[order], stream.time_base
    seconds = float((sorted_times[-1] + lengths[order[-1]] - sorted_times[0]) * unit)
    stated = float(stream.duration * unit) if stream.duration and unit else None
    if stated is not None and seconds < (1 - _MISSING) * stated - _SLACK:
        raise DecodeError(
            f"stops after {seconds:.1f} of its {stated:.1f} seconds, as if it had been cut off; "
            "fetch it again or remove it"
        )
    return FrameIndex(sorted_times, np.array(keys, bool)[order], timed)
