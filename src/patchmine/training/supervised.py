"""What tasks with labels share: a validation, the best checkpoint, and the files of a result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from patchmine.config.resolve import Config, resolve_size
from patchmine.config.schema import DetectConfig, FinetuneConfig, SegmentConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import View
from patchmine.data.workers import num_workers
from patchmine.errors import Say, UserError, silent
from patchmine.evaluate.measure import write_result
from patchmine.evaluate.paired import interval_in_words
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder
from patchmine.task import Task
from patchmine.train.checkpoint import Checkpoint
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import Hooks
from patchmine.train.optim import render_groups
from patchmine.training.place import Place, agree, last_files, train_task
from patchmine.types import Batch, Progress

TEST = "test"  # eval/test.json

Part = TypeVar("Part", bound=Source, contravariant=True)
SupervisedConfig = FinetuneConfig | SegmentConfig | DetectConfig


class Judge(Protocol[Part]):
    """Scores a task on images that it does not learn, each process its share."""

    def __call__(self, part: Part, title: str, say: Say) -> dict[str, Any]: ...


def teach(
    task: Task,
    config: SupervisedConfig,
    train: Source,
    val: Any,
    view: View,
    place: Place,
    judge: Judge[Any],
    *,
    name: str,
    start: Checkpoint | None,
    draw: Callable[[Progress, Say], None] | None = None,
) -> BadFiles:
    """Train a task to its end, and leave it as its best checkpoint where one was chosen.

    Args:
        task: what is trained.
        config: complete settings.
        train: what is learned.
        val: what the best checkpoint is chosen by; None: the last one is the best.
        view: what becomes of one item.
        place: the run's folder and processes.
        judge: scores ``val``.
        name: of what is done, for people.
        start: the checkpoint to go on from.
        draw: makes a picture, told whom to tell.

    Returns:
        The items that could not be read.
    """
    rates = render_groups(
        task.param_groups(),
        weight_decay=config.weight_decay,
        blr=config.blr,
        batch_size=config.batch_size,
    )
    place.say(rates)

    def watch(log: Log) -> Hooks:
        def validate(done: Progress) -> Mapping[str, float] | None:
            return _validate(task, config, judge, val, log, done)

        if draw is None:
            return Hooks(on_epoch=validate)
        return Hooks(on_epoch=validate, on_sample=lambda done: draw(done, log.say))

    bad = train_task(
        task,
        config,
        train,
        view,
        place,
        name=name,
        start=start,
        watch=watch,
        patience=config.patience,
    )
    place.engine.barrier()  # the checkpoint is written
    if val is not None and os.path.lexists(place.folder / "checkpoints" / "best"):
        task.load_state_dict(RunFolder(place.folder).trained().state_dict())
    return bad


def fit_to_parts(
    config: Config, place: Place, parts: Iterable[Source | None], names: Sequence[str]
) -> Config:
    """The settings, with those that had to wait for the data, alike in all processes.

    Args:
        config: the settings.
        place: the run's processes.
        parts: what is trained on, then the others that there are.
        names: of the classes.
    """
    given = [part for part in parts if part is not None]
    images = given[0]
    config = config.model_copy(update={"classes": [*names]})
    config = resolve_size(config, len(images), place.say, place.engine.device.type)
    config = preparing.with_statistics(config, images, place.say)
    config = preparing.fit_to_length(config, len(images), place.say)
    found = (f"{len(part):,} of {part.fingerprint} {part.target_digest}" for part in given)
    agree(config, place, ", ".join(found))
    return config


def judged_batches(
    part: Source, view: View, config: SupervisedConfig, engine: Engine, at_once: int, targets: bool
) -> tuple[int, Iterator[Batch]]:
    """How many items of ``part`` this process looks at, and these in batches, as they were read.

    Raises UserError, while iterating, where too many are broken.
    """
    mine = np.array_split(np.arange(len(part)), engine.world_size)[engine.rank]
    loaded = plain_batches(
        part,
        view,
        batch_size=at_once,
        indices=mine,
        workers=num_workers(config.workers, engine.device, engine.local_size),
        read_timeout=config.read_timeout,
        bad=BadFiles(None, config.max_bad_share),
        targets=targets,
    )
    return len(mine), loaded


def refuse_faults(faults: Sequence[str]) -> None:
    """Raise UserError with all of them, where there are any (check=true)."""
    if faults:
        plural = "s" if len(faults) > 1 else ""
        raise UserError("\n".join([f"{len(faults):,} fault{plural}:", *faults]))


def _validate(
    task: Task, config: SupervisedConfig, judge: Judge[Any], val: Any, log: Log, done: Progress
) -> Mapping[str, float] | None:
    """Scores every ``eval_every`` epochs and at the end: a line of metrics.jsonl."""
    every, is_last = config.eval_every, done.step == done.total_steps
    if val is None or (not is_last and (every == 0 or done.epoch % every)):
        return None
    found = judge(val, "validation", silent)  # a line an epoch is enough
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    interval = {name: found[name] for name in ("top1_interval",) if name in found}
    epoch = done.step / done.steps_per_epoch
    log.write({"step": done.step, "epoch": epoch, "eval": {"name": "val", **numbers, **interval}})
    metric = task.metric()
    assert metric is not None, "a task with labels names its score"
    ends = interval_in_words(found)
    log.say(f"step {done.step}: validation {metric} {numbers[metric]:.2f}{ends}")
    return numbers


def file_result(
    config: SupervisedConfig,
    place: Place,
    found: Mapping[str, Any],
    images: Mapping[str, Any],
    chosen_by: int | None,
    export: Callable[[RunFolder], Any],
) -> None:
    """eval/test.json and the export of a run that is trained, by the first process.

    Args:
        config: complete settings.
        place: the run's folder and processes.
        found: the scores.
        images: how many they are of, and how these were seen.
        chosen_by: how many images the best checkpoint was chosen by; None: it was not chosen.
        export: writes the export.
    """
    if not place.engine.is_main:
        return
    place.put_back(config)
    run = RunFolder(place.folder)
    with last_files(place.folder, "its results"):
        result = {
            "name": TEST,
            "protocol": "finetune" if isinstance(config, FinetuneConfig) else config.kind,
            **found,
            "target": {"name": config.init or config.model, "weights": "student", "note": ""},
            "images": {**images, "image_size": list(config.image_size)},
            "chosen_by": None if chosen_by is None else f"validation on {chosen_by:,} images",
            "notes": [],
        }
        write_result(run.eval_dir / f"{TEST}.json", result)
        export(run)
