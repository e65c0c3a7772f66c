"""The randomness of order and samples: functions of seed, epoch and number, so nothing is saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# First words of the seeds, so that no stream of one kind is one of the other: zeros at the end of a
# seed do not count.
_ORDER, _SAMPLE = 1, 2

# numpy/random/bit_generator.pyx: SeedSequence, which its authors promise not to change
_POOL, _SHIFT = 4, np.uint32(16)
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
# numpy/random/src/pcg64/pcg64.h: PCG_DEFAULT_MULTIPLIER_128
_PCG_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_WORD, _PCG_WORD = 2**32 - 1, 2**128 - 1

_Words = NDArray[np.uint32]


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """(length,) the order in which an epoch visits the items."""
    seeds = np.random.SeedSequence((_ORDER, seed, epoch))
    return np.random.Generator(np.random.PCG64(seeds)).permutation(length)


def sample_generator(seed: int, epoch: int, index: int, attempt: int = 0) -> np.random.Generator:
    """The randomness of one sample; costs about 20 microseconds."""
    words = (_SAMPLE, seed, epoch, index, attempt)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


class SampleGenerators:
    """The generators of `sample_generator` for many samples, one after the other, in a tenth of the
    time: seeds are worked out for all at once, and there is one generator, set anew for each.
    """

    def __init__(self, seed: int, epoch: int, indices: Sequence[int]) -> None:
        words = [*_words_of(_SAMPLE), *_words_of(seed), *_words_of(epoch)]
        self._seeds = _seeds(words, np.asarray(indices, np.uint32))
        self._bits = np.random.PCG64(0)
        self._generator = np.random.Generator(self._bits)

    def at(self, place: int) -> np.random.Generator:
        """The generator of the sample of ``indices[place]``, until the next is asked for."""
        high, low, more_high, more_low = self._seeds[place]
        # As `pcg64_set_seed` in pcg64.c
        step = ((more_high << 64 | more_low) << 1 | 1) & _PCG_WORD
        start = ((step + (high << 64 | low)) * _PCG_MULTIPLIER + step) & _PCG_WORD
        self._bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": start, "inc": step},
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


def _words_of(number: int) -> list[int]:
    """Words of 32 bits, the lowest first; one at least."""
    words = [number & _WORD]
    while number := number >> 32:
        words.append(number & _WORD)
    return words


def _seeds(words: list[int], last: _Words) -> list[list[int]]:
    """SeedSequence((*words, each of last, 0)).generate_state(4, uint64), for every one of them."""
    pool, constants = _pool(words, last), _constants(_INIT_B, _MULT_B)
    halves = [_hashed(pool[place % _POOL], constants) for place in range(2 * _POOL)]
    wide = [half.astype(np.uint64) for half in halves]
    pairs = zip(wide[::2], wide[1::2], strict=True)
    numbers = [low | high << np.uint64(32) for low, high in pairs]
    seeds: list[list[int]] = np.stack(numbers, 1).tolist()
    return seeds


def _pool(words: list[int], last: _Words) -> list[_Words]:
    """The four words into which SeedSequence mixes all others."""
    entropy = [np.full_like(last, word) for word in words] + [last, np.zeros_like(last)]
    constants = _constants(_INIT_A, _MULT_A)  # there are five words at least
    pool = [_hashed(word, constants) for word in entropy[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mixed(pool[target], _hashed(pool[source], constants))
    for word in entropy[_POOL:]:
        pool = [_mixed(each, _hashed(word, constants)) for each in pool]
    return pool


def _constants(first: int, factor: int) -> Iterator[tuple[np.uint32, np.uint32]]:
    """Each word of a series, and the next."""
    while True:
        second = first * factor & _WORD
        yield np.uint32(first), np.uint32(second)
        first = second


def _hashed(value: _Words, constants: Iterator[tuple[np.uint32, np.uint32]]) -> _Words:
    before, after = next(constants)
    value = (value ^ before) * after
    return value ^ value >> _SHIFT


def _mixed(left: _Words, right: _Words) -> _Words:
    value = _MIX_LEFT * left - _MIX_RIGHT * right
    return value ^ value >> _SHIFT
