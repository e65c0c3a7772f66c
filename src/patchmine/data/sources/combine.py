"""Sources made of other things: several sources as one, and any map-style dataset of torch's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence, Sized
from itertools import accumulate
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from patchmine.data.sources.contract import ClassNames, Labels, Source, data_error, fingerprint_of
from patchmine.data.sources.members import PassedOver
from patchmine.errors import foreign_parser


class Joined(Source):
    """Several sources, one behind the other.  Classes of one name are one class."""

    def __init__(self, parts: Sequence[Source], name: str | None = None) -> None:
        super().__init__(
            " + ".join(part.name for part in parts) if name is None else name,
            fingerprint_of(part.fingerprint.encode() for part in parts),
            [note for part in parts for note in part.notes],
        )
        self.parts = list(parts)
        together = PassedOver()
        for part in parts:
            together.update(part.passed_over)
        self.passed_over = together.found
        self.repeatable = all(part.repeatable for part in parts)
        self.encoded = any(part.encoded for part in parts)
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

    def identity(self, index: int) -> bytes | None:
        """That of the item in its part."""
        part, inside = self._find(index)
        return part.identity(inside)

    def path(self, index: int) -> str:
        """The item's path in its part."""
        part, inside = self._find(index)
        return part.path(inside)

    def key(self, index: int) -> str:
        """The item's key in its part."""
        part, inside = self._find(index)
        return part.key(inside)

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


class DatasetSource(Source):
    """A map-style torch dataset; its fingerprint knows its type and its length.

    Items may be random, so that their contents tell nothing; a dataset that knows what it holds
    may have a ``fingerprint`` of its own, a text, which counts too.
    """

    repeatable = False

    def __init__(self, dataset: Dataset[Any]) -> None:
        name = type(dataset).__name__
        has_items = isinstance(dataset, Sized) and callable(getattr(dataset, "__getitem__", None))
        # An iterable one may have a length, and inherits a __getitem__.
        if isinstance(dataset, IterableDataset) or not has_items:
            what = (
                "the dataset must have a length and give item i as dataset[i], by which to shuffle"
            )
            raise data_error(
                name, f"{what} and to resume; write an iterable one's images into shards"
            )
        with foreign_parser(
            lambda reason: data_error(name, f"its length cannot be read ({reason})")
        ):
            length = len(cast(Sized, dataset))
        if not length:
            raise data_error(name, "the dataset has no items; give one that has some")
        own = getattr(dataset, "fingerprint", None)
        parts = [name, str(length), *([own] if isinstance(own, str) else [])]
        super().__init__(name, fingerprint_of(part.encode() for part in parts))
        self.dataset = dataset

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
        """From ``dataset.targets``, as torchvision has it, else from every pair."""
        unreadable = "the classes cannot be read"
        with foreign_parser(lambda reason: data_error(self.name, f"{unreadable} ({reason})")):
            targets = getattr(self.dataset, "targets", None)
            if targets is None:
                if not isinstance(self.dataset[0], tuple | list):
                    return None
                targets = [self.dataset[index][1] for index in range(len(self))]
            numbers = np.asarray(targets)
            names = getattr(self.dataset, "classes", None)
            if numbers.shape != (len(self),) or not np.issubdtype(numbers.dtype, np.integer):
                what = f"the classes must be {len(self)} whole numbers, one an item"
                raise data_error(self.name, what)
            if names and not 0 <= numbers.min() <= numbers.max() < len(names):
                what = f"the classes are {numbers.min()} to {numbers.max()}"
                raise data_error(self.name, f"{what}, and there are {len(names)} names of classes")
            if not names and numbers.min() < 0:
                what = f"the class of an item is {numbers.min()}: leave out items without a label"
                raise data_error(self.name, f"{what}, and number classes from 0")
            classes = ClassNames()
            for number in numbers.tolist():
                classes.add(str(names[number]) if names else str(number))
            return classes.finish()
