"""The label maps of a run that segments: its parts, its classes, and what is wrong with them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchmine.config.schema import SegmentConfig
from patchmine.data.decoding.classmap import Colours
from patchmine.data.decoding.decode import DecodeError, probe
from patchmine.data.sources.coco_maps import coco_parts, open_coco_maps
from patchmine.data.sources.pairs import MapSource, Parts, open_pairs
from patchmine.errors import Say, UserError, reason_of, shown_name
from patchmine.evaluate.progress import progress
from patchmine.tasks.settings import VOID
from patchmine.train.engine import Engine
from patchmine.training.dividing import Divided, divided, part_given

MOST_CLASSES = 1000  # without names; more are numbers of objects, not of classes
_TOLD = 3  # faults in one message


@dataclass(frozen=True)
class Mapped(Divided[MapSource]):
    """Three disjoint parts with label maps of the same classes.

    Args:
        names: of the classes, by their numbers.
        pixels: (K,) of each class in ``train``.
        size: (height, width) of an image in ``train``, the median of each side.
    """

    names: list[str]
    pixels: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Findings:
    """What label maps show: pixels by class number, sizes, and sentences on what is wrong."""

    pixels: Counter[int]
    sizes: Counter[tuple[int, int]]
    faults: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """The median of each side, (0, 0) where nothing could be read."""
        sides = zip(*self.sizes.elements(), strict=True)
        height, width = (int(np.median(each)) for each in sides) if self.sizes else (0, 0)
        return height, width

    def add(self, other: Findings) -> None:
        """Count what was seen elsewhere too."""
        self.pixels.update(other.pixels)
        self.sizes.update(other.sizes)
        self.faults.extend(other.faults)


def colours_of(config: SegmentConfig) -> Colours | None:
    """Which pixel values mean which class, where the settings say so."""
    if not config.palette:
        return None
    names = [name for name in config.palette if name != VOID]
    numbers = {name: number for number, name in enumerate(names)} | {VOID: config.ignore_index}
    classes = tuple(numbers[name] for name in config.palette)
    return Colours(tuple(config.palette.values()), classes, config.ignore_index)


def open_label_maps(
    config: SegmentConfig, engine: Engine, say: Say, faults: list[str] | None = None
) -> Mapped:
    """The parts that ``data``, ``val`` and ``test`` name, every label map looked at.

    Args:
        config: the settings.
        engine: the processes that share the looking.
        say: hears how far it is, and how the parts came to be.
        faults: gets every fault there is; None: the first ones are a UserError.

    Raises:
        UserError: images without label maps, pixels that are no class, too few images.
    """
    colours = colours_of(config)
    parts = divided(_opened(config, colours, every_fault=faults is not None), config, "all")
    parts.tell(say)
    found = {name: _look(part, name, engine, say) for name, part in parts.parts.items()}
    names = _names_of(config, parts.train)
    wrong = [fault for each in found.values() for fault in each.faults]
    every: Counter[int] = sum((each.pixels for each in found.values()), Counter())
    every.pop(config.ignore_index, None)
    if names:
        wrong += _strangers(parts, every, names, config.ignore_index)
    elif not wrong:
        names = _numbered(every, config)
    if faults is not None:
        faults += wrong
    elif wrong:
        more = f" (and {len(wrong) - _TOLD:,} more)" if len(wrong) > _TOLD else ""
        listed = "; ".join(wrong[:_TOLD])
        raise UserError(f"{listed}{more}. `check=true` lists all that is wrong")
    pixels = torch.tensor([found["train"].pixels[number] for number in range(len(names))])
    if absent := [name for name, count in zip(names, pixels.tolist(), strict=True) if not count]:
        listed = ", ".join(map(shown_name, absent[:5]))
        say(f"Beware: the training images show no pixel of {listed}, which cannot be learned.")
    train, val, test, how = parts.train, parts.val, parts.test, parts.how
    return Mapped(train, val, test, how, names, pixels, found["train"].size)


def _names_of(config: SegmentConfig, train: MapSource) -> list[str]:
    """The names that settings or data give to the classes; [] where they have none."""
    own, given = [*train.names], [name for name in config.palette if name != VOID]
    if own and config.classes not in ([], own):
        raise UserError(f"classes: given {config.classes}, but the data name {own}: leave it out")
    if own and given:
        raise UserError("palette: given, but the data name their classes: leave it out")
    return own or list(config.classes) or given


def _opened(config: SegmentConfig, colours: Colours | None, *, every_fault: bool) -> Parts:
    def opened(data: Any, labels: str | None) -> Parts:
        if found := coco_parts(data, labels):
            skip = config.skip_bad_objects
            how = dict(skip_bad_objects=skip, every_fault=every_fault)
            return open_coco_maps(found, data, config.ignore_index, **how)
        return open_pairs(data, labels, colours)

    data = config.data if isinstance(config.data, str) else list(config.data)
    parts = opened(data, config.labels)
    for name in ("val", "test"):
        if (given := getattr(config, name)) is not None:
            parts[name] = part_given(name, str(given), opened(given, None))
    return parts


def _look(part: MapSource, title: str, engine: Engine, say: Say) -> Findings:
    """Every label map, each process a share."""
    mine = np.array_split(np.arange(len(part)), engine.world_size)[engine.rank].tolist()
    seen = Findings(Counter(), Counter(), [])
    # Decoders let go of the interpreter's lock.
    pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1)))
    with pool, progress(f"label maps ({title})", len(mine), say) as tick:
        for one in pool.map(lambda index: _seen(part, index), mine):
            seen.add(one)
            tick(1)
    if engine.world_size == 1:
        return seen
    whole = Findings(Counter(), Counter(), [])
    for each in engine.gather(seen):
        whole.add(each)
    return whole


def _seen(part: MapSource, index: int) -> Findings:
    """What one label map shows, or what is wrong with it."""
    try:
        labels = part.target(index)
        height, width, *_ = probe(part.read(index))
    except UserError as error:
        return _faulty(str(error))
    except (OSError, DecodeError) as error:
        told = str(error) if isinstance(error, DecodeError) else f"({reason_of(error)})"
        return _faulty(f"{shown_name(part.path(index))} cannot be read: {told}")
    if labels.shape != (height, width):
        rows, columns = labels.shape
        remedy = "make them alike"
        if (columns, rows) == (height, width):
            remedy = (
                "its sides are exchanged, as by an orientation in the image's EXIF data: turn the "
                "label map as the image is seen, or remove the orientation"
            )
        return _faulty(
            f"{part.target_name(index)} is {columns}x{rows} pixels and its image "
            f"{shown_name(part.path(index))} {width}x{height}: {remedy}"
        )
    numbers, counts = np.unique(labels, return_counts=True)
    pixels = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return Findings(Counter(pixels), Counter([(height, width)]), [])


def _faulty(fault: str) -> Findings:
    return Findings(Counter(), Counter(), [fault])


def _strangers(
    data: Divided[MapSource], found: Counter[int], names: Sequence[str], ignored: int
) -> Iterator[str]:
    """A sentence for each class number that no name belongs to, with a file that has it."""
    for number in sorted(number for number in found if number >= len(names)):
        file = next(
            (
                part.target_name(index)
                for part in data.parts.values()
                for index in range(len(part))
                if (part.target(index) == number).any()
            ),
            "a label map",
        )
        yield (
            f"{file} has class {number}, but there are {len(names)} "
            f"classes, 0 to {len(names) - 1}: name it in classes, or give ignore_index={number} "
            f"(now {ignored}) where it means no class"
        )


def _numbered(found: Counter[int], config: SegmentConfig) -> list[str]:
    """Names of classes that are told by their numbers only."""
    name, ignored = shown_name(str(config.data)), config.ignore_index
    if not found or max(found) == 0:
        raise UserError(
            f"the label maps of {name} hold nothing but class 0 and ignored pixels ({ignored}): if "
            f"{ignored} is a class, say so, as in palette={{background: 0, object: {ignored}}}"
        )
    if max(found) >= MOST_CLASSES or len(found) < (max(found) + 1) / 4:
        shown = ", ".join(map(str, sorted(found)[:6]))
        raise UserError(
            f"the label maps of {name} hold {len(found):,} values up to {max(found):,} ({shown}, "
            "...): say which are classes, as in palette={background: 0, object: 128}, or give "
            "classes"
        )
    return [str(number) for number in range(max(found) + 1)]
