"""What a worker does: micro-batches of items become batches of views, or the reasons why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from patchmine.data.badfiles import Failure
from patchmine.data.decoding.bounds import reading_item
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.reading import Piece
from patchmine.data.decoding.video import open_video
from patchmine.data.pixelcache import PixelCache
from patchmine.data.randomness import SampleGenerators, sample_generator
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import TrainView, View, whole_image
from patchmine.data.views.normalise import as_float
from patchmine.data.workers import Desk, quiet_decoding
from patchmine.errors import UserError, reason_of, shown_name
from patchmine.types import Batch, Objects, Sample

# Items tried in place of a broken one before a worker gives up.
_REPLACEMENTS = 100

Key = tuple[int, NDArray[np.int64]]
"""An epoch and the items of one micro-batch."""


@dataclass(frozen=True)
class Loaded:
    """What a worker sends back: a batch, unless nothing could be read, and the items that failed.

    ``error``: why the run must end, in a sentence (a UserError would arrive wrapped in a worker's
    traceback).  ``remark``: what a person should know, in a sentence.
    """

    batch: Batch | None
    tried: int
    failures: list[Failure]
    error: str | None = None
    remark: str | None = None

    def pin_memory(self) -> Loaded:
        """The same in page-locked memory; torch's loader calls this."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class Samples(Dataset[Loaded]):
    """Reads micro-batches.  ``seed``: of training, where others stand in for broken items."""

    def __init__(
        self,
        source: Source,
        view: View,
        desk: Desk,
        seed: int | None,
        targets: bool,
        cache: PixelCache | None = None,
    ) -> None:
        self.source, self.view, self.desk = source, view, desk
        self.seed, self.targets, self.cache = seed, targets, cache

    def __getitem__(self, key: Key) -> Loaded:
        epoch, indices = key
        chosen = indices[:: self.view.repeats].tolist()
        generators = SampleGenerators(self.seed or 0, epoch, chosen)
        together = self._together(chosen, generators)
        if together is not None:
            return Loaded(together, len(chosen), [])
        samples, numbers, failures, error = list[Sample](), list[int](), list[Failure](), None
        for place, index in enumerate(chosen):
            try:
                number = self._add(samples, epoch, index, generators.at(place), failures)
            except UserError as fault:
                error = str(fault)
                break
            numbers += [number] * (len(samples) - len(numbers))
        batch = collate(samples, numbers) if samples and error is None else None
        remark = None if self.cache is None else self.cache.told()
        return Loaded(batch, len(samples) + len(failures), failures, error, remark)

    def _add(
        self,
        samples: list[Sample],
        epoch: int,
        index: int,
        generator: np.random.Generator,
        failures: list[Failure],
    ) -> int:
        """As many samples of an item, or of what stands in for it, as the view repeats it.

        Gives the number of the item that was used; without ``seed`` no other stands in.
        """
        attempts = 1 if self.seed is None else 1 + _REPLACEMENTS
        chosen = index
        for attempt in range(attempts):
            if attempt:
                generator = sample_generator(self.seed or 0, epoch, index, attempt)
                chosen = int(generator.integers(len(self.source)))
            try:
                with self.desk.reading(chosen), reading_item():
                    self._sample(samples, chosen, generator)
            except (OSError, DecodeError) as error:
                failures.append((chosen, reason_against(error)))
            else:
                return chosen
        if self.seed is not None:
            raise UserError(nothing_readable(self.source, failures[-attempts:]))
        return index

    def _sample(self, samples: list[Sample], index: int, generator: np.random.Generator) -> None:
        kept = None if self.cache is None else self.cache.read(index)
        if kept is not None:
            grey = kept.shape[2] == 1  # whose strides are those of a decoded image
            pixels = torch.from_numpy(kept.reshape(1, *kept.shape[:2]) if grey else kept)
            pixels = pixels if grey else pixels.permute(2, 0, 1)
            samples.append(self.view(pixels, generator, self._target(index)))
            return
        state = None if self.cache is None else self.source.identity(index)
        raw, target, settings = self.source.read(index), self._target(index), self.view.settings
        with quiet_decoding():
            if state is not None and isinstance(raw, bytes | Piece):
                raw = whole_image(raw, settings)
                raw = raw.pixels if raw.known is None else raw
            if self.view.repeats > 1:  # which is for videos only
                raw = open_video(raw, settings.max_pixels)
            samples += [self.view(raw, generator, target) for _ in range(self.view.repeats)]
        if self.cache is not None and state is not None and isinstance(raw, Tensor):
            self.cache.keep(index, state, raw)

    def _together(self, chosen: list[int], generators: SampleGenerators) -> Batch | None:
        """The batch of small images that are all kept and of one shape; None of any others."""
        if self.cache is None or self.targets or not isinstance(self.view, TrainView):
            return None
        if self.view.settings.wants_known:
            return None
        images, shape = list[NDArray[np.uint8]](), None
        with self.desk.reading(chosen[0]):
            for index in chosen:
                image = self.cache.read(index)
                if image is None or image.shape != (shape or image.shape):
                    return None
                shape = image.shape
                images.append(image)
        if not self.view.takes_together(images[0]):
            return None
        pixels, boxes, flips = self.view.together(images, map(generators.at, range(len(chosen))))
        return Batch([pixels], torch.tensor(chosen), boxes, flips)

    def _target(self, index: int) -> Any:
        return self.source.target(index) if self.targets else None


def collate(samples: Sequence[Sample], numbers: Sequence[int] | None = None) -> Batch:
    """One batch; in a worker default_collate stacks straight into shared memory.

    ``numbers``: those of the items in their source; None: as the samples say.
    """
    views = []
    for crops in zip(*(sample.views for sample in samples), strict=True):
        mixed = len({crop.dtype for crop in crops}) > 1  # 8-bit and deeper images side by side
        views.append(default_collate([as_float(crop) for crop in crops] if mixed else [*crops]))

    def column(name: str) -> Any:
        values = [getattr(sample, name) for sample in samples]
        if isinstance(values[0], Objects):  # of which every image has another number
            return values
        return None if values[0] is None else default_collate(values)

    index = column("index") if numbers is None else torch.tensor(numbers)
    rest = (column(name) for name in ("box", "flip", "photometric", "target", "erase", "known"))
    return Batch(views, index, *rest)


def reason_against(error: Exception) -> str:
    """What is wrong, as the end of a sentence that begins with the file's name."""
    if isinstance(error, DecodeError):
        return str(error)
    return f"cannot be read ({reason_of(error)})"


def nothing_readable(source: Source, failures: Sequence[Failure]) -> str:
    """Why a run must end, all of whose items that were tried failed."""
    index, reason = failures[0]
    return (
        f"none of the {len(dict(failures))} items of {shown_name(source.name)} that were tried can "
        f"be used; the first is {shown_name(source.path(index))}, which {reason}"
    )
