"""How long a checkpoint keeps training waiting: blocking and in the background, in turns.

    python benchmarks/saving.py --method hpm --rounds 10

Of one method in mid-training on random images, each round writes a checkpoint of both kinds and
makes some steps behind it.  Told are medians over the rounds: how long the loop is held, how long
those steps take, and in how many seconds the file is there.  The steps behind a blocking checkpoint
run alone, those behind one in the background beside the writing.
"""

from __future__ import annotations

import tempfile
from itertools import repeat
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import torch

from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import RUN_LENGTH, build_method, engine_of, random_images, size_of
from patchmine.cli.program import ended_in_words
from patchmine.train.keeper import Keeper
from patchmine.train.optim import optimizer_tensors
from patchmine.train.settings import Saving, TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, Progress

WAYS: tuple[Saving, ...] = ("blocking", "background")


class Run:
    """A method in mid-training, and where its checkpoints lie."""

    def __init__(self, config: BenchStepSettings, folder: Path) -> None:
        engine, size = engine_of(config), config.batch_size
        method = build_method(str(config.method), {}, config)
        settings = TrainSettings(batch_size=size, warmup_epochs=0, keep_checkpoints=1)
        self.stepper = Stepper(method, engine, settings)
        rows, whole = torch.arange(size), torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(size, 4)
        unflipped = torch.zeros(size, dtype=torch.bool)
        images = random_images(config, 1, size_of(config), engine)
        self.batches = repeat(Batch(images, rows, whole, unflipped))
        self.keepers = {way: Keeper(folder / way) for way in WAYS}
        self.step = RUN_LENGTH // 2

    def make(self, steps: int) -> float:
        """Make so many; gives the seconds that they took."""
        began = perf_counter()
        for _ in range(steps):
            self.stepper.make(self.now, self.batches)
            self.step += 1
        return perf_counter() - began

    def save(self, way: Saving, steps: int) -> tuple[float, float, float]:
        """(seconds that the loop is held, those of the steps behind it, until the file is there)"""
        keeper = self.keepers[way]
        self.stepper.settings = self.stepper.settings.model_copy(update={"saving": way})
        began = perf_counter()
        keeper.save(self.stepper, self.now)
        held = perf_counter() - began
        behind = self.make(steps)
        keeper.wait()
        return held, behind, perf_counter() - began if way == "background" else held

    @property
    def now(self) -> Progress:
        """The step that comes."""
        return Progress(self.step, 10 * RUN_LENGTH, 1)

    @property
    def megabytes(self) -> float:
        """Of a checkpoint."""
        kept = [*self.stepper.task.state_dict().values()]
        kept += optimizer_tensors(self.stepper.optimizers).values()
        return sum(tensor.nbytes for tensor in kept) / 1e6


@click.command(help=__doc__)
@click.option("--method", default="hpm")
@click.option("--model", default="vit_small_patch16_224")
@click.option("--batch-size", default=8)
@click.option("--rounds", default=10)
@click.option("--steps", default=3, help="behind each checkpoint")
@click.option("--folder", default=None, help="where they are written; a temporary one")
def main(
    method: str, model: str, batch_size: int, rounds: int, steps: int, folder: str | None
) -> None:
    """Both ways in turns."""
    with ended_in_words(), tempfile.TemporaryDirectory(dir=folder) as place:
        config = BenchStepSettings(method=method, model=model, batch_size=batch_size, device="cpu")
        run = Run(config, Path(place))
        run.make(2)
        for way in WAYS:  # the first ones get their memory from the system
            run.save(way, 1)
        found: dict[Saving, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            for way in WAYS[:: 1 if turn % 2 else -1]:
                found[way].append(run.save(way, steps))
        print(f"{method} of {model}: {run.megabytes:,.0f} MB, medians of {rounds} rounds")
        for way, times in found.items():
            held, behind, there = (median(column) for column in zip(*times, strict=True))
            print(
                f"{way}: held {held:.2f} s, {steps} steps behind it {behind:.2f} s, "
                f"file there after {there:.2f} s"
            )


if __name__ == "__main__":
    main()
