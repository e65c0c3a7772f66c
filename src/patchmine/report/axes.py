"""Axes of a chart: where values lie between 0 and 1, and which round numbers are written beside
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from patchmine.report.reading import Floats
from patchmine.report.words import number


@dataclass(frozen=True)
class Axis:
    """Values between ``low`` and ``high``, mapped to [0, 1], and where its labels stand."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, values: Floats) -> Floats:
        """Values as fractions of the axis."""
        if self.log:
            return np.log(np.maximum(values, self.low) / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)


def linear_axis(low: float, high: float, from_zero: bool = False, about: int = 5) -> Axis:
    """An axis around the values with round labels."""
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        spread = abs(high) * 0.1 or 1.0
        low, high = (min(0.0, low), high + spread) if from_zero else (low - spread, high + spread)
    step = _round_step((high - low) / about)
    margin = 0.04 * (high - low)
    bottom = low if from_zero and low >= 0 else low - margin
    top = high + margin
    first, last = math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9)
    return Axis(bottom, top, [k * step for k in range(first, last + 1)])


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis around positive values; labels at 1, 2, 5, 10..., within one decade at
    round values.
    """
    low, high = low * (low / high) ** 0.04, high * (high / low) ** 0.04
    if high <= low:
        low, high = low / 1.1, high * 1.1
    if high / low < 10:
        ticks = [tick for tick in linear_axis(low, high).ticks if low <= tick <= high]
        return Axis(low, high, ticks, log=True)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(powers) <= 4 else (1,)
    every = math.ceil(len(powers) / 8)
    ticks = [m * 10.0**power for power in powers if power % every == 0 for m in multiples]
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high], log=True)


def tick_texts(axis: Axis) -> list[str]:
    """Labels with as many decimals as it takes to tell neighbours apart."""
    if axis.log and axis.high / axis.low >= 10:
        return [number(tick) for tick in axis.ticks]
    gap = min((b - a for a, b in pairwise(axis.ticks)), default=1.0)
    largest = max((abs(tick) for tick in axis.ticks), default=0.0)
    if largest and largest < 1e-3:
        return [
            "0" if abs(tick) < 1e-12 else f"{tick:.1e}".replace("e-0", "e-") for tick in axis.ticks
        ]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{tick + 0.0:,.{decimals}f}" for tick in axis.ticks]
