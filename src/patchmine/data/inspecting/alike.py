"""Near-duplicates: a perceptual hash of 64 bits for each image, and a search that meets few pairs.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions",
2010): signs of the lowest frequencies of the grey image about their median.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DISTANCE = 4
"""Bits of 64 in which the hashes of near-duplicates differ at most."""

_SIDE, _LOW = 32, 8  # of the grey thumbnail, and frequencies of it along each axis
_COLOUR_SHARE, _COLOUR_LEAST = 0.05, 0.01  # by which mean colours may differ: of the larger, and
# Six bands of bits: DISTANCE = 4 of them that differ spoil four bands at most, so two are equal.
_CUTS = (0, 11, 22, 33, 44, 54, 64)
_CROWD = 64  # members of a bucket of which all pairs are compared
_LOOKED_AT = 2000  # members of a bucket that one item is compared with; exact up to so many

_DCT = np.cos(np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * np.arange(_LOW)[:, None])  # (8, 32)
_BITS = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


class Fingerprint(NamedTuple):
    """What is compared: the hash, and the mean of red, green and blue (grey: three times that)."""

    bits: int
    colour: tuple[float, float, float]


def fingerprint(pixels: NDArray[np.float32]) -> Fingerprint:
    """Of an image (C, H, W) of one channel, or of three or more of which the first three count."""
    means = [float(channel.mean()) for channel in (pixels[:3] if len(pixels) >= 3 else pixels[:1])]
    red, green, blue = means if len(means) == 3 else means * 3
    grey = pixels[0] if len(means) == 1 else pixels[0] + pixels[1] + pixels[2]
    low = (_waves(grey.shape[0]) @ grey @ _waves(grey.shape[1]).T).ravel()  # (64,)
    signs = low > np.sort(low[1:])[len(low) // 2 - 1]  # without the mean, far above the others
    return Fingerprint(int.from_bytes(np.packbits(signs).tobytes()), (red, green, blue))


@lru_cache(maxsize=1024)
def _waves(length: int) -> NDArray[np.float32]:
    """(8, length): a side becomes 32 means of areas, and these the 8 lowest frequencies.

    Of a shorter side the pixels come more than once.
    """
    starts = np.arange(_SIDE) * length // _SIDE
    ends = np.maximum(np.append(starts[1:], length), starts + 1)
    pixel = np.arange(length)
    areas = (pixel >= starts[:, None]) & (pixel < ends[:, None])  # (32, length)
    return (_DCT @ (areas / (ends - starts)[:, None])).astype(np.float32)


def near(
    bits: NDArray[np.uint64],
    colours: NDArray[np.float32],
    i: NDArray[np.int64] | int,
    j: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether items ``i`` and ``j`` (both (P,), or one number and (P,)) are near-duplicates."""
    differing = np.atleast_1d(bits[i] ^ bits[j]).view(np.uint16).reshape(-1, 4)
    close = _BITS[differing].sum(1) <= DISTANCE
    gap = np.abs(colours[i] - colours[j])
    room = _COLOUR_SHARE * np.maximum(np.abs(colours[i]), np.abs(colours[j])) + _COLOUR_LEAST
    same: NDArray[np.bool_] = close & (gap <= room).all(-1)
    return same


def keepers(bits: NDArray[np.uint64], colours: NDArray[np.float32]) -> NDArray[np.int64]:
    """Whom each item repeats: the first near one among those that are kept, else itself.

    Items are taken in their order: one is kept unless a kept one before it is near.  So no two kept
    ones are near, and chains of small changes (frames of a video) keep a member every few steps.
    Among thousands that are all a little alike some repeats may be kept, so that time is bounded.

    Args:
        bits: (N,) hashes.
        colours: (N, 3) mean colours.

    Returns:
        (N,) places of kept items.
    """
    kept = np.arange(len(bits))
    crowd = np.flatnonzero(_has_near(bits, colours))  # usually few: the rest need no loop
    own_bits, own_colours = bits[crowd], colours[crowd]
    tables = []
    for keys in _bucket_keys(own_bits):
        order = np.argsort(keys, kind="stable")  # so that a bucket's members stay in their order
        behind = np.empty_like(order)
        behind[order] = np.arange(1, len(order) + 1)
        tables.append((order, behind, np.searchsorted(keys[order], keys, "right")))
    repeats = np.zeros(len(crowd), bool)
    for place in range(len(crowd)):
        if repeats[place]:
            continue
        for order, behind, ends in tables:
            # A long bucket is gone through as long as most of it is near.
            for start in range(behind[place], ends[place], _LOOKED_AT):
                members = order[start : min(start + _LOOKED_AT, ends[place])]
                members = members[~repeats[members]]
                met = members[near(own_bits, own_colours, place, members)]
                repeats[met] = True
                kept[crowd[met]] = crowd[place]
                if 2 * len(met) < len(members):
                    break
    return kept


def _has_near(bits: NDArray[np.uint64], colours: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(N,): whether another item is near; also of all in a bucket too full to compare them all."""
    found = np.zeros(len(bits), bool)
    for keys in _bucket_keys(bits):
        order = np.argsort(keys, kind="stable")
        _, counts = np.unique(keys, return_counts=True)
        size = np.repeat(counts, counts)  # of the bucket that each of the sorted ones is in
        found[order[size > _CROWD]] = True
        order = order[(size > 1) & (size <= _CROWD)]
        keys = keys[order]
        for shift in range(1, _CROWD):
            at = np.flatnonzero(keys[shift:] == keys[:-shift])
            if not len(at):
                break
            i, j = order[at], order[at + shift]
            met = near(bits, colours, i, j)
            found[i[met]] = found[j[met]] = True
    return found


def _bucket_keys(bits: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """For every two bands (N,) what they hold: near items agree in one of these at least."""
    bands = []
    for start, end in pairwise(_CUTS):
        bands.append((bits >> np.uint64(start)) & np.uint64((1 << (end - start)) - 1))
    return [(one << np.uint64(11)) | other for one, other in combinations(bands, 2)]
