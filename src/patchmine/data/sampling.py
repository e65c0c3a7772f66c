"""Which items stand for a large source: for statistics, ``inspect``, pictures and evaluations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def spread_indices(count: int, wanted: int, seed: int = 0) -> NDArray[np.int64]:
    """A seeded random choice of ``wanted`` of ``count`` items.

    Not every k-th item: a list that goes through its classes, cameras or days in turn would give one of them only.

    Args:
        count: items of the source.
        wanted: items to choose; all are chosen where there are no more.
        seed: other seeds choose other items.

    Returns:
        (min(wanted, count),) int64, ascending, without repeats.
    """
    if wanted >= count:
        return np.arange(count, dtype=np.int64)
    # The first ones of a permutation; so a choice of more items holds the choice of fewer.
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted].astype(np.int64))
