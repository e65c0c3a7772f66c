"""Videos by torchcodec, where it is installed and finds an FFmpeg of the system that it can work
with.

It scans the packets of a file when it opens it (0.4 ms for 300 frames), so that frame i is exactly
frame i, also where frames come at uneven times; the scan serves all clips of one opening.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from patchmine.data.decoding.bounds import DecodeError, check_pixels, decoding
from patchmine.data.decoding.orientation import upright_tensor
from patchmine.data.decoding.video_matrix import of_file, remainder
from patchmine.data.settings import MAX_PIXELS

_FRAME_WORK = 6  # bytes for each pixel of a frame: the frame and its place among the others
_EXPANSION, _DOUBTED = (
    1000,
    1 << 30,
)  # as in `check_pixels`: frames are alike, so videos are smaller than images

MISSING, SLACK = 0.02, 0.5
"""Share of the time that a file's header states, and seconds, that may be missing: headers are not
exact.
"""


def version() -> str:
    """The installed version; PackageNotFoundError where there is none."""
    return importlib.metadata.version("torchcodec")


@cache
def works() -> bool:
    """Whether torchcodec is here and gives back, out of order, the frames of a small video made for
    the purpose.
    """
    levels = (10, 120, 240)
    try:
        reader = TorchcodecReader(_animation(levels))
        frames = reader.frames([2, 0, 1])
    except DecodeError:
        return False  # not installed, made for another torch, or no FFmpeg that it knows
    wanted = [levels[number] for number in (2, 0, 1)]
    return all(
        abs(value - level) < 4
        for value, level in zip(frames.float().mean((1, 2, 3)).tolist(), wanted, strict=True)
    )


class TorchcodecReader:
    """One video: the path of a file, or its contents.  ``max_pixels``: frames of more are refused."""

    def __init__(self, source: str | bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels, self._stored = max_pixels, size_of(source)
        with decoding("cannot be opened as a video"):
            from torchcodec.decoders import VideoDecoder

            self._decoder: Any = VideoDecoder(source, num_ffmpeg_threads=1)
            facts = self._decoder.metadata
            self.num_frames: int = len(self._decoder)
            self.fps: float | None = facts.average_fps
            seconds = facts.end_stream_seconds - facts.begin_stream_seconds
        check_complete(self.num_frames, seconds, facts.duration_seconds_from_header)
        self._height, self._width = facts.height, facts.width
        check_frames(self._height, self._width, 1, max_pixels, self._stored)
        self._remainder = remainder(of_file(source) or 1)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(n, 3, H, W) uint8; DecodeError where one of them cannot be decoded."""
        check_range(indices, self.num_frames)
        check_frames(self._height, self._width, len(indices), self._max_pixels, self._stored)
        with decoding(
            f"stops decoding before frame {max(indices, default=0)} of {self.num_frames}"
        ):
            frames: Tensor = self._decoder.get_frames_at([int(index) for index in indices]).data
        return upright_tensor(frames, self._remainder)


def size_of(source: str | bytes) -> int:
    """Bytes of a file, or of its contents.  OSError where there is none."""
    return len(source) if isinstance(source, bytes) else Path(source).stat().st_size


def check_frames(
    height: int | None, width: int | None, frames: int, max_pixels: int, stored: int
) -> None:
    """Whether so many frames may be decoded at once; a size that no header states is left to the
    decoder.

    DecodeError as of `check_pixels`.
    """
    if height and width:
        work = _FRAME_WORK * frames
        check_pixels(
            height,
            width,
            max_pixels,
            stored=stored,
            work=work,
            expansion=_EXPANSION,
            doubted=_DOUBTED,
        )


def check_complete(num_frames: int, seconds: float, stated: float | None) -> None:
    """DecodeError for a video without frames, or one that ends well before the time that its header
    states.
    """
    if not num_frames:
        raise DecodeError("holds no frame that can be decoded")
    if stated is not None and seconds < (1 - MISSING) * stated - SLACK:
        raise DecodeError(
            f"stops after {seconds:.1f} of its {stated:.1f} seconds, as if it had been cut off; fetch it again or "
            "remove it"
        )


def check_range(indices: Sequence[int], num_frames: int) -> None:
    """IndexError for a frame that there is not."""
    if indices and not 0 <= min(indices) <= max(indices) < num_frames:
        raise IndexError(f"frames {min(indices)} to {max(indices)} of {num_frames}")


def _animation(levels: Sequence[int]) -> bytes:
    """A GIF of one grey frame per level."""
    first, *rest = (Image.new("RGB", (16, 16), (level, level, level)) for level in levels)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=40)
    return file.getvalue()
