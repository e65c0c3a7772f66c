"""Times two processes of this machine, a core each, in turns with one of them alone.

    python benchmarks/ranks_against_one.py batch_size=16 rounds=7 out=ranks.json
    python benchmarks/ranks_against_one.py steps=false batch_size=64 image_size=224

Weak scaling: two processes with twice the batch, against one with the batch.  Strong scaling: two
processes against one with the same batch.  Loader: two processes that read and crop their own
images, against one.  Efficiency is the share of the ideal, twice the images a second: the median of
the rounds' own ratios, by the clock and by what the processors did, which other programs on the
machine disturb less.  MAE, weights of float32, one thread for each process.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from PIL import Image
from pydantic import Field

from patchmine.bench.measure import hardware
from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import RUN_LENGTH, build_method
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import train_batches
from patchmine.data.settings import ViewSettings
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import TrainView
from patchmine.models.onednn import measured_product
from patchmine.strict import BatchSize, Count, Side, Strict
from patchmine.system.disk import replacing
from patchmine.train.engine import Engine
from patchmine.train.settings import Sharding, TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, Progress

PROCESSES = 2
PICTURES, PICTURE_SIDE, BATCHES_READ = 256, 320, 4
MIDDLE = Progress(RUN_LENGTH // 2, RUN_LENGTH, 1)


class RanksSettings(Strict):
    """What is timed."""

    model: str = "vit_small_patch16_224"
    image_size: Side = 128
    batch_size: BatchSize = Field(16, description="images of one process")
    rounds: Count = 7
    steps: bool = Field(True, description="false: time the loader alone")
    out: Path | None = Field(None, description="JSON file for the result")


class Spent(NamedTuple):
    """By the clock, and by the processors of all that took part."""

    clock: float
    processors: float


Way = tuple[Callable[[], object], bool]
"""What is timed, and whether both processes do it."""


def stepper_of(settings: RanksSettings, engine: Engine, batch_size: int) -> Callable[[], object]:
    """A step of so many images over all processes of an engine."""
    config = BenchStepSettings(model=settings.model, image_size=settings.image_size)
    torch.manual_seed(0)
    method = build_method("mae", {}, config)
    train = TrainSettings.model_validate({"batch_size": batch_size, "warmup_epochs": 0})
    stepper = Stepper(method, engine, train)
    rows, side = stepper.rows, settings.image_size
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(rows, 4)
    views = [torch.randn(rows, 3, side, side)]
    batch = Batch(views, torch.arange(rows), whole, torch.zeros(rows, dtype=torch.bool))
    return partial(stepper.make, MIDDLE, repeat(batch))


def reader_of(settings: RanksSettings, engine: Engine, data: Path) -> Callable[[], object]:
    """Some batches of crops of this process's images, read without workers."""
    source = open_source(data)
    length = settings.rounds * BATCHES_READ + BATCHES_READ
    size = settings.batch_size * engine.world_size
    train = TrainSettings.model_validate(
        {"batch_size": size, "workers": 0, "epochs": None, "steps": length}
    )
    view = TrainView(ViewSettings(image_size=(settings.image_size, settings.image_size)))
    batches: Iterator[Batch] = train_batches(
        source,
        view,
        train,
        train,
        engine,
        seed=0,
        steps=range(length),
        steps_per_epoch=max(1, len(source) // size),
        bad=BadFiles(None, 0.0),
    )
    return lambda: [next(batches) for _ in range(BATCHES_READ)]


def spent(way: Way, engine: Engine) -> Spent:
    """By one turn, from when all processes are ready until all have done."""
    work, together = way
    engine.barrier()
    clock, processor = time.perf_counter(), time.process_time()
    if together or engine.is_main:
        work()
    if together:
        engine.barrier()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    taken = engine.gather(processor if together or engine.is_main else 0.0)
    return Spent(engine.gather(clock)[0], sum(taken))


def ways_of(settings: RanksSettings, engine: Engine, data: Path) -> dict[str, Way]:
    """All that takes turns."""
    size, both = settings.batch_size, settings.batch_size * PROCESSES
    idle = lambda: None  # noqa: E731 - what the other process does meanwhile
    engine.product = engine.gather(measured_product())[0]
    alone = Engine(device="cpu") if engine.is_main else None
    if alone is not None:
        alone.product = engine.product
    ways: dict[str, Way] = {
        "read alone": (idle if alone is None else reader_of(settings, alone, data), False),
        "read": (reader_of(settings, engine, data), True),
    }
    if not settings.steps:
        return ways
    for name, count in (("alone", size), ("alone, twice the batch", both)):
        ways[name] = (idle if alone is None else stepper_of(settings, alone, count), False)
    shardings: tuple[Sharding, ...] = ("ddp", "fsdp")
    for sharding in shardings:
        engine.sharding = sharding
        ways[sharding] = (stepper_of(settings, engine, both), True)
    return ways


def efficiency(
    rounds: list[dict[str, Spent]], one: str, two: str, ideal: float
) -> dict[str, float]:
    """Medians of the rounds' shares of the ideal: by the clock, time of one over that of two."""
    clock = [each[one].clock / each[two].clock / ideal for each in rounds]
    by_processors = [
        each[one].processors * PROCESSES / ideal / each[two].processors for each in rounds
    ]
    return {"clock": round(median(clock), 3), "processors": round(median(by_processors), 3)}


def race(settings: RanksSettings, engine: Engine, data: Path) -> dict[str, Any]:
    """Everything once to warm up, then in turns."""
    ways = ways_of(settings, engine, data)
    for way in ways.values():
        spent(way, engine)
    rounds = [
        {name: spent(way, engine) for name, way in ways.items()} for _ in range(settings.rounds)
    ]
    found = {
        f"{kind}, {sharding}": efficiency(rounds, one, sharding, ideal)
        for sharding in ("ddp", "fsdp")
        if settings.steps
        for kind, one, ideal in (("weak", "alone", 1.0), ("strong", "alone, twice the batch", 2.0))
    }
    found["loader"] = efficiency(rounds, "read alone", "read", 1.0)
    seconds = {name: round(median(each[name].clock for each in rounds), 4) for name in ways}
    return {
        "settings": settings.model_dump(mode="json", exclude={"out"}),
        "hardware": hardware(torch.device("cpu")),
        "load_before": os.getloadavg()[0],
        "efficiency": found,
        "seconds": seconds,
    }


def write_pictures(folder: Path) -> None:
    """JPEGs of smooth noise."""
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        coarse.resize((PICTURE_SIDE, PICTURE_SIDE)).save(folder / f"{number:03d}.jpg", quality=90)


@click.command(help=__doc__)
@click.argument("words", nargs=-1)
def main(words: tuple[str, ...]) -> None:
    """One race."""
    with ended_in_words(), tempfile.TemporaryDirectory() as folder:
        settings = read_words(RanksSettings, list(words), command="ranks_against_one.py")
        engine = Engine(device="cpu", devices=PROCESSES)
        with engine.together():
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[engine.rank % len(cores)]})
            torch.set_num_threads(1)
            write_pictures(Path(folder))
            result = race(settings, engine, Path(folder))
            if engine.is_main:
                print(json.dumps(result, indent=1))
                if settings.out is not None:
                    with replacing(settings.out) as new:
                        new.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
