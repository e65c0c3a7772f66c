"""From a source of images or videos to batches.

One torch DataLoader serves the whole rest of a run.  What goes to a worker is an epoch and the
numbers of the items of one micro-batch; what comes back is that batch and which items were broken.
The order of items is a function of (seed, epoch), the randomness of a sample one of (seed, epoch,
index), so nothing has to be saved to resume a run exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from patchmine.data.badfiles import BadFiles, Failure
from patchmine.data.decoding.bounds import reading_item
from patchmine.data.decoding.decode import DecodeError, decode
from patchmine.data.decoding.video import open_video
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import READ_TIMEOUT
from patchmine.data.sources.contract import Source
from patchmine.data.views.crops import MultiCropView
from patchmine.data.views.images import View
from patchmine.data.views.normalise import as_float
from patchmine.data.workers import Desk, Workers
from patchmine.errors import UserError, reason_of, shown_name
from patchmine.types import Batch

__all__ = ["BadFiles", "data_statistics", "plain_batches", "train_batches"]

# Items tried in place of a broken one before a worker gives up.
_REPLACEMENTS = 100
# First words of the seeds, so that no stream of one kind is one of the other: zeros at the end of a
# seed do not count.
_ORDER, _SAMPLE = 1, 2
_Key = tuple[int, NDArray[np.int64]]
"""An epoch and the items of one micro-batch."""


@dataclass(frozen=True)
class _Loaded:
    """What a worker sends back: a batch unless nothing could be read, and the items that failed of
    those ``tried``.

    ``mistake``: why the run must end, in a sentence (a UserError would arrive wrapped in a worker's
    traceback).
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
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence((_SAMPLE, seed, epoch, index, attempt)))
    )


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """(length,) the order in which an epoch visits the items."""
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence((_ORDER, seed, epoch)))
    ).permutation(length)


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
    read_timeout: float = READ_TIMEOUT,
    pin: bool = False,
    bad: BadFiles,
) -> Iterator[Batch]:
    """``accumulate`` micro-batches per step, from ``start_step`` up to ``total_steps``; workers
    start at once.

    ``batch_size`` is global.  A step's rows are cut into ``accumulate * world_size`` equal parts;
    micro-batch m of process ``rank`` is part ``m * world_size + rank``.  A broken item is replaced
    by another, chosen by (seed, epoch, index).  An epoch takes every item ``repeats`` times in a
    row, differently each time; a part holds all of these, and the item is read and opened once.
    ``read_timeout``: seconds that a worker may spend on one item; 0 is for ever. UserError when
    sizes do not fit, or (while iterating) when too many items are broken or a worker is lost.
    """
    _check_sizes(
        len(source) * repeats,
        source.name,
        batch_size,
        steps_per_epoch,
        world_size,
        accumulate * repeats,
    )
    steps = range(start_step, total_steps)
    order = _TrainOrder(
        seed, len(source), batch_size, steps_per_epoch, steps, rank, world_size, accumulate, repeats
    )
    desk = Desk(workers)
    samples = _TrainSamples(source, view, channels, seed, desk, repeats)
    return _drain(
        Workers(samples, order, desk, workers, pin, _names(source)), source, bad, read_timeout
    )


def plain_batches(
    source: Source,
    view: View,
    *,
    channels: int,
    batch_size: int,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    workers: int = 0,
    read_timeout: float = READ_TIMEOUT,
    bad: BadFiles | None = None,
) -> Iterator[Batch]:
    """The items in order (or those of ``indices``), the last batch may be partial; ``batch.index``
    says which they are.

    Broken items are left out and noted in ``bad``; without it the first one is a UserError that
    names it.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    desk, order = Desk(workers), _PlainOrder(chosen, batch_size)
    samples = _PlainSamples(source, view, channels, desk)
    return _drain(
        Workers(samples, order, desk, workers, False, _names(source)), source, bad, read_timeout
    )


def data_statistics(
    source: Source,
    channels: int,
    *,
    sample: int = 1000,
    look: Callable[[Any, int], Tensor] = decode,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, each (C,) float32, in units where bytes span
    [0, 1].

    From a seeded choice of ``sample`` items, each weighing the same; broken ones are left out.  A
    constant channel gets a deviation of 1.  ``look`` gives pixels (C, H, W) of an item.  UserError
    when no item can be read.
    """
    chosen = spread_indices(len(source), sample)
    first, second, count = (
        torch.zeros(channels, dtype=torch.float64),
        torch.zeros(channels, dtype=torch.float64),
        0,
    )
    failures: list[Failure] = []
    for index in chosen.tolist():
        try:
            with reading_item():
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


# Inside a worker
# ------------------------------------------------------------------------------------------------------


class _TrainSamples(Dataset[_Loaded]):
    def __init__(
        self,
        source: Source,
        view: View | MultiCropView,
        channels: int,
        seed: int,
        desk: Desk,
        repeats: int = 1,
    ) -> None:
        self.source, self.view, self.channels, self.seed, self.repeats = (
            source,
            view,
            channels,
            seed,
            repeats,
        )
        self.desk = desk

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
                with self.desk.reading(chosen), reading_item():
                    samples += self._samples(chosen, generator)
            except (OSError, DecodeError) as error:
                failures.append((chosen, _reason(error)))
            else:
                return
        raise UserError(_nothing_readable(self.source, failures[-1 - _REPLACEMENTS :]))

    def _samples(self, index: int, generator: np.random.Generator) -> list[_Sample]:
        raw = self.source.read(index)
        if self.repeats > 1:  # which is for videos only
            raw = open_video(raw, self.view.max_pixels)
        return [(index, *self.view(raw, self.channels, generator)) for _ in range(self.repeats)]


class _PlainSamples(Dataset[_Loaded]):
    def __init__(self, source: Source, view: View, channels: int, desk: Desk) -> None:
        self.source, self.view, self.channels, self.desk = source, view, channels, desk

    def __getitem__(self, key: _Key) -> _Loaded:
        samples: list[_Sample] = []
        failures: list[Failure] = []
        for index in key[1].tolist():
            try:
                with self.desk.reading(index), reading_item():
                    raw, generator = self.source.read(index), sample_generator(0, 0, index)
                    samples.append((index, *self.view(raw, self.channels, generator)))
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
        return Batch(
            [_stack_pixels(pixels)],
            torch.tensor(index),
            default_collate(boxes),
            torch.tensor(flips),
        )
    views = [_stack_pixels([*crops]) for crops in zip(*pixels, strict=True)]
    return Batch(
        views,
        torch.tensor(index),
        *(default_collate(column) for column in (boxes, flips, *changes)),
    )


def _stack_pixels(pixels: list[Tensor]) -> Tensor:
    if len({view.dtype for view in pixels}) > 1:  # 8-bit and deeper images side by side
        pixels = [as_float(view) for view in pixels]
    return default_collate(pixels)


def _reason(error: Exception) -> str:
    """What is wrong, as the end of a sentence that begins with the file's name."""
    if isinstance(error, DecodeError):
        return str(error)
    return f"cannot be read ({reason_of(error)})"


def _names(source: Source) -> Callable[[int], str]:
    return lambda index: shown_name(source.path(index))


# Inside the main process
# ----------------------------------------------------------------------------------------------


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


def _drain(
    workers: Workers, source: Source, bad: BadFiles | None, read_timeout: float
) -> Iterator[Batch]:
    try:
        while True:
            trouble = None
            try:
                part: _Loaded | None = next(workers.parts)
            except StopIteration:
                return
            except (RuntimeError, OSError) as error:
                part, trouble = None, workers.trouble(error, read_timeout)
            if trouble is not None:  # raised here, since the error above holds on to the loader
                raise UserError(trouble)
            if part is not None:
                yield from _checked(part, source, bad)
    finally:
        # Workers end with the last reference to their loader.  Left to a traceback, and so to the
        # garbage collector, they would miss the message that ends them and be waited for, 5 seconds
        # each.
        del workers


def _checked(part: _Loaded, source: Source, bad: BadFiles | None) -> Iterator[Batch]:
    if bad is not None:
        bad.note(source, part.tried, part.failures)
    elif part.failures:
        index, reason = part.failures[0]
        raise UserError(f"{shown_name(source.path(index))} {reason}")
    if part.mistake is not None:
        raise UserError(part.mistake)
    if part.batch is not None:
        yield part.batch


def _nothing_readable(source: Source, failures: Sequence[Failure]) -> str:
    index, reason = failures[0]
    return (
        f"none of the {len(dict(failures))} items of {shown_name(source.name)} that were tried can be used; "
        f"the first is {shown_name(source.path(index))}, which {reason}"
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
        raise ValueError(
            f"{steps_per_epoch} steps of {batch_size} images need more than the {length} that there are"
        )


def _thin(image: Tensor, side: int = 256) -> Tensor:
    """Every k-th pixel of a large image, as floats: enough for its mean and deviation."""
    step = max(1, min(image.shape[-2:]) // side)
    return as_float(image[:, ::step, ::step])
