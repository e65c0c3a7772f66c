"""Line charts: curves of few points, axes with round labels, and the SVG paths that pages hold.

Every curve is drawn on a linear and on a logarithmic axis, and report.js only chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from patchmine.report.series import Floats, Series
from patchmine.report.words import number

MOST_POINTS = 360
"""Bins of a longer curve: one for every three pixels of the widest chart."""

_ENOUGH_TO_SMOOTH = 60
_MOST_DOTS = 60
_TABLE_ROWS = 24
_VIEW = 1000.0  # side of the SVG's own coordinates, which are stretched over the plot


@dataclass(frozen=True)
class Axis:
    """Values between ``low`` and ``high``, mapped to [0, 1], and where its labels stand."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, values: Sequence[float] | Floats) -> Floats:
        """Values as fractions of the axis."""
        values = np.asarray(values, dtype=np.float64)
        if self.log:
            return np.log(np.maximum(values, self.low) / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def inside(self, values: Sequence[float] | Floats) -> Floats:
        """The same; values beyond an end, which damage may bring, stand at it."""
        return np.clip(self.place(values), 0.0, 1.0)

    def labels(self, texts: Sequence[str]) -> list[tuple[float, str]]:
        """Where each tick stands, in percent of the axis, with its text."""
        return list(zip((100 * self.place(self.ticks)).tolist(), texts, strict=True))


def linear_axis(
    low: float,
    high: float,
    from_zero: bool = False,
    about: int = 5,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Axis:
    """An axis around the values with about so many round labels, which leaves no ``bounds``."""
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in (low, high))
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        spread = abs(high) * 0.1 or 1.0
        low, high = (min(0.0, low), high + spread) if from_zero else (low - spread, high + spread)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    margin = 0.04 * (high - low)
    bottom = low if from_zero and low >= 0 else low - margin
    bottom, top = max(bottom, bounds[0]), min(high + margin, bounds[1])
    first, last = math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9)
    return Axis(bottom, top, [k * step for k in range(first, last + 1)])


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis around positive values; within one decade its labels are even."""
    low, high = low * (low / high) ** 0.04, high * (high / low) ** 0.04
    if high <= low:
        low, high = low / 1.1, high * 1.1
    if high / low < 10:
        ticks = linear_axis(low, high).ticks
    else:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        multiples = (1, 2, 5) if len(powers) <= 4 else (1,)
        every = math.ceil(len(powers) / 8)
        ticks = [m * 10.0**power for power in powers if power % every == 0 for m in multiples]
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high], log=True)


def tick_texts(axis: Axis) -> list[str]:
    """Labels with as many decimals as it takes to tell neighbours apart."""
    if axis.log and axis.high / axis.low >= 10:
        return [number(tick) for tick in axis.ticks]
    largest = max((abs(tick) for tick in axis.ticks), default=0.0)
    if 0 < largest < 1e-3:
        texts = [f"{tick:.1e}".replace("e-0", "e-") for tick in axis.ticks]
        return [
            "0" if abs(tick) < 1e-12 else text for tick, text in zip(axis.ticks, texts, strict=True)
        ]
    gap = min((b - a for a, b in pairwise(axis.ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{tick + 0.0:,.{decimals}f}" for tick in axis.ticks]


@dataclass(frozen=True)
class Curve:
    """One run's line in a chart: ``mean``, ``low`` and ``high`` at ``steps``, all (N,).

    ``binned``: means of neighbouring values, with their extremes.  ``smooth`` (N,) is a moving
    mean, or None where the values themselves are the line.
    """

    run: int
    name: str
    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    binned: bool
    smooth: Floats | None = None


def make_curve(
    run: int, name: str, series: Series, *, smooth: bool, most: int = MOST_POINTS
) -> Curve:
    """The series as it is or in ``most`` bins of steps; ``smooth``: with a moving mean, if long."""
    steps, values = series.steps, series.values
    if len(steps) <= most:
        curve = Curve(run, name, steps, values, values, values, binned=False)
    else:
        edges = np.linspace(steps[0], steps[-1], most + 1)
        # An empty bin starts where the next one does.
        starts = np.unique(np.searchsorted(steps, edges[:-1], side="left"))
        sizes = np.diff(np.append(starts, len(steps)))
        centres, mean = (np.add.reduceat(part, starts) / sizes for part in (steps, values))
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        curve = Curve(run, name, centres, mean, low, high, binned=True)
    if not smooth or len(curve.steps) < _ENOUGH_TO_SMOOTH:
        return curve
    return replace(curve, smooth=moving_mean(curve.mean, len(curve.mean) // 40 + 1))


def moving_mean(values: Floats, reach: int) -> Floats:
    """Mean over ``reach`` neighbours to either side; over fewer, equally many, near the ends."""
    count = len(values)
    at = np.arange(count)
    reaches = np.minimum(reach, np.minimum(at, count - 1 - at))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[at + reaches + 1] - sums[at - reaches]) / (2 * reaches + 1)


@dataclass(frozen=True)
class Chart:
    """What a chart shows and how.

    ``note``: what it is, and which way is good.  ``does``: what the curves do.  ``wide``: over the
    whole page.  ``from_zero``: the axis starts at 0.  ``is_share``: it lies between 0 and 100 %.
    ``log_axis``: a logarithmic one makes sense.  ``dots``: few values, each of them marked.
    ``show`` writes a value, ``unit`` stands behind the numbers of the axis.
    """

    key: str
    title: str
    note: str
    curves: Sequence[Curve]
    does: Sequence[str] = ()
    wide: bool = False
    from_zero: bool = False
    is_share: bool = False
    log_axis: bool = False
    dots: bool = False
    show: Callable[[float], str] = number
    unit: str = ""


class Path(NamedTuple):
    """A path of one run's curve: its kind is line, band, faint or points."""

    kind: str
    run: int
    data: str


@dataclass(frozen=True)
class Scale:
    """All that stands on one vertical axis: heights of grid lines, labels, paths."""

    name: str
    grid: Sequence[float]
    labels: Sequence[tuple[float, str]]
    paths: Sequence[Path]


@dataclass(frozen=True)
class Drawing:
    """A chart as the page shows it: one scale or two, rows of its table, data of report.js."""

    chart: Chart
    scales: Sequence[Scale]
    rows: Sequence[tuple[int, Sequence[str]]]
    data: dict[str, Any]


def draw(chart: Chart, last_step: float) -> Drawing:
    """The chart over the steps up to ``last_step``, at which all charts of a page end."""
    last_step = max(last_step, 1.0)
    x = Axis(0.0, last_step, [])
    low = min(float(curve.low.min()) for curve in chart.curves)
    high = max(float(curve.high.max()) for curve in chart.curves)
    bounds = (0.0, 100.0) if chart.is_share else (-math.inf, math.inf)
    axes = {"linear": linear_axis(low, high, chart.from_zero, bounds=bounds)}
    if chart.log_axis and low > 0 and (chart.wide or high > 3 * low):
        axes["log"] = log_axis(low, high)
    return Drawing(
        chart=chart,
        scales=[_scale(chart, name, x, axis) for name, axis in axes.items()],
        rows=_table(chart),
        # Ready-made texts for the read-out, so that no number is formatted in two languages.
        data={
            "curves": [
                {
                    "run": curve.run,
                    "step": [round(step) for step in curve.steps.tolist()],
                    "text": [chart.show(value) for value in curve.mean.tolist()],
                }
                | {name: np.round(y.inside(curve.mean), 5).tolist() for name, y in axes.items()}
                for curve in chart.curves
            ]
        },
    )


def _scale(chart: Chart, name: str, x: Axis, y: Axis) -> Scale:
    """Everything of a chart on one axis; SVG counts from the top."""

    def points(curve: Curve, values: Floats) -> list[str]:
        across, down = _VIEW * x.place(curve.steps), _VIEW * (1 - y.inside(values))
        return [f"{a:.1f} {d:.1f}" for a, d in zip(across, down, strict=True)]

    paths = []
    for curve in chart.curves:
        means = points(curve, curve.mean)
        line = means if curve.smooth is None else points(curve, curve.smooth)
        if curve.binned:
            around = points(curve, curve.high) + points(curve, curve.low)[::-1]
            paths.append(Path("band", curve.run, "M" + "L".join(around) + "Z"))
        if curve.smooth is not None:
            paths.append(Path("faint", curve.run, "M" + "L".join(means)))
        # A dot is a line without length and with round ends.
        paths.append(Path("line", curve.run, "M" + "L".join(line) + "h0" * (len(line) == 1)))
        if chart.dots and len(means) <= _MOST_DOTS:
            paths.append(Path("points", curve.run, "".join(f"M{point}h0" for point in means)))
    labels = y.labels([text + chart.unit for text in tick_texts(y)])
    # At the bottom the axis itself is a line already.
    grid = [_VIEW * (1 - percent / 100) for percent, _ in labels if percent > 1e-4]
    return Scale(name, grid, labels, paths)


def _table(chart: Chart) -> list[tuple[int, list[str]]]:
    """Some two dozen steps of each curve as numbers: a step, and a text for each curve."""
    rows: dict[int, list[str]] = {}
    for place, curve in enumerate(chart.curves):
        count = len(curve.steps)
        chosen = np.linspace(0, count - 1, min(_TABLE_ROWS, count)).round().astype(int)
        for i in np.unique(chosen):
            row = rows.setdefault(round(float(curve.steps[i])), [""] * len(chart.curves))
            row[place] = chart.show(float(curve.mean[i]))
    return sorted(rows.items())
