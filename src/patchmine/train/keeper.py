"""The checkpoints of a run: what is kept with them, how they are written, and going on from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchmine.errors import UserError
from patchmine.ops.shards import like
from patchmine.task import Task
from patchmine.train.background import Beside, Snapshot
from patchmine.train.checkpoint import Checkpoint, NotFiniteError, save
from patchmine.train.optim import Optimizers, load_optimizer_tensors, optimizer_tensors
from patchmine.train.pieces import Host, on_host
from patchmine.train.saving import Gather, PartsSaver
from patchmine.train.step import Stepper
from patchmine.types import Progress


@dataclass
class Keeper:
    """The checkpoints of a run: what is kept with them, and which is the best one.

    Args:
        folder: of the checkpoints.
        start: where the run goes on from; its counts go on too.
        identity: fingerprints that must be equal on resume, by what they stand for.
        remembered: other JSON to be kept.
        best_by: the score, the higher the better, by which ``checkpoints/best`` is chosen.
        patience: epochs without a better score after which training ends; None: never early.
    """

    folder: Path
    start: Checkpoint | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    remembered: Mapping[str, Any] = field(default_factory=dict)
    best_by: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        facts = {} if self.start is None else self.start.facts
        skipped, best = facts.get("skipped"), facts.get("best")
        self.skipped = skipped if type(skipped) is int else 0  # earlier versions kept none
        known = isinstance(best, dict) and best.get("metric") == self.best_by
        self.best: dict[str, Any] | None = best if known else None
        self._beside, self._snapshot = Beside(), Snapshot()
        self._gather: Gather | None = None

    def is_best(self, scores: Mapping[str, float] | None, done: Progress) -> bool:
        """Whether these scores are better than all before, which are then forgotten."""
        score = (scores or {}).get(self.best_by or "", math.nan)
        if not math.isfinite(score) or (self.best is not None and score <= self.best["score"]):
            return False
        self.best = {"step": done.step, "metric": self.best_by, "score": score}
        return True

    def is_exhausted(self, done: Progress) -> bool:
        """Whether the best score is as old as ``patience`` epochs; the same on every resume."""
        if self.patience is None or self.best is None or done.step % done.steps_per_epoch:
            return False
        return done.step - int(self.best["step"]) >= self.patience * done.steps_per_epoch

    def save(
        self, stepper: Stepper, done: Progress, before: Callable[[], None] = lambda: None
    ) -> None:
        """Write a checkpoint, in all processes together; with ``saving=background`` it may be
        written when this has returned long since.

        ``before`` is called in the first one.  Raises UserError for a state that is not finite, or
        a full disk: of this checkpoint, or of one that was written in the background.
        """
        if stepper.settings.saving == "blocking":
            self._writer(stepper, done, before, on_host)()
            return
        self.wait()
        if stepper.engine.is_main:
            before()  # not beside the loop, where a signal could come between
        self._beside.begin(self._writer(stepper, done, lambda: None, self._snapshot))

    def wait(self) -> None:
        """Until nothing is written in the background.  Raises what that raised."""
        self._beside.wait()

    def notice(self) -> None:
        """Raise in the first process, as soon as it is known, what writing raised."""
        # The others are ended by that, so that one sentence is said.
        if self._beside.failed:
            self.wait()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Around training: however it ends, what is being written is written to its end."""
        try:
            yield
            self.wait()
        except BaseException:
            with suppress(Exception):  # what ended training is told
                self.wait()
            raise

    def _writer(
        self, stepper: Stepper, done: Progress, before: Callable[[], None], host: Host
    ) -> Callable[[], None]:
        """What writes the state of now, of which ``host`` takes what it needs."""
        facts = {
            **self.remembered,
            "identity": dict(self.identity),
            "skipped": self.skipped + stepper.total_skipped(),
        }
        if self.best is not None:
            facts["best"] = self.best
        engine = stepper.engine
        state = {"model": stepper.task.state_dict()}
        state["optimizer"] = optimizer_tensors(stepper.optimizers)
        how: dict[str, Any] = {"keep": stepper.settings.keep_checkpoints}
        how["best"] = None if self.best is None else self.best["step"]
        if stepper.is_sharded:
            if host is not on_host and self._gather is None:
                self._gather = engine.another_gather()
            saver = PartsSaver(
                engine, self.folder, done.step, facts, before=before, gather=self._gather, **how
            )
            write = saver.taken(state, host)
        elif engine.is_main:
            held = {
                part: {name: host(f"{part}.{name}", tensor) for name, tensor in tensors.items()}
                for part, tensors in state.items()
            }

            def write() -> None:
                with engine.undisturbed():
                    before()
                    save(self.folder, done.step, held["model"], held["optimizer"], facts, **how)
        else:
            return lambda: None

        def told() -> None:
            try:
                write()
            except NotFiniteError as error:
                raise UserError(
                    f"{error}; training stopped: start a new run with {calmer(stepper)}"
                ) from error

        return told


def restore(
    task: Task, optimizers: Optimizers, start: Checkpoint, identity: Mapping[str, str]
) -> None:
    """Put a checkpoint's state into a task.  Raises UserError when they do not belong together."""
    refuse_stranger(start, identity)
    try:
        own = task.state_dict()
        task.load_state_dict(
            {
                name: like(own[name], value) if name in own else value
                for name, value in start.model.items()
            }
        )
        load_optimizer_tensors(optimizers, start.optimizer)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{start.path} does not fit this model and method: {reason[:400]}"
        ) from error


def refuse_stranger(start: Checkpoint, identity: Mapping[str, str]) -> None:
    """Raise UserError when a checkpoint was written with another ``identity``."""
    stored = start.facts.get("identity", {})
    for what, value in identity.items():
        if stored.get(what, value) != value:
            raise UserError(
                f"{start.path} was written with other {what} (fingerprint {stored[what]}, now "
                f"{value}); go on with the run's own {what}, or start a new run in another folder"
            )


def calmer(stepper: Stepper) -> str:
    """Settings with which a run is less likely to diverge."""
    settings = stepper.settings
    rate = f"a smaller blr (now {settings.blr:g})"
    warmup = f"longer warmup_epochs (now {settings.warmup_epochs:g})"
    exact = stepper.engine.precision == "fp32"
    return f"{rate} or {warmup}" if exact else f"{rate}, {warmup} or precision=fp32"
