"""From a source of images or videos to batches, the same for any number of workers and processes.

What goes to a worker is an epoch and the numbers of the items of one micro-batch; what comes back
is that batch and which items were broken.  The order of items is a function of (seed, epoch), the
randomness of a sample one of (seed, epoch, index): nothing is saved to resume a run exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from patchmine.data.badfiles import BadFiles, Failure
from patchmine.data.decoding.bounds import reading_item
from patchmine.data.decoding.decode import DecodeError, decode, decode_known
from patchmine.data.pixelcache import cache_of
from patchmine.data.randomness import epoch_order
from patchmine.data.samples import Key, Loaded, Samples, nothing_readable, reason_against
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import READ_TIMEOUT, InputSettings
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import View
from patchmine.data.views.normalise import as_float
from patchmine.data.workers import Desk, Workers, num_workers
from patchmine.errors import UserError, shown_name
from patchmine.train.settings import MachineSettings, ScheduleSettings, rows_of_part
from patchmine.types import Batch

_log = logging.getLogger(__name__)


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
    settings = view.settings
    cache = cache_of(source, settings, machine)
    samples = Samples(source, view, desk, seed, targets, cache)
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
    samples = Samples(source, view, desk, None, targets)
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
    (C, H, W) of an item; with ``missing=mask`` pixels with data alone count.  UserError when no
    item can be read.
    """
    sums, failures = torch.zeros(3, settings.channels, dtype=torch.float64), list[Failure]()
    chosen = spread_indices(len(source), sample).tolist()
    for index in chosen:
        try:
            with reading_item():
                raw, size = source.read(index), (settings.channels, settings.max_pixels)
                if settings.wants_known:
                    image, known = decode_known(raw, *size)
                else:
                    image, known = pixels_of(raw, *size), None
                # Every k-th pixel of a large image is enough.
                step = max(1, min(image.shape[-2:]) // 256)
                pixels = as_float(image[:, ::step, ::step]).double().flatten(1)
                weights = None if known is None else known[:, ::step, ::step].double().flatten(1)
        except (OSError, DecodeError) as error:
            failures.append((index, reason_against(error)))
            continue
        sums += _moments(pixels, weights)
    if len(failures) == len(chosen):
        raise UserError(nothing_readable(source, failures))
    first, second, count = sums
    count = count.clamp_min(1)  # of a channel that no item has data of
    mean = first / count
    std = (second / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def _moments(pixels: Tensor, weights: Tensor | None) -> Tensor:
    """(3, C) of (C, N) pixels: mean, mean square, and 1; all 0 where no pixel has a weight."""
    if weights is None:
        each = (pixels, pixels.square(), torch.ones_like(pixels[:, :1]))
        return torch.stack([values.mean(1) for values in each])
    total = weights.sum(1)
    each = (pixels, pixels.square(), torch.ones_like(pixels))
    return torch.stack([(values * weights).sum(1) / total.clamp_min(1) for values in each])


@dataclass(frozen=True)
class _TrainOrder(Sampler[Key]):
    length: int
    repeats: int
    schedule: ScheduleSettings
    seed: int
    steps: range
    steps_per_epoch: int
    place: Place

    def __iter__(self) -> Iterator[Key]:
        batch_size, accumulate = self.schedule.batch_size, self.schedule.accumulate
        rows = rows_of_part(self.schedule, self.place.world_size)
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
class _PlainOrder(Sampler[Key]):
    indices: NDArray[np.int64]
    batch_size: int

    def __iter__(self) -> Iterator[Key]:
        for start in range(0, len(self.indices), self.batch_size):
            yield 0, self.indices[start : start + self.batch_size]


def _drain(workers: Workers, bad: BadFiles | None, read_timeout: float) -> Iterator[Batch]:
    told = set[str]()  # every worker may remark the same
    try:
        while True:
            trouble = None
            try:
                part: Loaded | None = next(workers.parts)
            except StopIteration:
                return
            except (RuntimeError, OSError) as error:
                part, trouble = None, workers.trouble(error, read_timeout)
            if trouble is not None:  # raised here, since the error above holds on to the loader
                raise UserError(trouble)
            if part is not None:
                if part.remark is not None and part.remark not in told:
                    told.add(part.remark)
                    _log.warning("%s", part.remark)
                yield from _checked(part, workers.source, bad)
    finally:
        # Workers end with the last reference to their loader.  Left to a traceback, and so to the
        # garbage collector, they would miss the message that ends them and be waited for, 5 seconds
        # each.
        del workers


def _checked(part: Loaded, source: Source, bad: BadFiles | None) -> Iterator[Batch]:
    if bad is not None:
        bad.note(source, part.tried, part.failures)
    elif part.failures:
        index, reason = part.failures[0]
        raise UserError(f"{shown_name(source.path(index))} {reason}")
    if part.error is not None:
        raise UserError(part.error)
    if part.batch is not None:
        yield part.batch


def _check_sizes(
    source: Source, repeats: int, schedule: ScheduleSettings, steps_per_epoch: int, world_size: int
) -> None:
    length, batch_size = len(source) * repeats, schedule.batch_size
    rows_of_part(schedule, world_size, repeats)
    if batch_size > length:
        parts = world_size * schedule.accumulate * repeats
        fitting = max(parts, length // parts * parts)
        raise UserError(
            f"batch_size={batch_size} is more than the {length} images of {source.name}; set "
            f"batch_size={fitting} or lower"
        )
    if steps_per_epoch * batch_size > length:
        raise ValueError(
            f"{steps_per_epoch} steps of {batch_size} images need more than the {length} there are"
        )
