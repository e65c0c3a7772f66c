"""A raw video becomes clips (C, T, H, W): frames chosen, cropped alike, resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import RawVideo, VideoReader, fit_frames, open_video
from patchmine.data.settings import Clip, InputSettings, ViewSettings
from patchmine.data.views.geometry import Geometry, resize
from patchmine.data.views.images import check_crop_pct, check_side, crop_box, plain_geometry
from patchmine.types import Sample

Short = Literal["hold", "loop", "refuse"]

# Distance within which a side of a crop becomes that of the model, so that nothing is resized by a
# pixel or two.
_SNAP = 3
# Corners, centre, middles of the sides and centres of the quarters, in quarters of the way from top
# left.
_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)


@dataclass(frozen=True)
class TrainClips:
    """VideoMAE's view for pre-training: a random window, one crop of 13 places for all its frames.

    Source: VideoMAE, appendix and its public training settings, which never mirror a clip.
    """

    settings: ViewSettings
    smallest_side: int = 1

    @property
    def repeats(self) -> int:
        return self.settings.clip.repeats

    def __call__(
        self, raw: RawVideo | VideoReader, generator: np.random.Generator, target: Any = None
    ) -> Sample:
        frames, geometry = self.drawn(raw, generator)
        return clip_sample(frames, geometry, self.settings.interpolation, target)

    def drawn(
        self, raw: RawVideo | VideoReader, generator: np.random.Generator
    ) -> tuple[Tensor, Geometry]:
        """The frames of a window, (T, C, H, W) uint8 and whole, and how all of them are cropped."""
        settings, clip = self.settings, self.settings.clip
        video = open_video(raw, settings.max_pixels)
        start = int(generator.integers(0, max(0, video.num_frames - clip.frames * clip.stride) + 1))
        frames = _window_of(video, start, settings, self.smallest_side)
        height, width = frames.shape[-2:]
        box = self.crop(height, width, generator)
        return frames, Geometry(box, settings.image_size, bool(generator.random() < settings.flip))

    def crop(
        self, height: int, width: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels, of all frames."""
        settings = self.settings
        return scaled_crop(height, width, settings.image_size, settings.clip.scales, generator)


@dataclass(frozen=True)
class LabelledClips(TrainClips):
    """VideoMAE's view for fine-tuning: a random window, one crop by area and shape as of images."""

    def crop(
        self, height: int, width: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels, of all frames."""
        settings = self.settings
        return crop_box(height, width, settings.crop_scale, settings.crop_ratio, generator)


@dataclass(frozen=True)
class PlainClips:
    """The view of evaluation: the middle window, shorter side to size / crop_pct, centre crop.

    ``crop_pct=None`` squashes whole frames to ``image_size``.
    """

    settings: InputSettings
    crop_pct: float | None = 1.0
    interpolation: str = "bilinear"
    smallest_side: int = 1
    repeats: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_crop_pct(self.crop_pct)

    def __call__(
        self, raw: RawVideo | VideoReader, generator: np.random.Generator, target: Any = None
    ) -> Sample:
        settings, clip = self.settings, self.settings.clip
        video = open_video(raw, settings.max_pixels)
        start = max(0, video.num_frames - clip.frames * clip.stride) // 2
        frames = _window_of(video, start, settings, self.smallest_side)
        geometry = plain_geometry(frames, settings.image_size, self.crop_pct)
        return clip_sample(frames, geometry, self.interpolation, target)


@dataclass(frozen=True)
class TestClips:
    """VideoMAE's test on Kinetics: ``segments`` windows x ``crops`` places, of one opening.

    The shorter side is resized to fill ``image_size``.  Windows lie at even distances in the list
    of every ``stride``-th frame, crops from start to end of the longer side; one of either kind
    lies in the middle (of the windows: at the start, as there).  One view (segments * crops, C, T,
    H, W), segments outermost; box (segments * crops, 4).
    """

    settings: InputSettings
    segments: int = 5
    crops: int = 3
    interpolation: str = "bilinear"
    smallest_side: int = 1
    repeats: ClassVar[int] = 1
    __test__ = False  # its name makes pytest curious

    def __call__(
        self, raw: RawVideo | VideoReader, generator: np.random.Generator, target: Any = None
    ) -> Sample:
        settings, size = self.settings, self.settings.image_size
        video = open_video(raw, settings.max_pixels)
        windows = even_windows(video.num_frames, settings.clip, self.segments)
        wanted = sorted({number for numbers in windows for number in numbers})
        place = {number: row for row, number in enumerate(wanted)}
        frames = _read(video, wanted, settings.channels, self.smallest_side)  # each decoded once
        canvas = plain_geometry(frames, size, 1.0).canvas or size
        frames = resize(frames, canvas, self.interpolation)
        cuts = [
            Geometry((top, left, *size), size)
            for top, left in even_crops(*canvas, size, self.crops)
        ]
        clips, boxes = [], []
        for numbers in windows:
            clip = frames[[place[number] for number in numbers]]
            clips += [_as_clip(cut.apply(clip)) for cut in cuts]
            boxes += [cut.shares(*canvas) for cut in cuts]
        return Sample([torch.stack(clips)], torch.stack(boxes), torch.tensor(False), target=target)


def middle_frame(raw: RawVideo | VideoReader, channels: int, max_pixels: int) -> Tensor:
    """(C, H, W) uint8: one frame that stands for the video, in statistics say."""
    video = open_video(raw, max_pixels)
    return _read(video, [video.num_frames // 2], channels, 1)[0]


def window(num_frames: int, start: int, frames: int, stride: int, short: Short) -> list[int]:
    """Numbers of ``frames`` frames from ``start`` on, every ``stride``-th.

    Where the video is too short: "hold" stays on the last frame that was reached, "loop" starts
    again at 0, "refuse" is a DecodeError.
    """
    indices = range(start, start + frames * stride, stride)
    if indices[-1] < num_frames:
        return list(indices)
    if short == "refuse":
        raise DecodeError(
            f"has {num_frames} frame{'s' * (num_frames != 1)} where a clip of {frames}, {stride} "
            f"apart, needs {(frames - 1) * stride + 1}; set a smaller clip.stride or clip.frames, "
            "or clip.short=hold"
        )
    if short == "loop":
        return [index % num_frames for index in indices]
    last = start + (num_frames - 1 - start) // stride * stride
    return [min(index, last) for index in indices]


def scaled_crop(
    height: int,
    width: int,
    size: tuple[int, int],
    scales: Sequence[float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels: two sides of neighbouring scales, at one of 13 places.

    Sides within 3 pixels of those of ``size`` become them, where the frame has room.
    """

    def snapped(side: int, wanted: int, most: int) -> int:
        return max(1, min(wanted if abs(side - wanted) < _SNAP else side, most))

    base = min(height, width)
    heights = [snapped(int(base * scale), size[0], height) for scale in scales]
    widths = [snapped(int(base * scale), size[1], width) for scale in scales]
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[int(generator.integers(len(pairs)))]
    down, right = _PLACES[int(generator.integers(len(_PLACES)))]
    top, left = (height - crop_height) // 4 * down, (width - crop_width) // 4 * right
    return top, left, crop_height, crop_width


def even_windows(num_frames: int, clip: Clip, segments: int) -> list[list[int]]:
    """Windows at even distances in the list of every ``stride``-th frame, the first one at 0."""
    listed = len(range(0, num_frames, clip.stride))
    step = max(0.0, (listed - clip.frames) / max(1, segments - 1))
    starts = [int(step * number) * clip.stride for number in range(segments)]
    return [window(num_frames, at, clip.frames, clip.stride, clip.short) for at in starts]


def even_crops(height: int, width: int, size: tuple[int, int], crops: int) -> list[tuple[int, int]]:
    """Corners (top, left) at even distances from start to end of the side that is too long."""
    spare_height, spare_width = height - size[0], width - size[1]
    if crops == 1:
        return [(spare_height // 2, spare_width // 2)]
    return [
        (int(spare_height * number / (crops - 1)), int(spare_width * number / (crops - 1)))
        for number in range(crops)
    ]


def _window_of(
    video: VideoReader, start: int, settings: InputSettings, smallest_side: int
) -> Tensor:
    clip = settings.clip
    indices = window(video.num_frames, start, clip.frames, clip.stride, clip.short)
    return _read(video, indices, settings.channels, smallest_side)


def _read(video: VideoReader, indices: Sequence[int], channels: int, smallest_side: int) -> Tensor:
    """(T, C, H, W) uint8; a frame that is asked for several times is decoded once."""
    wanted = sorted(set(indices))
    place = {index: number for number, index in enumerate(wanted)}
    frames = fit_frames(video.frames(wanted), channels)
    check_side(frames.shape[-2], frames.shape[-1], smallest_side)
    return frames if wanted == list(indices) else frames[[place[index] for index in indices]]


def clip_sample(frames: Tensor, geometry: Geometry, interpolation: str, target: Any) -> Sample:
    """What whole frames (T, C, H, W) become."""
    clip = _as_clip(geometry.apply(frames, interpolation))
    box, flip = geometry.shares(*frames.shape[-2:]), torch.tensor(geometry.flip)
    return Sample([clip], box, flip, target=target)


def _as_clip(frames: Tensor) -> Tensor:
    """(T, C, H, W) as (C, T, H, W) in one piece."""
    return frames.transpose(0, 1).contiguous()
