"""What a pre-training run would be, before it is made: from its settings, data and a few steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from patchmine.config.schema import PretrainConfig
from patchmine.data.sources.source import Spec
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.report.words import duration, gib
from patchmine.runs import preparing
from patchmine.runs.preparing import NO_SOURCES
from patchmine.train.engine import Engine
from patchmine.train.loop import num_kept, save_every
from patchmine.training.budget import chosen_size, fitted, scratch_in
from patchmine.training.pace import Pace
from patchmine.training.place import Place, open_place
from patchmine.training.pretraining import find_images, make_first
from patchmine.training.timing import measure_pace

HOUR, NIGHT = 3_600, 8 * 3_600  # seconds
TIMED = 10.0  # seconds of steps


def plan(
    config: PretrainConfig, *, sources: Mapping[str, Spec] = NO_SOURCES, say: Say = silent
) -> str:
    """Time a few steps of a run that is not made.

    Args:
        config: the settings of the run; ``out`` may be missing.
        sources: as in `pretrain`.
        say: hears what is decided for the user.

    Returns:
        Lines on the run; none in processes other than the first.

    Raises:
        UserError: mistakes in settings or data.
    """
    room = TemporaryDirectory(dir=shared_room(config))
    with room as folder, open_place(Path(folder), config, say) as place:
        images, found, row = find_images(config, place, sources)
        place.say("A few steps are timed, and thrown away.")
        found = chosen_size(found, row, place, images, make_first)
        with scratch_in(place.folder) as scratch:
            pace = measure_pace(found, place.engine, images, make_first, scratch, TIMED)
        if found.budget is not None:
            found = fitted(found, place, len(images), pace)
        told = described(found, pace, len(images), place.engine)
        lines = [f"{name:<12}{text}" for name, text in told.items()]
        return "\n".join(lines) if place.engine.is_main else ""


def shared_room(config: PretrainConfig) -> Path | None:
    """Where a checkpoint is tried out: of divided weights on the disk of ``out``, which all
    machines reach, or UserError where nobody may write there; None: anywhere.
    """
    if config.sharding == "ddp" or config.out is None:
        return None
    above = Path(config.out).expanduser().absolute().parents
    room = next(folder for folder in above if folder.is_dir())
    if not os.access(room, os.W_OK):
        what = f"{shown_name(room)} may not be written to, where a checkpoint would be timed"
        raise UserError(f"out={shown_name(config.out)}: {what}; name another place")
    return room


def resolved(
    config: PretrainConfig, *, sources: Mapping[str, Spec] = NO_SOURCES, say: Say = silent
) -> PretrainConfig:
    """The settings with all that waits for the data, but for a budget.

    Raises UserError for mistakes in settings or data.
    """
    with TemporaryDirectory() as folder:
        place = Place(Path(folder), Engine(config.device), say)
        return find_images(config, place, sources)[1]


def described(config: PretrainConfig, pace: Pace, images: int, engine: Engine) -> dict[str, str]:
    """A plan of these settings at this pace."""
    item, length = preparing.item_of(config), preparing.length_of(config, images)
    epochs = length.total_steps / length.steps_per_epoch
    beside = duration(pace.beside(config, length))
    saved = min(save_every(config, length), length.total_steps)
    kept = num_kept(config, length)
    files = kept * pace.checkpoint_bytes + pace.export_bytes
    height, width = config.image_size
    owner = "the GPU" if engine.device.type == "cuda" else "this process"
    if pace.worker_bytes:
        owner += f", and {gib(pace.worker_bytes)} of those that read images"

    def in_time(seconds: int) -> str:
        steps = pace.fitting(config, length.steps_per_epoch, seconds)
        return f"{steps / length.steps_per_epoch:,.3g} epochs ({steps:,} steps)"

    return {
        "images": f"{images:,} {item.noun}s of {shown_name(str(config.data))}",
        "model": f"{config.model} by {config.method.name}: {pace.trained / 1e6:,.1f} million "
        "parameters learn",
        "size": f"{item.describe(config)}{height}x{width}",
        "length": f"{length.total_steps:,} steps ({epochs:,.3g} epochs) of {config.batch_size}",
        "time": f"{duration(pace.seconds(config, length))} at {pace.step:.3g} s a step; {beside} "
        "of it for pictures, checkpoints and monitors",
        "memory": f"{gib(pace.peak_bytes)} at most, of {owner}",
        "disk": f"{gib(files)}: {kept} checkpoint{'s' * (kept > 1)} and the export",
        "checkpoint": f"the first after {saved:,} steps, {duration(saved * pace.step)}",
        "an hour": f"{in_time(HOUR)}: budget=1h",
        "a night": f"{in_time(NIGHT)}: budget=8h",
    }
