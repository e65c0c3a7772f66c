"""Times our reading of a clip's frames in turns with PyAV used as most training code uses it.

    python benchmarks/video_against_pyav.py clips/ > video.json

``sequential`` decodes and converts all frames from the first on; ``until`` stops at the last one
wanted and converts the wanted ones only.  Ratios: of each video the median over the repeats, of
these the median, the smallest and the largest.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import av
import click
import numpy as np
import torch
from torch import Tensor

from patchmine.bench.data import in_turns
from patchmine.bench.video import Job, per_video, read_frames, video_jobs
from patchmine.cli.program import ended_in_words
from patchmine.data.sources.source import open_source


def decoded(content: str | bytes) -> Any:
    """PyAV's frames, one after the other, on one thread."""
    container = av.open(content if isinstance(content, str) else io.BytesIO(content))
    container.streams.video[0].codec_context.thread_count = 1
    return container.decode(video=0)


def sequential(job: Job) -> Tensor:
    """All frames, of which some are kept."""
    content, wanted = job
    frames = [frame.to_ndarray(format="rgb24") for frame in decoded(content)]
    return torch.from_numpy(np.stack([frames[number] for number in wanted]))


def until(job: Job) -> Tensor:
    """Frames up to the last one wanted."""
    content, wanted = job
    found = {}
    for number, frame in enumerate(decoded(content)):
        if number in wanted:
            found[number] = frame.to_ndarray(format="rgb24")
        if number >= wanted[-1]:
            break
    return torch.from_numpy(np.stack([found[number] for number in wanted]))


def ratio(repeats: list[dict[str, list[float]]], theirs: str, ours: str) -> dict[str, float]:
    """How many times as fast, by video."""
    pairs = zip(per_video(repeats, theirs), per_video(repeats, ours), strict=True)
    ratios = [median(t / o for t, o in zip(*pair, strict=True)) for pair in pairs]
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


def compare(
    source: str | Path, *, frames: int = 16, stride: int = 4, repeats: int = 5
) -> dict[str, Any]:
    """Milliseconds per clip of all readers, and how many times as fast ours is."""
    jobs = video_jobs(open_source(source, "video"), frames, stride)
    readers = {"sequential": sequential, "until": until, "ours": read_frames}
    turns = in_turns(readers, jobs, repeats, turn=1)
    times = {name: 1e3 * mean(map(median, per_video(turns, name))) for name in readers}
    ratios = {name: ratio(turns, name, "ours") for name in ("sequential", "until")}
    size = {"frames": frames, "stride": stride, "repeats": repeats}
    return {"videos": len(jobs), **size, "milliseconds": times, "times_as_fast": ratios}


@click.command(help=__doc__)
@click.argument("source")
def main(source: str) -> None:
    """The comparison as JSON."""
    with ended_in_words():
        print(json.dumps(compare(source), indent=1))


if __name__ == "__main__":
    main()
