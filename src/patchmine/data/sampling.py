"""Which items stand for a large source: for statistics, ``inspect``, pictures and evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.reading import Piece, open_regular
from patchmine.data.decoding.video import FrameFiles, VideoFile
from patchmine.data.sources.contract import Source
from patchmine.errors import UserError, foreign_parser

STAMPED = 64  # items whose contents are remembered with a run
_HEAD = 1 << 16  # bytes of a video file that are looked at


def spread_indices(count: int, wanted: int, seed: int = 0) -> NDArray[np.int64]:
    """(min(wanted, count),) int64: a seeded random choice of items, ascending, without repeats."""
    if wanted >= count:
        return np.arange(count, dtype=np.int64)
    # The first ones of a permutation; so a choice of more items holds the choice of fewer.
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted].astype(np.int64))


def content_stamps(source: Source) -> list[str]:
    """For each of at most ``STAMPED`` items 8 hex digits of its bytes, "" if unreadable."""
    chosen = spread_indices(len(source), STAMPED).tolist() if source.repeatable else []
    return [_stamp(source, index) for index in chosen]


def _stamp(source: Source, index: int) -> str:
    try:
        with foreign_parser(OSError):
            data = source.read(index)
            if isinstance(data, VideoFile | FrameFiles | Piece):
                path = data.paths[0] if isinstance(data, FrameFiles) else data.path
                with open_regular(path) as handle:
                    data = handle.read(_HEAD)
    except (OSError, UserError):  # training will meet it again, and tell
        return ""
    return hashlib.blake2b(data, digest_size=4).hexdigest() if isinstance(data, bytes) else ""


def changed_stamps(before: object, now: Sequence[str]) -> int:
    """How many items changed since ``before``, which comes from a file; 0 where nobody can tell."""
    if not isinstance(before, list) or len(before) != len(now):
        return 0
    return sum(bool(old) and bool(new) and old != new for old, new in zip(before, now, strict=True))
