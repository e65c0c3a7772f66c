"""Sources made of other things: several sources as one, and any map-style dataset of torch's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence, Sized
from itertools import accumulate
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from patchmine.data.sources.contract import (
    ClassNames,
    Labels,
    Source,
    fingerprint_of,
    key_of,
    notes_of,
)
from patchmine.errors import UserError, foreign_parser


class Joined:
    """Several sources, one behind the other.  Classes of one name are one class."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.name = " + ".join(part.name for part in parts)
        self.fingerprint = fingerprint_of(part.fingerprint.encode() for part in parts)
        self.notes = tuple(note for part in parts for note in notes_of(part))
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)

    def read(self, index: int) -> Any:
        """The item of the part that it belongs to."""
        part, inside = self._find(index)
        return part.read(inside)

    def path(self, index: int) -> str:
        """The item's path in its part."""
        part, inside = self._find(index)
        return part.path(inside)

    def key(self, index: int) -> str:
        """The item's key in its part."""
        part, inside = self._find(index)
        return key_of(part, inside)

    def labels(self) -> Labels | None:
        """All parts' classes, numbered together; None where a part has none."""
        found = [labels for labels in (part.labels() for part in self.parts) if labels is not None]
        if len(found) < len(self.parts):
            return None
        names = ClassNames()
        for name in (name for labels in found for name in labels.names):
            names.add(name)
        together = names.finish().names
        return Labels(np.concatenate([labels.numbered_as(together) for labels in found]), together)


class DatasetSource:
    """A map-style ``torch.utils.data.Dataset`` whose items are images or pairs (image, class
    number).

    A dataset cannot be asked what it holds, so the fingerprint knows its type and its length only.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, dataset: Dataset[Any]) -> None:
        iterable = isinstance(
            dataset, IterableDataset
        )  # which may have a length, and inherits a __getitem__
        if (
            iterable
            or not isinstance(dataset, Sized)
            or not callable(getattr(dataset, "__getitem__", None))
        ):
            raise UserError(
                f"data={type(dataset).__name__}: the dataset must have a length and give item i as dataset[i]; the "
                "items of an iterable dataset have no numbers, by which to shuffle, to resume exactly or to "
                "remember something of each image: write its images into a folder or into shards"
            )
        self.dataset = dataset
        self.name = type(dataset).__name__
        with foreign_parser(
            lambda reason: UserError(f"data={self.name}: its length cannot be read ({reason})")
        ):
            length = len(dataset)
        if not length:
            raise UserError(f"data={self.name}: the dataset has no items; give one that has some")
        self.fingerprint = fingerprint_of([self.name.encode(), str(length).encode()])

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def read(self, index: int) -> Any:
        """The image of the item."""
        item = self.dataset[index]
        return item[0] if isinstance(item, tuple | list) else item

    def path(self, index: int) -> str:
        """Type and number: an item has no other name."""
        return f"{self.name}[{index}]"

    def labels(self) -> Labels | None:
        """From ``dataset.targets``, as torchvision has it, else from every item; None where items
        are no pairs.

        UserError where they are no whole numbers, or cannot be read.
        """
        with foreign_parser(
            lambda reason: UserError(f"data={self.name}: the classes cannot be read ({reason})")
        ):
            return self._labels()

    def _labels(self) -> Labels | None:
        targets = getattr(self.dataset, "targets", None)
        if targets is None:
            if not isinstance(self.dataset[0], tuple | list):
                return None
            targets = [self.dataset[index][1] for index in range(len(self))]
        numbers = np.asarray(targets)
        if numbers.shape != (len(self),) or not np.issubdtype(numbers.dtype, np.integer):
            raise UserError(
                f"data={self.name}: the classes must be {len(self)} whole numbers, one an item"
            )
        names = getattr(self.dataset, "classes", None)
        if names and not 0 <= numbers.min() <= numbers.max() < len(names):
            span = f"{numbers.min()} to {numbers.max()}"
            raise UserError(
                f"data={self.name}: the classes are {span}, and there are {len(names)} names of classes"
            )
        classes = ClassNames()
        for number in numbers.tolist():
            classes.add(str(names[number]) if names else str(number))
        return classes.finish()
