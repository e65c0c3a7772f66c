"""From a source of images or videos to batches, the same for any number of workers and processes.

What goes to a worker is an epoch and the numbers of the items of one micro-batch; what comes back
is that batch and which items were broken.  The order of items is a function of (seed, epoch), the
randomness of a sample one of (seed, epoch, index): nothing is saved to resume a run exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

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
from patchmine.data.settings import READ_TIMEOUT, InputSettings
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import View
from patchmine.data.views.normalise import as_float
from patchmine.data.workers import Desk, Workers, num_workers, quiet_decoding
from patchmine.errors import UserError, reason_of, shown_name
from patchmine.train.settings import MachineSettings, ScheduleSettings
from patchmine.types import Batch, Objects, Sample

# Items tried in place of a broken one before a worker gives up.
_REPLACEMENTS = 100
# First words of the seeds, so that no stream of one kind is one of the other: zeros at the end of a
# seed do not count.
_ORDER, _SAMPLE = 1, 2
_Key = tuple[int, NDArray[np.int64]]
"""An epoch and the items of one micro-batch."""


class Place(Protocol):
    """Which process of a run this is, and what it computes on; `train.engine.Engine` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Process:
    """A `Place` by its numbers; by default the only process there is, on the CPU."""

    rank: int = 0
    world_size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class _Loaded:
    """What a worker sends back: a batch, unless nothing could be read, and the items that failed.

    ``error``: why the run must end, in a sentence (a UserError would arrive wrapped in a worker's
    traceback).
    """

    batch: Batch | None
    tried: int
    failures: list[Failure]
    error: str | None = None

    def pin_memory(self) -> _Loaded:
        """The same in page-locked memory; torch's loader calls this."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


def sample_generator(seed: int, epoch: int, index: int, attempt: int = 0) -> np.random.Generator:
    """The randomness of one sample; costs about 8 microseconds."""
    words = (_SAMPLE, seed, epoch, index, attempt)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """(length,) the order in which an epoch visits the items."""
    seeds = np.random.SeedSequence((_ORDER, seed, epoch))
    return np.random.Generator(np.random.PCG64(seeds)).permutation(length)


def train_batches(
    source: Source,
    view: View,
    schedule: ScheduleSettings,
    machine: MachineSettings,
    place: Place | None = None,
    *,
    seed: int,
    steps: range,
    steps_per_epoch: int,
    bad: BadFiles,
    targets: bool = False,
) -> Iterator[Batch]:
    """``accumulate`` micro-batches for each of ``steps``; workers start at once.

    ``batch_size`` is global.  A step's rows are cut into ``accumulate * world_size`` equal parts;
    micro-batch m of process ``rank`` is part ``m * world_size + rank``.  A broken item is replaced
    by another, chosen by (seed, epoch, index).  An epoch takes every item ``view.repeats`` times in
    a row, differently each time; a part holds all of these, and the item is opened once.
    ``targets``: whether ``batch.target`` is filled.  UserError when sizes do not fit, or (while
    iterating) when too many items are broken or a worker is lost.
    """
    place = place or Process()
    _check_sizes(source, view.repeats, schedule, steps_per_epoch, place.world_size)
    order = _TrainOrder(len(source), view.repeats, schedule, seed, steps, steps_per_epoch, place)
    desk = Desk(num_workers(machine.workers, place.device, place.local_size))
    samples = _Samples(source, view, desk, seed, targets)
    workers = Workers(samples, order, desk, source, pin=place.device.type == "cuda")
    return _drain(workers, bad, machine.read_timeout)


def plain_batches(
    source: Source,
    view: View,
    *,
    batch_size: int,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    workers: int = 0,
    read_timeout: float = READ_TIMEOUT,
    bad: BadFiles | None = None,
    targets: bool = False,
) -> Iterator[Batch]:
    """The items in order (or those of ``indices``), each once; the last batch may be partial.

    Broken items are left out, as ``batch.index`` tells, and noted in ``bad``; without it the first
    one is a UserError that names it.  ``targets`` as in `train_batches`.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    desk = Desk(workers)
    samples = _Samples(source, view, desk, None, targets)
    running = Workers(samples, _PlainOrder(chosen, batch_size), desk, source)
    return _drain(running, bad, read_timeout)


def data_statistics(
    source: Source,
    settings: InputSettings,
    pixels_of: Callable[[Any, int, int], Tensor] = decode,
    *,
    sample: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel, each (C,) float32, where bytes span [0, 1].

    From a seeded choice of ``sample`` items, each weighing the same; broken ones are left out.  A
    constant channel gets a deviation of 1.  ``pixels_of(raw, channels, max_pixels)`` gives
    (C, H, W) of an item.  UserError when no item can be read.
    """
    first, second = torch.zeros(2, settings.channels, dtype=torch.float64)
    count, failures = 0, list[Failure]()
    for index in spread_indices(len(source), sample).tolist():
        try:
            with reading_item():
                image = pixels_of(source.read(index), settings.channels, settings.max_pixels)
                # Every k-th pixel of a large image is enough.
                step = max(1, min(image.shape[-2:]) // 256)
                pixels = as_float(image[:, ::step, ::step]).double().flatten(1)
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


class _Samples(Dataset[_Loaded]):
    """Reads micro-batches.  ``seed``: of training, where others stand in for broken items."""

    def __init__(
        self, source: Source, view: View, desk: Desk, seed: int | None, targets: bool
    ) -> None:
        self.source, self.view, self.desk = source, view, desk
        self.seed, self.targets = seed, targets

    def __getitem__(self, key: _Key) -> _Loaded:
        epoch, indices = key
        samples, failures = list[Sample](), list[Failure]()
        for index in indices[:: self.view.repeats].tolist():
            try:
                self._add(samples, epoch, index, failures)
            except UserError as error:
                return _Loaded(None, len(samples) + len(failures), failures, str(error))
        batch = collate(samples) if samples else None
        return _Loaded(batch, len(samples) + len(failures), failures)

    def _add(self, samples: list[Sample], epoch: int, index: int, failures: list[Failure]) -> None:
        """As many samples of an item, or of what stands in for it, as the view repeats it."""
        attempts = 1 if self.seed is None else 1 + _REPLACEMENTS
        for attempt in range(attempts):
            generator = sample_generator(self.seed or 0, epoch, index, attempt)
            chosen = index if attempt == 0 else int(generator.integers(len(self.source)))
            try:
                with self.desk.reading(chosen), reading_item():
                    samples += self._samples(chosen, generator)
            except (OSError, DecodeError) as error:
                failures.append((chosen, _reason(error)))
            else:
                return
        if self.seed is not None:
            raise UserError(_nothing_readable(self.source, failures[-attempts:]))

    def _samples(self, index: int, generator: np.random.Generator) -> list[Sample]:
        raw = self.source.read(index)
        target = self.source.target(index) if self.targets else None
        with quiet_decoding():
            if self.view.repeats > 1:  # which is for videos only
                raw = open_video(raw, self.view.settings.max_pixels)
            repeats = range(self.view.repeats)
            return [replace(self.view(raw, generator, target), index=index) for _ in repeats]


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch; in a worker default_collate stacks straight into shared memory."""
    views = []
    for crops in zip(*(sample.views for sample in samples), strict=True):
        mixed = len({crop.dtype for crop in crops}) > 1  # 8-bit and deeper images side by side
        views.append(default_collate([as_float(crop) for crop in crops] if mixed else [*crops]))

    def column(name: str) -> Any:
        values = [getattr(sample, name) for sample in samples]
        if isinstance(values[0], Objects):  # of which every image has another number
            return values
        return None if values[0] is None else default_collate(values)

    rest = (column(name) for name in ("index", "box", "flip", "photometric", "target", "erase"))
    return Batch(views, *rest)


def _reason(error: Exception) -> str:
    """What is wrong, as the end of a sentence that begins with the file's name."""
    if isinstance(error, DecodeError):
        return str(error)
    return f"cannot be read ({reason_of(error)})"


# Inside the main process


@dataclass(frozen=True)
class _TrainOrder(Sampler[_Key]):
    length: int
    repeats: int
    schedule: ScheduleSettings
    seed: int
    steps: range
    steps_per_epoch: int
    place: Place

    def __iter__(self) -> Iterator[_Key]:
        batch_size, accumulate = self.schedule.batch_size, self.schedule.accumulate
        rows = batch_size // (self.place.world_size * accumulate)
        epoch, order = -1, np.empty(0, np.int64)
        for step in self.steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.seed, epoch, self.length).repeat(self.repeats)
            step_start = step % self.steps_per_epoch * batch_size
            for micro in range(accumulate):
                start = step_start + (micro * self.place.world_size + self.place.rank) * rows
                yield epoch, order[start : start + rows]


@dataclass(frozen=True)
class _PlainOrder(Sampler[_Key]):
    indices: NDArray[np.int64]
    batch_size: int

    def __iter__(self) -> Iterator[_Key]:
        for start in range(0, len(self.indices), self.batch_size):
            yield 0, self.indices[start : start + self.batch_size]


def _drain(workers: Workers, bad: BadFiles | None, read_timeout: float) -> Iterator[Batch]:
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
                yield from _checked(part, workers.source, bad)
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
    if part.error is not None:
        raise UserError(part.error)
    if part.batch is not None:
        yield part.batch


def _nothing_readable(source: Source, failures: Sequence[Failure]) -> str:
    index, reason = failures[0]
    return (
        f"none of the {len(dict(failures))} items of {shown_name(source.name)} that were tried can "
        f"be used; the first is {shown_name(source.path(index))}, which {reason}"
    )


def _check_sizes(
    source: Source, repeats: int, schedule: ScheduleSettings, steps_per_epoch: int, world_size: int
) -> None:
    length, batch_size = len(source) * repeats, schedule.batch_size
    parts = world_size * schedule.accumulate * repeats
    if batch_size % parts:
        nearest = max(parts, batch_size // parts * parts)
        raise UserError(
            f"batch_size={batch_size} does not divide into {world_size} processes times "
            f"accumulate={schedule.accumulate * repeats}; set batch_size={nearest}"
        )
    if batch_size > length:
        fitting = max(parts, length // parts * parts)
        raise UserError(
            f"batch_size={batch_size} is more than the {length} images of {source.name}; set "
            f"batch_size={fitting} or lower"
        )
    if steps_per_epoch * batch_size > length:
        raise ValueError(
            f"{steps_per_epoch} steps of {batch_size} images need more than the {length} there are"
        )
