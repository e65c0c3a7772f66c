"""Times reading shards at an address, once they were fetched, in turns with the same on a disk.

    python benchmarks/remote_against_local.py photos/ images=2000 rounds=5

Images are read in a random order, of shards that `data shard` writes of a folder's images; those at
an address are `file://` ones, which are fetched, kept and read as any.  What is printed is the
median over rounds of (time at an address) / (time on the disk), of reading alone and of reading and
decoding, by what the processor did, and by the clock.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from pydantic import Field

from patchmine.bench.measure import hardware
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.data.decoding.decode import decode
from patchmine.data.sharding import write_shards
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.strict import Count, Strict, Text


class RaceSettings(Strict):
    """What is raced."""

    data: Text = Field(description="folder of images")
    images: Count = 2000
    rounds: Count = 5


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Processor time and time by the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - clock


def read(source: Source, order: list[int], *, decoded: bool) -> None:
    """Every item of an order."""
    for index in order:
        data = source.read(index)
        if decoded:
            decode(data, 3)


def race(settings: RaceSettings, folder: Path) -> None:
    """Print the ratios."""
    write_shards(open_source(settings.data), folder / "shards")
    here = open_source(folder / "shards")
    there = open_source(f"file://{folder}/shards")
    read(there, list(range(len(there))), decoded=False)  # the first epoch
    rng = np.random.default_rng(0)
    for decoded in (False, True):
        rounds = list[tuple[float, float]]()
        for _ in range(settings.rounds):
            order = rng.integers(len(here), size=settings.images).tolist()
            ours = seconds(partial(read, there, order, decoded=decoded))
            local = seconds(partial(read, here, order, decoded=decoded))
            rounds.append((ours[0] / local[0], ours[1] / local[1]))
        processor, clock = (statistics.median(column) for column in zip(*rounds, strict=True))
        what = "reading and decoding" if decoded else "reading"
        print(f"{what}: {processor:.2f} times the processor's time, {clock:.2f} by the clock")
    print(hardware(torch.device("cpu")))


@click.command(help=__doc__)
@click.argument("words", nargs=-1)
def main(words: tuple[str, ...]) -> None:
    """One race."""
    with ended_in_words(), tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        settings = read_words(
            RaceSettings, list(words), command="remote_against_local.py", first=("data",)
        )
        race(settings, Path(folder))


if __name__ == "__main__":
    main()
