"""Some items of a source, with something to learn from each that the source does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.sources.contract import Labels, Source, fingerprint_of

Values = NDArray[np.int64] | NDArray[np.float32]
"""What is learnt of n items: classes (n,) int64, or K numbers of each, (n, K) float32."""


class Selected(Source):
    """Items ``indices`` of ``source``, in that order, with ``targets`` of their own.

    Args:
        source: where the items are read.
        indices: (n,) int64, which of them.
        targets: (n,) int64 classes, places in ``names``; or (n, K) float32.
        names: of the classes, or of the K columns.
    """

    def __init__(
        self, source: Source, indices: NDArray[np.int64], targets: Values, names: Sequence[str]
    ) -> None:
        if len(indices) != len(targets):
            raise ValueError(f"{len(indices)} items have {len(targets)} targets")
        is_whole = np.array_equal(indices, np.arange(len(source)))
        own = fingerprint_of([source.fingerprint.encode(), indices.astype("<i8")])
        super().__init__(source.name, source.fingerprint if is_whole else own, source.notes)
        self.repeatable, self.encoded = source.repeatable, source.encoded
        self.source, self.indices, self.targets, self.names = source, indices, targets, [*names]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Any:
        return self.source.read(int(self.indices[index]))

    def identity(self, index: int) -> bytes | None:
        return self.source.identity(int(self.indices[index]))

    def path(self, index: int) -> str:
        return self.source.path(int(self.indices[index]))

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def labels(self) -> Labels | None:
        """The classes; None where the targets are numbers."""
        if self.targets.ndim > 1:
            return None
        return Labels(self.targets.astype(np.int64, copy=False), self.names)

    def target(self, index: int) -> int | NDArray[np.float32]:
        """The class of one item, or its (K,) float32."""
        # A copy: torch warns of arrays that it may not write to, as those that a file is mapped to.
        value = self.targets[index]
        return int(value) if self.targets.ndim == 1 else value.astype(np.float32)

    @property
    def target_digest(self) -> str:
        """Changes when a target, their type or a name does."""
        kind = f"{self.targets.dtype.kind}{self.targets.ndim}"
        names = "\0".join([kind, *self.names]).encode("utf-8", "surrogateescape")
        return fingerprint_of([names, self.targets.astype(self.targets.dtype.newbyteorder("<"))])
