"""Which items stand for a large source: for statistics, ``inspect``, pictures and evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.video import FrameFiles, VideoFile
from patchmine.data.sources.contract import Source, open_regular
from patchmine.errors import UserError, foreign_parser

STAMPED = 64  # items whose contents are remembered with a run
_HEAD = 1 << 16  # bytes of a video file that are looked at


def spread_indices(count: int, wanted: int, seed: int = 0) -> NDArray[np.int64]:
    """A seeded random choice of ``wanted`` of ``count`` items.

    Not every k-th item: a list that goes through its classes, cameras or days in turn would give
    one of them only.

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


def content_stamps(source: Source) -> list[str]:
    """What the contents of a few items are, to tell whether images were replaced under equal names.

    Returns:
        For each of at most ``STAMPED`` items, always the same ones of a source: 8 hexadecimal
        digits of its bytes, of a video of its first frame or its beginning.  "" for what cannot be
        read, or is no file.  Empty where a torch dataset is among the sources, since that may give
        other pixels each time.
    """
    if not source.repeatable:
        return []
    return [_stamp(source, index) for index in spread_indices(len(source), STAMPED).tolist()]


def changed_stamps(before: object, now: Sequence[str]) -> int:
    """How many items have other contents than ``before``, which comes from a file; 0 where that
    cannot be told.
    """
    if not isinstance(before, list) or len(before) != len(now):
        return 0
    return sum(bool(old) and bool(new) and old != new for old, new in zip(before, now, strict=True))


def _stamp(source: Source, index: int) -> str:
    try:
        with foreign_parser(OSError):
            data = _bytes_of(source.read(index))
    except (OSError, UserError):  # training will meet it again, and tell
        return ""
    return hashlib.blake2b(data, digest_size=4).hexdigest() if data is not None else ""


def _bytes_of(raw: Any) -> bytes | None:
    if isinstance(raw, bytes):
        return raw
    if isinstance(raw, VideoFile | FrameFiles):
        with open_regular(raw.path if isinstance(raw, VideoFile) else raw.paths[0]) as handle:
            return handle.read(_HEAD)
    return None
