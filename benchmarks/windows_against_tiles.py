"""Times reading tiles out of slides and scenes, beside opening these for each and beside cut ones.

    python benchmarks/windows_against_tiles.py slides/ level=0 size=256 tiles=500 rounds=5

Tiles are read and decoded in a random order, in turns: out of images that stay open, out of images
that are opened for each of them, and as files that `patchmine data tile` has cut.  What is printed
is the median over rounds of the time for one, by what the processor did and by the clock.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from pydantic import Field

from patchmine.bench.measure import hardware
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.data.decoding import windows
from patchmine.data.decoding.decode import decode
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.tiling import Cut, cut_tiles, list_tiles, open_scenes
from patchmine.strict import Count, Strict, Text


class RaceSettings(Strict):
    """What is raced."""

    data: Text = Field(description="folder of slides or scenes")
    level: int = Field(default=0, ge=0)
    size: Count = 256
    tiles: Count = 500
    rounds: Count = 5


def milliseconds(source: Source, order: list[int], before: Callable[[], object]) -> list[float]:
    """Processor time and time by the clock for one tile."""
    processor, clock = time.process_time(), time.perf_counter()
    for index in order:
        before()
        decode(source.read(index), 3)
    taken = time.process_time() - processor, time.perf_counter() - clock
    return [1e3 * each / len(order) for each in taken]


def race(settings: RaceSettings, folder: Path) -> None:
    """Print the times."""
    files, cut = open_scenes(settings.data), Cut(settings.size, level=settings.level)
    list_tiles(files, folder / "tiles.csv", cut)
    cut_tiles(files, folder / "tiles", cut)
    listed, tiles = open_source(folder / "tiles.csv"), open_source(folder / "tiles")
    ways: dict[str, tuple[Source, Callable[[], object]]] = {
        "images stay open": (listed, lambda: None),
        "images are opened each time": (listed, windows.close_scenes),
        "cut tiles": (tiles, lambda: None),
    }
    rng, found = np.random.default_rng(0), {way: list[list[float]]() for way in ways}
    for _ in range(settings.rounds):
        order = rng.integers(len(listed), size=settings.tiles).tolist()
        for way, (source, before) in ways.items():
            found[way].append(milliseconds(source, order, before))
    for way, rounds in found.items():
        processor, clock = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{way}: {processor:.2f} ms a tile of the processor, {clock:.2f} by the clock")
    print(f"{len(listed):,} tiles of {len(files)} images; {hardware(torch.device('cpu'))}")


@click.command(help=__doc__)
@click.argument("words", nargs=-1)
def main(words: tuple[str, ...]) -> None:
    """One race."""
    with ended_in_words(), tempfile.TemporaryDirectory() as folder:
        settings = read_words(
            RaceSettings, list(words), command="windows_against_tiles.py", first=("data",)
        )
        race(settings, Path(folder))


if __name__ == "__main__":
    main()
