"""`patchmine bench data video=true`: what it costs one worker to have a clip out of a video."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from patchmine.bench.data import in_turns
from patchmine.data.decoding import pyav
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import VideoFile, open_video
from patchmine.data.randomness import sample_generator
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import Clip, ViewSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.clips import TrainClips, window
from patchmine.errors import Say, UserError, silent

_VIDEOS = 50
Job = tuple[str | bytes, list[int]]
"""A video's file or content, and the numbers of the frames of a clip."""


def bench_video(
    source: str | Path,
    *,
    image_size: int = 224,
    frames: int = 16,
    stride: int = 4,
    repeats: int = 5,
    say: Say = silent,
) -> dict[str, Any]:
    """Time the reading of clips on one thread, a random window of each of up to 50 videos.

    Args:
        source: a folder, list or shards of encoded videos.
        image_size: side of a view, in pixels.
        frames: of a clip.
        stride: a clip takes every such frame.
        repeats: how often each window is read.
        say: hears the result in lines.

    Returns:
        Milliseconds per clip, means over the videos of the medians over the repeats: ``frames`` to
        decode them, ``view`` to crop and resize them.

    Raises:
        UserError: PyAV is missing, or nothing in ``source`` can be decoded.
    """
    if pyav.version() is None:
        raise UserError("videos are decoded by PyAV, which is missing: pip install av")
    opened = open_source(source, "video")
    jobs = video_jobs(opened, frames, stride)
    settings = ViewSettings(
        image_size=(image_size, image_size),
        interpolation="bilinear",
        flip=0,
        clip=Clip(frames=frames, stride=1, tubelet=1),
    )
    view, clips = TrainClips(settings), [read_frames(job) for job in jobs]
    seen = {"view": lambda clip: view(clip, sample_generator(0, 0, 0))}
    costs = {
        "frames": per_video(in_turns({"frames": read_frames}, jobs, repeats, turn=1), "frames"),
        "view": per_video(in_turns(seen, clips, repeats, turn=1), "view"),
    }
    milliseconds = {name: 1e3 * mean(map(median, spent)) for name, spent in costs.items()}
    size = {"frames": frames, "stride": stride, "repeats": repeats}
    say(
        f"{frames} frames, {stride} apart, of {len(jobs)} videos of {opened.name}, one thread, "
        f"{repeats} repeats"
    )
    say(f"{'decoding':44s}{milliseconds['frames']:8.1f} ms per clip")
    say(f"{f'crop and resize to {image_size} pixels':44s}{milliseconds['view']:8.1f} ms per clip")
    return {"videos": len(jobs), **size, "milliseconds": milliseconds}


def per_video(repeats: list[dict[str, list[float]]], name: str) -> list[tuple[float, ...]]:
    """Seconds of one way for each video, one number a repeat."""
    return list(zip(*(turns[name] for turns in repeats), strict=True))


def video_jobs(source: Source, frames: int, stride: int) -> list[Job]:
    """A seeded choice of videos that can be decoded, each with a window of it."""
    jobs: list[Job] = []
    for index in spread_indices(len(source), _VIDEOS).tolist():
        raw = source.read(index)
        content = raw.path if isinstance(raw, VideoFile) else raw
        if not isinstance(content, str | bytes):
            raise UserError(
                f"{source.name} holds no encoded videos; give files or shards, whose decoding can "
                "be timed"
            )
        try:
            number = open_video(raw).num_frames
            last = max(0, number - frames * stride)
            start = int(sample_generator(0, 0, index).integers(0, last + 1))
            wanted = window(number, start, frames, stride, "hold")
            open_video(raw).frames(wanted)
        except (OSError, DecodeError):
            continue
        jobs.append((content, wanted))
    if not jobs:
        raise UserError(f"none of the videos of {source.name} can be decoded; give some that can")
    return jobs


def read_frames(job: Job) -> Tensor:
    """The frames of a clip as training reads them, (T, C, H, W) uint8."""
    content, wanted = job
    key = content if isinstance(content, str) else None
    frames: torch.Tensor = pyav.PyAVReader(content, key).frames(wanted)
    return frames
