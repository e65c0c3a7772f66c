"""`patchmine bench data video=true`: what it costs one worker to have a clip's frames out of an
encoded video.

Against PyAV used as most training code uses a video reader: from the first frame on, one after the
other.  All readers get the same windows and take turns, one video at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding import pyav
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import VideoFile, open_video
from patchmine.data.loader import sample_generator
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import Clip, ViewSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.clips import TrainClips, window
from patchmine.errors import UserError

_VIDEOS = 50
_Read = Callable[[str | bytes, list[int]], object]
_Job = tuple[str | bytes, list[int]]


def bench_video(
    source: str | Path,
    *,
    image_size: int = 224,
    frames: int = 16,
    stride: int = 4,
    repeats: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times readers on one thread over a random window of up to 50 videos of ``source``,
    ``repeats`` times.

    ``milliseconds`` per clip are means over the videos of the medians over the repeats:
    "sequential" decodes and converts all frames, "until" those up to the last one wanted, of which
    it converts the wanted ones only; "PyAV" is our reader; "view" is the crop and resize that follow.  ``ratio``: how many times as fast as "sequential"
    each of ours is, ``ratio_until`` as "until": of each video the median over the repeats, of these
    the median, the smallest and the largest.  UserError without PyAV, or without encoded videos.
    """
    if pyav.version() is None:
        raise UserError("the videos are timed against PyAV, which is missing: pip install av")
    opened = open_source(source, "video")
    jobs = _jobs(opened, frames, stride)
    readers: dict[str, _Read] = {"sequential": _sequential, "until": _until, "PyAV": _pyav}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        _race(readers, jobs[:1])
        races = [_race(readers, jobs) for _ in range(repeats)]
        view = _view_seconds(jobs, image_size, frames)
    finally:
        torch.set_num_threads(threads)
    times = {name: 1e3 * mean(map(median, _by_video(races, name))) for name in readers}
    ours = [name for name in readers if name not in ("sequential", "until")]
    result = {
        "videos": len(jobs),
        "frames": frames,
        "stride": stride,
        "repeats": repeats,
        "milliseconds": {**times, "view": 1e3 * view},
        "ratio": {name: _ratio(races, "sequential", name) for name in ours},
        "ratio_until": {name: _ratio(races, "until", name) for name in ours},
    }
    _tell(result, opened.name, image_size, say)
    return result


def _jobs(source: Source, frames: int, stride: int) -> list[_Job]:
    """A seeded choice of videos that can be decoded, each with a window of it."""
    jobs: list[_Job] = []
    for index in spread_indices(len(source), _VIDEOS).tolist():
        raw = source.read(index)
        content = raw.path if isinstance(raw, VideoFile) else raw
        if not isinstance(content, str | bytes):
            raise UserError(
                f"{source.name} holds no encoded videos; give files or shards, whose decoding can be timed"
            )
        try:
            number = open_video(raw).num_frames
            start = int(
                sample_generator(0, 0, index).integers(0, max(0, number - frames * stride) + 1)
            )
            wanted = window(number, start, frames, stride, "hold")
            open_video(raw).frames(wanted)
        except (OSError, DecodeError):
            continue
        jobs.append((content, wanted))
    if not jobs:
        raise UserError(f"none of the videos of {source.name} can be decoded; give some that can")
    return jobs


def _race(readers: dict[str, _Read], jobs: Sequence[_Job]) -> dict[str, list[float]]:
    """Seconds of every reader for each video."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for content, wanted in jobs:
        for name, read in readers.items():
            begin = time.perf_counter()
            read(content, wanted)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _by_video(repeats: list[dict[str, list[float]]], name: str) -> list[tuple[float, ...]]:
    return list(zip(*(seconds[name] for seconds in repeats), strict=True))


def _ratio(repeats: list[dict[str, list[float]]], theirs: str, ours: str) -> dict[str, float]:
    pairs = zip(_by_video(repeats, theirs), _by_video(repeats, ours), strict=True)
    ratios = [median(t / o for t, o in zip(*pair, strict=True)) for pair in pairs]
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


def _sequential(content: str | bytes, wanted: list[int]) -> Tensor:
    frames = [frame.to_ndarray(format="rgb24") for frame in _decoded(content)]
    return torch.from_numpy(np.stack([frames[number] for number in wanted]))


def _until(content: str | bytes, wanted: list[int]) -> Tensor:
    found = {}
    for number, frame in enumerate(_decoded(content)):
        if number in wanted:
            found[number] = frame.to_ndarray(format="rgb24")
        if number >= wanted[-1]:
            break
    return torch.from_numpy(np.stack([found[number] for number in wanted]))


def _decoded(content: str | bytes) -> Any:
    """PyAV's frames, one after the other, on one thread."""
    import io

    import av

    container = av.open(content if isinstance(content, str) else io.BytesIO(content))
    container.streams.video[0].codec_context.thread_count = 1
    return container.decode(video=0)


def _pyav(content: str | bytes, wanted: list[int]) -> Tensor:
    key = content if isinstance(content, str) else None
    return pyav.PyAVReader(content, key).frames(wanted)


def _view_seconds(jobs: Sequence[_Job], image_size: int, frames: int) -> float:
    """Seconds for the crop and resize of one clip whose frames are at hand."""
    settings = ViewSettings(
        image_size=(image_size, image_size),
        interpolation="bilinear",
        flip=0,
        clip=Clip(frames=frames, stride=1, tubelet=1),
    )
    view, spent = TrainClips(settings), []
    for number, job in enumerate(jobs):
        clip = _pyav(*job)
        begin = time.perf_counter()
        view(clip, sample_generator(0, 0, number))
        spent.append(time.perf_counter() - begin)
    return median(spent)


def _tell(result: dict[str, Any], name: str, image_size: int, say: Callable[[str], None]) -> None:
    times, ratio, until = result["milliseconds"], result["ratio"], result["ratio_until"]
    say(
        f"{result['frames']} frames, {result['stride']} apart, of {result['videos']} videos of {name}, one thread, "
        f"{result['repeats']} repeats"
    )
    say(f"{'PyAV, all frames one after the other':42s}{times['sequential']:9.1f} ms per clip")
    say(f"{'PyAV, up to the last one wanted':42s}{times['until']:9.1f} ms per clip")
    for reader, factor in ratio.items():
        say(f"{f'patchmine with {reader}':42s}{times[reader]:9.1f} ms per clip")
        for theirs, found in (("all frames", factor), ("the last one wanted", until[reader])):
            spread = f"({found['least']:.1f} to {found['most']:.1f}, by video)"
            say(f"{f'  against PyAV, {theirs}':42s}{found['median']:9.1f} times as fast {spread}")
    say(f"{f'crop and resize to {image_size} pixels':42s}{times['view']:9.1f} ms per clip")
