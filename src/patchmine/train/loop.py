"""The training loop.

One step: rates -> losses of each micro-batch -> backward -> clip -> update ->
``method.after_step``; then log, look, save. Everything that moves with time is a function of
``Progress``, so a run that was stopped goes on as if nothing had happened.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from patchmine.errors import UserError
from patchmine.task import Task
from patchmine.train.checkpoint import Checkpoint, NotFiniteError, newest_finite, save
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.optim import Optimizers, load_optimizer_tensors, optimizer_tensors
from patchmine.train.signals import Interrupted, StopSignals
from patchmine.train.step import Stepper, TrainSettings
from patchmine.types import Batch, Progress

MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which training stops


def train(
    method: Task,
    batches: Iterator[Batch],
    engine: Engine,
    settings: TrainSettings,
    *,
    folder: Path,
    log: Log,
    start: Checkpoint | None = None,
    identity: Mapping[str, str] | None = None,
    remembered: Mapping[str, Any] | None = None,
    before_epoch: Callable[[Progress], None] = lambda now: None,
    on_epoch: Callable[[Progress], None] | None = None,
    on_sample: Callable[[Progress, Batch], None] | None = None,
    before_save: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> Progress:
    """Train ``method`` to the end of the run, from ``start`` if given; returns the progress that
    was reached.

    ``batches`` yields this process's micro-batches from the first step to be made, normalised and
    on the device. ``folder`` is the run's checkpoint folder.  ``identity``: fingerprints that are
    stored and must be equal on resume, by the name of what they stand for ("settings", "data");
    ``remembered``: other JSON that is stored with them. ``on_epoch`` is called after each epoch and
    after the last step, before the checkpoint; ``on_sample`` every ``sample_every`` steps and after
    the last, with the batch just used; both in the first process only, with the count of finished
    steps.  ``before_save`` is called there before each checkpoint, ``on_stop`` as soon as a signal
    asks to stop.

    Raises:
        UserError: a full disk, no finite loss, a state that is not finite, another identity.
        Interrupted: after SIGINT, SIGTERM, SIGHUP or SIGUSR1.
    """
    stepper = Stepper(method, engine, settings)
    if start is not None:
        restore(method, stepper.optimizers, start, identity or {})
    skipped_before = 0 if start is None else _count(start.facts.get("skipped"))
    method.train()
    with StopSignals(on_stop) as stop:
        for step in range(0 if start is None else start.step, settings.total_steps):
            now, done = settings.progress(step), settings.progress(step + 1)
            if step % settings.steps_per_epoch == 0:
                before_epoch(now)
            batch = stepper.make(now, batches)
            if _due(done, settings.log_every):
                _report(stepper, done, log, folder)
            log.advance(done.step)
            with stepper.watch.paused():
                if engine.is_main:
                    _look(done, batch, settings, on_epoch, on_sample)
                    method.train()
                asked = engine.largest(stop.received)
                if engine.is_main and (asked or _due(done, settings.checkpoint_every)):
                    facts = {
                        "identity": dict(identity or {}),
                        "skipped": skipped_before + stepper.total_skipped(),
                    }
                    with engine.undisturbed():
                        before_save()
                        _save(stepper, done, folder, {**(remembered or {}), **facts})
            if asked and done.step < settings.total_steps:
                raise _stopped(asked, done, folder, log, engine)
    _say_skipped(skipped_before + stepper.total_skipped(), stepper, log)
    return settings.progress(settings.total_steps)


def restore(
    method: Task, optimizers: Optimizers, start: Checkpoint, identity: Mapping[str, str]
) -> None:
    """Put a checkpoint's state into a method and its optimizers; raises UserError when they do not
    belong together.
    """
    refuse_stranger(start, identity)
    try:
        method.load_state_dict(start.model)
        load_optimizer_tensors(optimizers, start.optimizer)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{start.path} does not fit this model and method: {reason[:400]}"
        ) from error


def refuse_stranger(start: Checkpoint, identity: Mapping[str, str]) -> None:
    """Raise UserError when a checkpoint was written with another ``identity`` than it is to go on
    with.
    """
    stored = start.facts.get("identity", {})
    for what, value in identity.items():
        if stored.get(what, value) != value:
            raise UserError(
                f"{start.path} was written with other {what} (fingerprint {stored[what]}, now {value});"
                f" go on with the run's own {what}, or start a new run in another folder"
            )


def _count(number: object) -> int:
    """A count from a file; earlier versions kept none."""
    return number if type(number) is int else 0


def _save(stepper: Stepper, done: Progress, folder: Path, facts: Mapping[str, Any]) -> None:
    model, state = stepper.method.state_dict(), optimizer_tensors(stepper.optimizers)
    try:
        save(folder, done.step, model, state, facts, keep=stepper.settings.keep_checkpoints)
    except NotFiniteError as error:
        raise UserError(
            f"{error}; training stopped: start a new run with {_calmer(stepper)}"
        ) from error


def _calmer(stepper: Stepper) -> str:
    """Settings with which a run is less likely to diverge."""
    settings = stepper.settings
    rate, warmup = (
        f"a smaller blr (now {settings.blr:g})",
        f"longer warmup_epochs (now {settings.schedule.warmup_epochs:g})",
    )
    return (
        f"{rate} or {warmup}"
        if stepper.engine.precision == "fp32"
        else f"{rate}, {warmup} or precision=fp32"
    )


def _say_skipped(skipped: int, stepper: Stepper, log: Log) -> None:
    if skipped:
        log.say(
            f"{skipped} of {stepper.settings.total_steps} steps were skipped because loss or gradient was not finite;"
            f" if these are more than a few, make the run again with {_calmer(stepper)}"
        )


def _due(done: Progress, every: int) -> bool:
    return done.step == done.total_steps or done.step % every == 0


def _look(
    done: Progress,
    batch: Batch,
    settings: TrainSettings,
    on_epoch: Callable[[Progress], None] | None,
    on_sample: Callable[[Progress, Batch], None] | None,
) -> None:
    if (
        on_sample is not None
        and settings.sample_every is not None
        and _due(done, settings.sample_every)
    ):
        on_sample(done, batch)
    if on_epoch is not None and _due(done, settings.steps_per_epoch):
        on_epoch(done)


def _report(stepper: Stepper, done: Progress, log: Log, folder: Path) -> None:
    """Read the interval's numbers, write them, and stop a run that has gone astray."""
    means = stepper.meter.read(stepper.engine.mean)
    skipped, in_a_row = stepper.read_skips()
    batch_size = stepper.settings.batch_size
    steps, seconds, waited = stepper.watch.read()
    log.write(
        {
            "step": done.step,
            "epoch": done.step / done.steps_per_epoch,
            "samples": done.step * batch_size,
            **means,
            **stepper.rates,
            "skipped": skipped,
            "images_per_second": round(steps * batch_size / seconds, 2),
            "data_wait": round(waited / seconds, 4),
        }
    )
    if in_a_row >= min(MAX_SKIPPED, done.total_steps):
        raise UserError(_divergence(in_a_row, done, stepper, folder))


def _divergence(in_a_row: int, done: Progress, stepper: Stepper, folder: Path) -> str:
    good = newest_finite(folder)
    kept = f"; the last good state is {good}" if good else ""
    return (
        f"loss or gradient was not finite in {in_a_row} steps in a row (to step {done.step} of {done.total_steps})"
        f", so training stopped{kept}; start a new run with {_calmer(stepper)}"
    )


def _stopped(number: int, done: Progress, folder: Path, log: Log, engine: Engine) -> Interrupted:
    engine.barrier()  # the checkpoint is written before any process ends
    log.say(
        f"{signal.Signals(number).name}: stopped after step {done.step} of {done.total_steps}, checkpoint written;"
        f" go on with `patchmine resume {folder.parent}`"
    )
    return Interrupted(number, done.step, is_main=engine.is_main)
