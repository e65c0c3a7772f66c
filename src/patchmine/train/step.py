"""One optimizer step, and what is counted on the way.  Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from patchmine.task import Task
from patchmine.train import optim
from patchmine.train.checkpoint import refuse_shared
from patchmine.train.engine import Engine
from patchmine.train.log import Meter, Stopwatch
from patchmine.train.settings import TrainSettings, rows_of_part
from patchmine.train.slowest import Slowest
from patchmine.types import Batch, Progress


class Stepper:
    """A task on its device with its optimizers; UserError where a batch cannot be shared."""

    def __init__(self, task: Task, engine: Engine, settings: TrainSettings) -> None:
        self.rows = rows_of_part(settings, engine.world_size)  # of a micro-batch
        self.engine, self.settings = engine, settings
        refuse_shared(task.state_dict())
        self._sharded = engine.divided(task)
        self.task = task = task if self._sharded is None else self._sharded.copy
        self.forward = engine.wrap(
            task, compile_blocks=settings.compile, remat=settings.remat, offload=settings.offload
        )
        self.optimizers = optim.build_optimizers(
            task.scaled_groups(),
            weight_decay=settings.weight_decay,
            blr=settings.blr,
            betas=settings.betas,
            optimizer=settings.optimizer,
        )
        self.schedule = optim.schedule_of(settings)
        self.rates: dict[str, float] = {}
        self.meter = Meter()
        self.watch = Stopwatch()
        self.slowest = Slowest()
        # Of skipped steps: in this interval, in a row until now, longest row, in all.
        self._skips = torch.zeros(4, device=engine.device)

    def whole(self) -> AbstractContextManager[None]:
        """Around a look at the task that was given: all processes enter it, where it is sharded."""
        return nullcontext() if self._sharded is None else self._sharded.whole()

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part of weights and optimizer state only."""
        return self._sharded is not None

    def give_back(self) -> None:
        """Leave the task that was given with the weights that were reached."""
        if self._sharded is not None:
            self._sharded.fill()

    def make(self, progress: Progress, batches: Iterator[Batch]) -> Batch:
        """Rates, losses, gradients, update; returns the last micro-batch."""
        size, parts = self.settings.batch_size, self.settings.accumulate
        self.rates = optim.set_rates(
            self.optimizers, progress, batch_size=size, schedule=self.schedule
        )
        self.optimizers.zero_grad()
        for micro in range(parts):
            batch = self._next(batches, progress)
            with self.engine.no_sync(self.forward, skip=micro + 1 < parts):
                self._add_gradient(batch, progress, micro)
        norm = optim.clip_gradients(self.optimizers, progress)
        bad = norm.isfinite().logical_not().float()
        optim.update(self.optimizers, bad)
        self.task.after_step(progress)
        self.task.follow(progress)
        norm, bad = norm.to(self.engine.device), bad.to(self.engine.device)  # offloaded: elsewhere
        self.meter.add({"grad_norm": norm})
        skipped, row, longest, total = self._skips.unbind()
        row = (row + bad) * bad
        self._skips = torch.stack([skipped + bad, row, torch.maximum(longest, row), total + bad])
        self.watch.steps += 1
        return batch

    def _next(self, batches: Iterator[Batch], progress: Progress) -> Batch:
        with self.watch.waiting():
            batch = next(batches, None)
        if batch is None or len(batch) != self.rows:
            got = "none" if batch is None else f"{len(batch)}"
            raise ValueError(
                f"step {progress.step} needs a batch of {self.rows} images and got {got}"
            )
        return batch

    def read_skips(self) -> tuple[int, int]:
        """(skipped since the last reading, most of them in a row).  This waits for the device."""
        skipped, row, longest, total = (int(number) for number in self._skips.tolist())
        self._skips = self._skips.new_tensor([0, row, row, total])
        return skipped, longest

    def total_skipped(self) -> int:
        """Steps of this process's part of the run that were skipped.  This waits for the device."""
        return int(self._skips[3])

    def _add_gradient(self, batch: Batch, progress: Progress, micro: int) -> None:
        first_row = (micro * self.engine.world_size + self.engine.rank) * self.rows
        self.task.noise.begin(progress.step, first_row, self.settings.batch_size)
        with self.watch.computing():
            losses = self.forward(batch, progress)
        loss: Tensor = losses["loss"]
        # A loss that is not finite turns the gradient into NaN, which reaches every process
        # together with the gradients, so that all skip the step without asking each other.
        share = torch.full_like(loss, 1.0 / self.settings.accumulate)
        loss.backward(  # type: ignore[no-untyped-call]
            share.where(loss.detach().isfinite(), torch.nan)
        )
        self.meter.add(losses)
