"""Videos by torchcodec, where it is installed and finds an FFmpeg of the system that it can work with.

It scans the packets of a file when it opens it (0.4 ms for 300 frames), so that frame i is exactly frame i, also where
frames come at uneven times; the scan serves all clips of one opening.
"""

from __future__ import annotations

import importlib.metadata
import io
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import Image
from torch import Tensor

from patchmine.data.decode import DecodeError

# What torchcodec raises: RuntimeError for nearly everything, the others where a file is odd enough.
_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, OSError)

MISSING, SLACK = 0.02, 0.5
"""Share of the time that a file's header states, and seconds, that may be missing: headers are not exact."""


def version() -> str:
    """The installed version; PackageNotFoundError where there is none."""
    return importlib.metadata.version("torchcodec")


@cache
def works() -> bool:
    """Whether torchcodec is here and gives back, out of order, the frames of a small video made for the purpose."""
    levels = (10, 120, 240)
    try:
        reader = TorchcodecReader(_animation(levels))
        frames = reader.frames([2, 0, 1])
    except (ImportError, DecodeError, *_ERRORS):
        return False  # not installed, made for another torch, or no FFmpeg that it knows
    wanted = [levels[number] for number in (2, 0, 1)]
    return all(
        abs(value - level) < 4 for value, level in zip(frames.float().mean((1, 2, 3)).tolist(), wanted, strict=True)
    )


class TorchcodecReader:
    """One video: the path of a file, or its contents."""

    def __init__(self, source: str | bytes) -> None:
        from torchcodec.decoders import VideoDecoder

        try:
            self._decoder: Any = VideoDecoder(source, num_ffmpeg_threads=1)
        except _ERRORS as error:
            raise DecodeError(f"cannot be opened as a video ({short(error)})") from error
        facts = self._decoder.metadata
        self.num_frames: int = len(self._decoder)
        self.fps: float | None = facts.average_fps
        seconds = facts.end_stream_seconds - facts.begin_stream_seconds
        check_complete(self.num_frames, seconds, facts.duration_seconds_from_header)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(n, 3, H, W) uint8; DecodeError where one of them cannot be decoded."""
        check_range(indices, self.num_frames)
        try:
            frames: Tensor = self._decoder.get_frames_at([int(index) for index in indices]).data
        except _ERRORS as error:
            last = max(indices)
            raise DecodeError(f"stops decoding before frame {last} of {self.num_frames} ({short(error)})") from error
        return frames


def check_complete(num_frames: int, seconds: float, stated: float | None) -> None:
    """DecodeError for a video without frames, or one that ends well before the time that its header states."""
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


def short(error: Exception) -> str:
    """An error in one line, without the place in torchcodec's or FFmpeg's source that it names first or last."""
    line = " ".join(str(error).split())
    line = re.sub(r"^\S+, \S+\.cpp:\d+, |: '\w+\(\)'$|^\[Errno -?\d+\] ", "", line)
    return line[:160] or type(error).__name__


def _animation(levels: Sequence[int]) -> bytes:
    """A GIF of one grey frame per level."""
    first, *rest = (Image.new("RGB", (16, 16), (level, level, level)) for level in levels)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=40)
    return file.getvalue()
