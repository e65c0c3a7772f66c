"""A run as large and as long as there is time for: ``budget=`` becomes settings, once."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from patchmine.config.explain import shown
from patchmine.config.resolve import changed_results, results_of, with_smaller
from patchmine.config.schema import AnyConfig, PretrainConfig, SizeRow
from patchmine.data.sources.contract import Source
from patchmine.runs import preparing
from patchmine.runs.known import is_run, settings_of_run
from patchmine.strict import seconds_in
from patchmine.train.checkpoint import SCRATCH
from patchmine.training.pace import Pace
from patchmine.training.place import Place
from patchmine.training.timing import Make, measure_pace, measure_step
from patchmine.types import Progress

FEW_STEPS = 50  # with fewer a run has hardly begun
_SHARE, _LONGEST = 0.04, 15.0  # of a budget that the steps may take, in seconds


def fit_to_budget(
    config: PretrainConfig, row: SizeRow | None, place: Place, images: Source, make: Make
) -> PretrainConfig:
    """The settings that their budget of time allows, alike in all processes.

    Args:
        config: complete settings, their length that of a run without a budget.
        row: of ``by_size``, by which they were chosen, if they were.
        place: of the run.
        images: what is trained on.
        make: builds the method; what is timed is thrown away.

    Returns:
        Settings with ``steps`` in the place of ``epochs`` and ``budget``, where time is short with
        smaller ones of the row; the warm-up keeps its share of the run.
    """
    if config.budget is None:
        return config
    if place.engine.largest(is_run(place.folder)):  # resume=auto: all of it is chosen
        return _as_chosen(_sizes(config, row), settings_of_run(place.folder))
    place.say(f"budget={config.budget}: a few steps are timed first, and thrown away.")
    config = chosen_size(config, row, place, images, make)
    assert config.budget is not None
    with scratch_in(place.folder) as scratch:
        limit = min(_LONGEST, _SHARE * seconds_in(config.budget))
        pace = measure_pace(config, place.engine, images, make, scratch, limit)
    return fitted(config, place, len(images), pace)


def _sizes(config: PretrainConfig, row: SizeRow | None) -> list[PretrainConfig]:
    """These settings, and the row's smaller ones."""
    return [config, *([] if row is None else with_smaller(config, row, "by_size, smaller"))]


def _as_chosen(sizes: Sequence[PretrainConfig], run: AnyConfig) -> PretrainConfig:
    """Of these settings those that a run began with, as far as they are its own at all."""
    length = run.model_dump(include={"steps", "epochs", "warmup_epochs"})
    own = results_of(run)
    known = [size.model_copy(update={"budget": None, **length}) for size in sizes]
    return min(known, key=lambda size: len(changed_results(own, results_of(size))))


def chosen_size(
    config: PretrainConfig, row: SizeRow | None, place: Place, images: Source, make: Make
) -> PretrainConfig:
    """These settings, or the row's first smaller ones with which so many epochs fit as it asks for;
    where none of them do, the quickest.
    """
    sizes = _sizes(config, row)
    if config.budget is None or row is None or row.min_epochs is None or len(sizes) == 1:
        return config
    epochs: list[float] = []  # seconds of one
    for size in sizes:
        step = measure_step(size, place.engine, images, make)
        epochs.append(step * preparing.length_of(size, len(images)).steps_per_epoch)
        if seconds_left(config, place) / epochs[-1] >= row.min_epochs:
            break
    left, quickest = seconds_left(config, place), epochs.index(min(epochs))
    if quickest > 0:
        place.say(
            f"budget={config.budget}: {_differing(sizes[quickest], config)}, so that about "
            f"{_count(left / epochs[quickest])} epochs fit, not {_count(left / epochs[0])}."
        )
    return sizes[quickest]


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _differing(config: PretrainConfig, other: PretrainConfig) -> str:
    """What differs between settings, as "patch_size=8 instead of 16"."""
    now, before = map(results_of, (config, other))
    return ", ".join(
        f"{name}={_told(value)}"
        + (f" instead of {_told(before[name])}" if before.get(name) is not None else "")
        for name, value in now.items()
        if name not in before or before[name] != value
    )


def _told(value: Any) -> str:
    """A setting as it is given; a square by its side."""
    is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return shown(value[0] if is_square else value)


def seconds_left(config: PretrainConfig, place: Place) -> float:
    """What is left of a budget, alike in all processes."""
    assert config.budget is not None
    spent = place.engine.largest(math.ceil(1e3 * (perf_counter() - place.began))) / 1e3
    return max(0.0, seconds_in(config.budget) - spent)


def fitted(config: PretrainConfig, place: Place, images: int, pace: Pace) -> PretrainConfig:
    """The settings with the steps that fit into the time that is left of their budget."""
    planned = preparing.length_of(config, images)
    own_steps = pace.fitting(config, planned.steps_per_epoch, seconds_left(config, place))
    steps = place.engine.largest(own_steps if place.engine.is_main else 0)
    length = Progress(0, steps, planned.steps_per_epoch)
    epochs = steps / length.steps_per_epoch
    place.say(
        f"budget={config.budget}: {steps:,} steps ({epochs:.3g} epochs) at {pace.step:.3g} s a "
        f"step; pictures, checkpoints and monitors take {pace.beside(config, length):.0f} s of it."
    )
    if steps < FEW_STEPS:
        place.say(
            f"warning: in {steps:,} steps next to nothing is learned: give a longer budget, or a "
            "smaller batch_size, image_size or model"
        )
    warmup = config.warmup_epochs * steps / max(1, planned.total_steps)
    chosen = {"budget": None, "steps": steps, "epochs": None, "warmup_epochs": round(warmup, 6)}
    return config.model_copy(update=chosen)


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder in the run's for what is timed, gone afterwards; a run that begins sweeps it."""
    scratch = folder / f"{SCRATCH}.{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
