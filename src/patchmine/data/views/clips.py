"""A raw video becomes one clip: frames chosen, cropped alike, resized.  Mirroring is only noted;
the device does it.

The views have the signature of those of images (`data.views`): ``view(raw, channels, generator) ->
(pixels, box, flip)``, with pixels (C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import RawVideo, VideoReader, fit_frames, open_video
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.views.images import check_interpolation, check_side, cover, fractions
from patchmine.errors import UserError

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
    """VideoMAE's view for pre-training: a window at random, one crop of several scales and places
    for all its frames.

    ``image_size`` (height, width).  The window spans ``frames * stride`` frames.  ``scales``: sides
    of a crop as shares of the shorter side of the video; height and width are one of them or
    neighbours.  ``flip`` is a probability.
    Source: VideoMAE, appendix and its public training settings (hpm-video.md section 6), which
    never mirror a clip.
    """

    image_size: tuple[int, int]
    frames: int = 16
    stride: int = 4
    short: Short = "hold"
    scales: Sequence[float] = (1.0, 0.875, 0.75, 0.66)
    flip: float = 0.0
    interpolation: str = "bilinear"
    smallest_side: int = 1
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)

    def __call__(
        self, raw: RawVideo | VideoReader, channels: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, bool]:
        video = open_video(raw, self.max_pixels)
        start = int(generator.integers(0, max(0, video.num_frames - self.frames * self.stride) + 1))
        indices = window(video.num_frames, start, self.frames, self.stride, self.short)
        clip = _read(video, indices, channels, self.smallest_side)
        full_height, full_width = clip.shape[-2:]
        top, left, height, width = scaled_crop(
            full_height, full_width, self.image_size, self.scales, generator
        )
        flip = bool(generator.random() < self.flip)
        box = fractions(clip, top, left, height, width)
        crop = clip[..., top : top + height, left : left + width]
        return _as_clip(resize_frames(crop, self.image_size, self.interpolation)), box, flip


@dataclass(frozen=True)
class PlainClips:
    """The view of evaluation: the window in the middle, shorter side resized to size / crop_pct,
    centre crop.

    ``crop_pct=None`` squashes whole frames to ``image_size``.  Nothing is random or mirrored.
    """

    image_size: tuple[int, int]
    frames: int = 16
    stride: int = 4
    short: Short = "hold"
    crop_pct: float | None = 1.0
    interpolation: str = "bilinear"
    smallest_side: int = 1
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(
                f"crop_pct={self.crop_pct} is no share of the frame; set it above 0 and up to 1"
            )

    def __call__(
        self, raw: RawVideo | VideoReader, channels: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, bool]:
        video = open_video(raw, self.max_pixels)
        start = max(0, video.num_frames - self.frames * self.stride) // 2
        indices = window(video.num_frames, start, self.frames, self.stride, self.short)
        clip = _read(video, indices, channels, self.smallest_side)
        if self.crop_pct is None:
            whole = resize_frames(clip, self.image_size, self.interpolation)
            return _as_clip(whole), torch.tensor([0.0, 0.0, 1.0, 1.0]), False
        height, width = self.image_size
        clip = resize_frames(clip, cover(clip, self.image_size, self.crop_pct), self.interpolation)
        top, left = round((clip.shape[-2] - height) / 2), round((clip.shape[-1] - width) / 2)
        view = clip[..., top : top + height, left : left + width]
        return _as_clip(view), fractions(clip, top, left, height, width), False


@dataclass(frozen=True)
class TestClips:
    """VideoMAE's test on Kinetics: ``segments`` windows x ``crops`` places, all of one opening of
    the video.

    The shorter side is resized to fill ``image_size``.  Windows lie at even distances in the list
    of every ``stride``-th frame, crops from start to end of the longer side; one of either kind
    lies in the middle (of the
    windows: at the start, as there).  Pixels (segments * crops, C, T, H, W), segments outermost;
    box (segments * crops, 4).
    """

    image_size: tuple[int, int]
    frames: int = 16
    stride: int = 4
    short: Short = "hold"
    segments: int = 5
    crops: int = 3
    interpolation: str = "bilinear"
    smallest_side: int = 1
    max_pixels: int = MAX_PIXELS

    __test__ = False  # its name makes pytest curious

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)

    def __call__(
        self, raw: RawVideo | VideoReader, channels: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, bool]:
        video = open_video(raw, self.max_pixels)
        windows = even_windows(
            video.num_frames, self.frames, self.stride, self.segments, self.short
        )
        wanted = sorted({index for indices in windows for index in indices})
        place = {index: number for number, index in enumerate(wanted)}
        frames = _read(
            video, wanted, channels, self.smallest_side
        )  # a frame of two windows is decoded once
        frames = resize_frames(frames, cover(frames, self.image_size, 1.0), self.interpolation)
        corners = even_crops(frames.shape[-2], frames.shape[-1], self.image_size, self.crops)
        height, width = self.image_size
        clips, boxes = [], []
        for indices in windows:
            clip = frames[[place[index] for index in indices]]
            for top, left in corners:
                clips.append(_as_clip(clip[..., top : top + height, left : left + width]))
                boxes.append(fractions(frames, top, left, height, width))
        return torch.stack(clips), torch.stack(boxes), False


def middle_frame(
    raw: RawVideo | VideoReader, channels: int, max_pixels: int = MAX_PIXELS
) -> Tensor:
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
            f"has {num_frames} frame{'s' * (num_frames != 1)} where a clip of {frames}, {stride} apart, needs "
            f"{(frames - 1) * stride + 1}; set a smaller clip.stride or clip.frames, or clip.short=hold"
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
    base = min(height, width)
    heights = [_snapped(int(base * scale), size[0], height) for scale in scales]
    widths = [_snapped(int(base * scale), size[1], width) for scale in scales]
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[int(generator.integers(len(pairs)))]
    down, right = _PLACES[int(generator.integers(len(_PLACES)))]
    return (
        (height - crop_height) // 4 * down,
        (width - crop_width) // 4 * right,
        crop_height,
        crop_width,
    )


def _snapped(side: int, wanted: int, most: int) -> int:
    return max(1, min(wanted if abs(side - wanted) < _SNAP else side, most))


def even_windows(
    num_frames: int, frames: int, stride: int, segments: int, short: Short
) -> list[list[int]]:
    """``segments`` windows at even distances in the list of every ``stride``-th frame; the first
    begins at 0.
    """
    listed = len(range(0, num_frames, stride))
    step = max(0.0, (listed - frames) / max(1, segments - 1))
    return [
        window(num_frames, int(step * number) * stride, frames, stride, short)
        for number in range(segments)
    ]


def even_crops(height: int, width: int, size: tuple[int, int], crops: int) -> list[tuple[int, int]]:
    """``crops`` corners (top, left) at even distances from start to end of the side that is too
    long.
    """
    spare_height, spare_width = height - size[0], width - size[1]
    if crops == 1:
        return [(spare_height // 2, spare_width // 2)]
    return [
        (int(spare_height * number / (crops - 1)), int(spare_width * number / (crops - 1)))
        for number in range(crops)
    ]


def resize_frames(frames: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """(T, C, H, W) bytes resized to ``size`` with antialiasing."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    # Bytes that lie together per pixel, as decoders give them, take torch's vectorised path.
    packed = frames.contiguous(memory_format=torch.channels_last)
    return F.interpolate(packed, size, mode=interpolation, antialias=True)


def _read(video: VideoReader, indices: Sequence[int], channels: int, smallest_side: int) -> Tensor:
    """(T, C, H, W) uint8; a frame that is asked for several times is decoded once."""
    wanted = sorted(set(indices))
    place = {index: number for number, index in enumerate(wanted)}
    frames = fit_frames(video.frames(wanted), channels)
    check_side(frames, smallest_side)
    return frames if wanted == list(indices) else frames[[place[index] for index in indices]]


def _as_clip(frames: Tensor) -> Tensor:
    """(T, C, H, W) as (C, T, H, W) in one piece."""
    return frames.transpose(0, 1).contiguous()
