"""From a source of images or videos to batches.

One torch DataLoader serves the whole rest of a run.  What goes to a worker is an epoch and the numbers of the items of
one micro-batch; what comes back is that batch and which items were broken.  The order of items is a function of (seed,
epoch), the randomness of a sample one of (seed, epoch, index), so nothing has to be saved to resume a run exactly.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from patchmine.data.badfiles import BadFiles, Failure
from patchmine.data.contract import Source
from patchmine.data.crops import MultiCropView
from patchmine.data.decode import DecodeError, decode
from patchmine.data.normalise import as_float
from patchmine.data.sampling import spread_indices
from patchmine.data.video import open_video
from patchmine.data.views import View
from patchmine.errors import UserError
from patchmine.types import Batch

__all__ = ["BadFiles", "data_statistics", "plain_batches", "train_batches"]

# Items tried in place of a broken one before a worker gives up.
_REPLACEMENTS = 100
# First words of the seeds, so that no stream of one kind is one of the other: zeros at the end of a seed do not count.
_ORDER, _SAMPLE = 1, 2
_Key = tuple[int, NDArray[np.int64]]
"""An epoch and the items of one micro-batch."""


@dataclass(frozen=True)
class _Loaded:
    """What a worker sends back: a batch unless nothing could be read, and the items that failed of those ``tried``.

    ``mistake``: why the run must end, in a sentence (a UserError would arrive wrapped in a worker's traceback).
    """

    batch: Batch | None
    tried: int
    failures: list[Failure]
    mistake: str | None = None

    def pin_memory(self) -> _Loaded:
        """The same in page-locked memory; torch's loader calls this."""
        batch = self.batch.pin_memory() if self.batch is not None else None
        return _Loaded(batch, self.tried, self.failures, self.mistake)


def sample_generator(seed: int, epoch: int, index: int, attempt: int = 0) -> np.random.Generator:
    """The randomness of one sample; costs about 8 microseconds."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((_SAMPLE, seed, epoch, index, attempt))))


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """(length,) the order in which an epoch visits the items."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((_ORDER, seed, epoch)))).permutation(length)


def train_batches(
    source: Source,
    view: View | MultiCropView,
    *,
    channels: int,
    seed: int,
    batch_size: int,
    steps_per_epoch: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    repeats: int = 1,
    workers: int = 0,
    pin: bool = False,
    bad: BadFiles,
) -> Iterator[Batch]:
    """``accumulate`` micro-batches per step, from ``start_step`` up to ``total_steps``; workers start at once.

    ``batch_size`` is global.  A step's rows are cut into ``accumulate * world_size`` equal parts; micro-batch m of
    process ``rank`` is part ``m * world_size + rank``.  A broken item is replaced by another, chosen by (seed, epoch,
    index).  An epoch takes every item ``repeats`` times in a row, differently each time; a part holds all of these, and
    the item is read and opened once.  UserError when sizes do not fit, or (while iterating) when too many items are
    broken.
    """
    _check_sizes(len(source) * repeats, source.name, batch_size, steps_per_epoch, world_size, accumulate * repeats)
    steps = range(start_step, total_steps)
    order = _TrainOrder(seed, len(source), batch_size, steps_per_epoch, steps, rank, world_size, accumulate, repeats)
    samples = _TrainSamples(source, view, channels, seed, repeats)
    return _drain(_start(samples, order, workers, pin), source, bad)


def plain_batches(
    source: Source,
    view: View,
    *,
    channels: int,
    batch_size: int,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    workers: int = 0,
    bad: BadFiles | None = None,
) -> Iterator[Batch]:
    """The items in order (or those of ``indices``), the last batch may be partial; ``batch.index`` says which they are.

    Broken items are left out and noted in ``bad``; without it the first one is a UserError that names it.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    return _drain(_start(_PlainSamples(source, view, channels), _PlainOrder(chosen, batch_size), workers), source, bad)


def data_statistics(
    source: Source, channels: int, *, sample: int = 1000, look: Callable[[Any, int], Tensor] = decode
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, each (C,) float32, in units where bytes span [0, 1].

    From a seeded choice of ``sample`` items, each weighing the same; broken ones are left out.  A constant channel gets
    a deviation of 1.  ``look`` gives pixels (C, H, W) of an item.  UserError when no item can be read.
    """
    chosen = spread_indices(len(source), sample)
    first, second, count = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64), 0
    failures: list[Failure] = []
    for index in chosen.tolist():
        try:
            pixels = _thin(look(source.read(index), channels)).double().flatten(1)
        except (OSError, DecodeError) as error:
            failures.append((index, _reason(error)))
            continue
        first += pixels.mean(1)
        second += pixels.square().mean(1)
        count += 1
    if count == 0:
        raise UserError(_nothing_readable(source, failures))
    mean = first / count
    std = (second / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


# Inside a worker ------------------------------------------------------------------------------------------------------


class _TrainSamples(Dataset[_Loaded]):
    def __init__(self, source: Source, view: View | MultiCropView, channels: int, seed: int, repeats: int = 1) -> None:
        self.source, self.view, self.channels, self.seed, self.repeats = source, view, channels, seed, repeats

    def __getitem__(self, key: _Key) -> _Loaded:
        epoch, indices = key
        samples: list[_Sample] = []
        failures: list[Failure] = []
        for start in range(0, len(indices), self.repeats):
            try:
                self._add(samples, epoch, int(indices[start]), failures)
            except UserError as error:
                return _Loaded(None, len(samples) + len(failures), failures, str(error))
        return _Loaded(_stack(samples), len(samples) + len(failures), failures)

    def _add(self, samples: list[_Sample], epoch: int, index: int, failures: list[Failure]) -> None:
        """``repeats`` samples of one item."""
        for attempt in range(1 + _REPLACEMENTS):
            generator = sample_generator(self.seed, epoch, index, attempt)
            chosen = index if attempt == 0 else int(generator.integers(len(self.source)))
            try:
                raw = self.source.read(chosen)
                if self.repeats > 1:  # which is for videos only
                    raw = open_video(raw)
                samples += [(chosen, *self.view(raw, self.channels, generator)) for _ in range(self.repeats)]
            except (OSError, DecodeError) as error:
                failures.append((chosen, _reason(error)))
            else:
                return
        raise UserError(_nothing_readable(self.source, failures[-1 - _REPLACEMENTS :]))


class _PlainSamples(Dataset[_Loaded]):
    def __init__(self, source: Source, view: View, channels: int) -> None:
        self.source, self.view, self.channels = source, view, channels

    def __getitem__(self, key: _Key) -> _Loaded:
        samples: list[_Sample] = []
        failures: list[Failure] = []
        for index in key[1].tolist():
            try:
                pixels, box, flip = self.view(self.source.read(index), self.channels, sample_generator(0, 0, index))
                samples.append((index, pixels, box, flip))
            except (OSError, DecodeError) as error:
                failures.append((index, _reason(error)))
            except UserError as error:
                return _Loaded(None, len(key[1]), failures, str(error))
        return _Loaded(_stack(samples) if samples else None, len(key[1]), failures)


_Sample = tuple[int, Tensor, Tensor, bool] | tuple[int, list[Tensor], Tensor, Tensor, Tensor]
"""Index, pixels, box, flip; of several crops index, pixels, boxes, flips, changes of colour."""


def _stack(samples: list[_Sample]) -> Batch:
    """One batch; in a worker default_collate stacks straight into shared memory."""
    index, pixels, boxes, flips, *changes = (list(column) for column in zip(*samples, strict=True))
    if not changes:
        return Batch([_stack_pixels(pixels)], torch.tensor(index), default_collate(boxes), torch.tensor(flips))
    views = [_stack_pixels([*crops]) for crops in zip(*pixels, strict=True)]
    return Batch(views, torch.tensor(index), *(default_collate(column) for column in (boxes, flips, *changes)))


def _stack_pixels(pixels: list[Tensor]) -> Tensor:
    if len({view.dtype for view in pixels}) > 1:  # 8-bit and deeper images side by side
        pixels = [as_float(view) for view in pixels]
    return default_collate(pixels)


def _reason(error: Exception) -> str:
    """What is wrong, as the end of a sentence that begins with the file's name."""
    if isinstance(error, DecodeError):
        return str(error)
    return f"cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})"


def _prepare_worker(_: int) -> None:
    """Ctrl-C is for the main process, which then ends its workers; a process group of its own keeps group signals out.

    Torch's loader has already set one thread per worker, and watches for the death of the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        os.setpgrp()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


# Inside the main process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TrainOrder(Sampler[_Key]):
    seed: int
    length: int
    batch_size: int
    steps_per_epoch: int
    steps: range
    rank: int
    world_size: int
    accumulate: int
    repeats: int = 1

    def __iter__(self) -> Iterator[_Key]:
        rows = self.batch_size // (self.world_size * self.accumulate)
        epoch, order = -1, np.empty(0, np.int64)
        for step in self.steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.seed, epoch, self.length).repeat(self.repeats)
            step_start = step % self.steps_per_epoch * self.batch_size
            for micro in range(self.accumulate):
                start = step_start + (micro * self.world_size + self.rank) * rows
                yield epoch, order[start : start + rows]


@dataclass(frozen=True)
class _PlainOrder(Sampler[_Key]):
    indices: NDArray[np.int64]
    batch_size: int

    def __iter__(self) -> Iterator[_Key]:
        for start in range(0, len(self.indices), self.batch_size):
            yield 0, self.indices[start : start + self.batch_size]


def _as_is(loaded: Any) -> Any:
    return loaded


def _start(samples: Dataset[_Loaded], order: Sampler[_Key], workers: int, pin: bool = False) -> Iterator[_Loaded]:
    """A running loader.

    Workers are forked where that is safe (Linux): they start in milliseconds instead of seconds, a data set need not be
    picklable, a script needs no main guard, and they use neither CUDA nor a pool of threads, which a fork breaks.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # how many is the user's choice
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        loader = DataLoader(
            samples,
            sampler=order,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin and torch.cuda.is_available(),
            worker_init_fn=_prepare_worker if workers else None,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # or else starting a loader would draw from the global random state
        )
        with _hold_ctrl_c():
            return cast(Iterator[_Loaded], iter(loader))


@contextmanager
def _hold_ctrl_c() -> Iterator[None]:
    """Blocked here means blocked in workers that are born meanwhile, until they ignore it themselves."""
    if sys.platform == "win32":
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _drain(loaded: Iterator[_Loaded], source: Source, bad: BadFiles | None) -> Iterator[Batch]:
    try:
        for part in loaded:
            if bad is not None:
                bad.note(source, part.tried, part.failures)
            elif part.failures:
                index, reason = part.failures[0]
                raise UserError(f"{source.path(index)} {reason}")
            if part.mistake is not None:
                raise UserError(part.mistake)
            if part.batch is not None:
                yield part.batch
    finally:
        # Workers end with the last reference to their loader.  Left to a traceback, and so to the garbage collector,
        # they would miss the message that ends them and be waited for, 5 seconds each.
        del loaded


def _nothing_readable(source: Source, failures: Sequence[Failure]) -> str:
    index, reason = failures[0]
    return (
        f"none of the {len(dict(failures))} items of {source.name} that were tried can be used; "
        f"the first is {source.path(index)}, which {reason}"
    )


def _check_sizes(
    length: int, name: str, batch_size: int, steps_per_epoch: int, world_size: int, accumulate: int
) -> None:
    parts = world_size * accumulate
    if batch_size % parts:
        nearest = max(parts, batch_size // parts * parts)
        raise UserError(
            f"batch_size={batch_size} does not divide into {world_size} processes times accumulate={accumulate}; "
            f"set batch_size={nearest}"
        )
    fitting = max(parts, length // parts * parts)
    if batch_size > length:
        raise UserError(
            f"batch_size={batch_size} is more than the {length} images of {name}; set batch_size={fitting} or lower"
        )
    if steps_per_epoch * batch_size > length:
        raise ValueError(f"{steps_per_epoch} steps of {batch_size} images need more than the {length} that there are")


def _thin(image: Tensor, side: int = 256) -> Tensor:
    """Every k-th pixel of a large image, as floats: enough for its mean and deviation."""
    step = max(1, min(image.shape[-2:]) // side)
    return as_float(image[:, ::step, ::step])
