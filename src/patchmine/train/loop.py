"""The training loop: rates -> losses -> backward -> clip -> update -> after_step; log, look, save.

Everything that moves with time is a function of ``Progress``, so that a run that was stopped goes
on as if nothing had happened.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from patchmine.errors import UserError
from patchmine.task import Task
from patchmine.train.checkpoint import newest_finite
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper, calmer, restore
from patchmine.train.log import Interval, Log
from patchmine.train.settings import LoggingSettings, SavingSettings, TrainSettings
from patchmine.train.signals import Interrupted, StopSignals
from patchmine.train.step import Stepper
from patchmine.types import Batch, Progress

MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which training stops
_TOLD, _PICTURED = "125", "13"  # first digits of the steps with numbers and with pictures
_PACED = 5  # steps after which the pace is told, one of those with numbers


@dataclass(frozen=True)
class Hooks:
    """What is called while a run trains.

    Args:
        on_start: in every process, before the first step of a run, with step 0; not where it goes
            on from a later one.
        on_pace: in every process, once in a run, after its first steps, with the seconds of one.
        before_epoch: in every process, with the step that comes.
        on_epoch: in every process, after each epoch and after the last step, with the count of
            finished steps; returns the scores of an evaluation, alike everywhere, or nothing.
        on_sample: in the first process, with the count of finished steps: every ``sample_every``
            and after the last one; by default before the first one, soon after it, and then ever
            further apart.
        before_save: in the first process, before each checkpoint.
        on_stop: in every process, as soon as a signal asks to stop.
    """

    on_start: Callable[[Progress], None] = lambda now: None
    on_pace: Callable[[Progress, float], None] = lambda done, seconds: None
    before_epoch: Callable[[Progress], None] = lambda now: None
    on_epoch: Callable[[Progress], Mapping[str, float] | None] = lambda done: None
    on_sample: Callable[[Progress], None] = lambda done: None
    before_save: Callable[[], None] = lambda: None
    on_stop: Callable[[], None] = lambda: None


def train(
    task: Task,
    batches: Iterator[Batch],
    engine: Engine,
    settings: TrainSettings,
    length: Progress,
    *,
    keeper: Keeper,
    log: Log,
    hooks: Hooks | None = None,
) -> Progress:
    """Train ``task`` to the end of the run; returns the progress that was reached.

    Args:
        task: what is trained; put into the state of ``keeper.start``, where there is one.
        batches: this process's micro-batches from the first step to be made, normalised and on the
            device.
        engine: where it is computed.
        settings: rates, optimizer, and how often something is done.
        length: a progress of the run, whichever.
        keeper: what becomes of checkpoints.
        log: hears the numbers.
        hooks: what else is done on the way.

    Raises:
        UserError: a full disk, no finite loss, a state that is not finite, another identity.
        Interrupted: after SIGINT, SIGTERM, SIGHUP or SIGUSR1.
    """
    hooks = hooks or Hooks()
    stepper = Stepper(task, engine, settings)
    total, per_epoch = length.total_steps, length.steps_per_epoch
    first = _begin(stepper, keeper, hooks, length)
    stepper.task.train()
    with StopSignals(hooks.on_stop) as stop, keeper.finishing():
        for step in range(first, total):
            now, done = length.at(step), length.at(step + 1)
            if keeper.is_exhausted(now):
                log.say(
                    f"no better {keeper.best_by} in {keeper.patience} epochs: training ends after "
                    f"step {step} of {total}"
                )
                stepper.give_back()
                return now
            if step % per_epoch == 0:
                with stepper.whole():
                    hooks.before_epoch(now)
            stepper.make(now, batches)
            _tell(stepper, done, done.step - first, keeper, log, hooks)
            asked = _look(stepper, done, done.step - first, stop, keeper, hooks)
            if asked and done.step < total:
                keeper.wait()
                engine.barrier()  # the checkpoint is written before any process ends
                name = signal.Signals(asked).name
                log.say(
                    f"{name}: stopped after step {done.step} of {total}, checkpoint written; go on "
                    f"with `patchmine resume {keeper.folder.parent}`"
                )
                raise Interrupted(asked, done.step, is_main=engine.is_main)
    _say_skipped(keeper.skipped + stepper.total_skipped(), stepper, total, log)
    stepper.give_back()
    return length.at(total)


def _begin(stepper: Stepper, keeper: Keeper, hooks: Hooks, length: Progress) -> int:
    """Bring the task to where training goes on from, and give that step."""
    settings, start = stepper.settings, keeper.start
    if start is not None:
        restore(stepper.task, stepper.optimizers, start, keeper.identity)
        if start.step > 0:
            return start.step
    with stepper.watch.paused(), _uncompiled(settings), stepper.whole():
        hooks.on_start(length.at(0))
        if stepper.engine.is_main and is_pictured(settings, length.at(0)):
            hooks.on_sample(length.at(0))
    return 0


def _tell(
    stepper: Stepper, done: Progress, made: int, keeper: Keeper, log: Log, hooks: Hooks
) -> None:
    """What is known after a step, of which this process has ``made`` so many."""
    settings, pace = stepper.settings, math.nan
    if _due(done, settings.log_every):
        pace = _report(stepper, done, log, keeper)
    elif _is_spaced(made, _TOLD):
        pace = _glance(stepper, done, log)
    log.advance(done.step)
    if made == done.step == _PACED < done.total_steps:
        hooks.on_pace(done, pace)
    first_checkpoint = min(save_every(settings, done), done.total_steps)
    if made == done.step == 2 < first_checkpoint:
        log.say_first_checkpoint(done.step, first_checkpoint)


def _look(
    stepper: Stepper, done: Progress, made: int, stop: StopSignals, keeper: Keeper, hooks: Hooks
) -> int:
    """What is due between two steps: a picture, scores, a checkpoint.  Gives the signal to stop."""
    settings, engine = stepper.settings, stepper.engine
    if engine.is_main:
        keeper.notice()
    with stepper.watch.paused():
        scores = _look_at_task(stepper, done, hooks)
        stepper.task.train()
        alone = engine.world_size == 1
        asked = stop.received if alone else stop.shared(made, engine.largest)
        best = keeper.is_best(scores, done)
        last = asked or best or keeper.is_exhausted(done)
        if last or _due(done, save_every(settings, done)):
            keeper.save(stepper, done, hooks.before_save)
    return asked


def _look_at_task(stepper: Stepper, done: Progress, hooks: Hooks) -> Mapping[str, float] | None:
    """A picture and an evaluation, where they are due; gives the scores."""
    pictured = is_pictured(stepper.settings, done)
    evaluated = _due(done, done.steps_per_epoch)
    if not (pictured or evaluated):
        return None
    with stepper.whole():
        if stepper.engine.is_main and pictured:
            hooks.on_sample(done)
        return hooks.on_epoch(done) if evaluated else None


def is_pictured(settings: LoggingSettings, done: Progress) -> bool:
    """Whether a picture is made after so many steps; 0 is before the first."""
    if settings.sample_every is None:
        return done.step in (0, done.total_steps) or _is_spaced(done.step, _PICTURED)
    return done.step > 0 and _due(done, settings.sample_every)


def num_pictures(settings: LoggingSettings, length: Progress) -> int:
    """How many pictures a run of this length makes."""
    every, total = settings.sample_every, length.total_steps
    if every is not None:
        return -(-total // every)
    powers = range(len(str(total)))
    spaced = (int(digit) * 10**power for digit in _PICTURED for power in powers)
    return len({0, total, *(step for step in spaced if step < total)})


def save_every(settings: SavingSettings, length: Progress) -> int:
    """Steps from checkpoint to checkpoint."""
    # Once an epoch, but epochs of a few steps do not deserve a file each.
    fewest = min(100, length.total_steps)
    return settings.checkpoint_every or max(length.steps_per_epoch, fewest)


def num_kept(settings: SavingSettings, length: Progress) -> int:
    """How many checkpoints a run of this length leaves."""
    return min(settings.keep_checkpoints, -(-length.total_steps // save_every(settings, length)))


def _due(done: Progress, every: int) -> bool:
    return done.step == done.total_steps or done.step % every == 0


def _is_spaced(step: int, digits: str) -> bool:
    """Whether a step lies evenly on a logarithmic axis: with "13" 1, 3, 10, 30, 100, ..."""
    written = str(step)
    return written[0] in digits and not written[1:].strip("0")


def _uncompiled(settings: TrainSettings) -> AbstractContextManager[None]:
    """Around what looks at a task before its first step, whose batches are of other sizes: blocks
    are to be compiled for those of training.
    """
    return torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()


def _say_skipped(skipped: int, stepper: Stepper, total: int, log: Log) -> None:
    if skipped:
        log.say(
            f"{skipped} of {total} steps were skipped because loss or gradient was not finite; if "
            f"these are more than a few, make the run again with {calmer(stepper)}"
        )


def _glance(stepper: Stepper, done: Progress, log: Log) -> float:
    """Show the numbers within an interval, which goes on; gives the seconds of a step."""
    means = stepper.meter.glance(stepper.engine.mean)
    spent = stepper.watch.glance()
    log.show(_line(stepper, done, means, spent))
    return spent.seconds / spent.steps


def _report(stepper: Stepper, done: Progress, log: Log, keeper: Keeper) -> float:
    """Read the interval's numbers, write them, and stop a run that has gone astray; gives the
    seconds of a step.
    """
    means = stepper.meter.read(stepper.engine.mean)
    skipped, in_a_row = stepper.read_skips()
    means |= {"skipped": skipped}
    spent = stepper.watch.read()
    log.write(
        _line(stepper, done, means, spent) | stepper.slowest.of(spent, stepper.engine, log.say)
    )
    if in_a_row >= min(MAX_SKIPPED, done.total_steps):
        keeper.wait()
        good = newest_finite(keeper.folder)
        kept = f"; the last good state is {good}" if good else ""
        raise UserError(
            f"loss or gradient was not finite in {in_a_row} steps in a row (to step {done.step} of "
            f"{done.total_steps}), so training stopped{kept}; start a new run with "
            f"{calmer(stepper)}"
        )
    return spent.seconds / spent.steps


def _line(
    stepper: Stepper, done: Progress, found: Mapping[str, float], spent: Interval
) -> dict[str, Any]:
    """A line of metrics.jsonl on what was ``found`` in an interval."""
    batch_size = stepper.settings.batch_size
    return {
        "step": done.step,
        "epoch": done.step / done.steps_per_epoch,
        "samples": done.step * batch_size,
        **found,
        **stepper.rates,
        "images_per_second": round(spent.steps * batch_size / spent.seconds, 2),
        "data_wait": round(spent.waited / spent.seconds, 4),
    }
