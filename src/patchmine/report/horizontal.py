"""What curves are drawn over: steps, and what report.js can put in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchmine.report.charts import Axis, linear_axis, tick_texts
from patchmine.report.reading import RunRecord
from patchmine.report.series import Floats, Series

_NEAR = 1e-4  # of the axis, by which a clock that is drawn may be off
_MOST_POINTS = 400
_CLOCKS = {"epoch": "epoch", "images": "samples", "time": "seconds"}
_UNITS = ((3 * 3600.0, 3600.0, "h"), (180.0, 60.0, "min"), (0.0, 1.0, "s"))


@dataclass(frozen=True)
class Across:
    """An axis under all charts of a page.

    ``key``: step, epoch, images or time.  ``unit`` stands at its end.  ``last``: where it ends.
    ``ticks``: (percent, text).  ``clocks``: of each run steps and the axis' values at them.
    """

    key: str
    unit: str
    last: float
    ticks: Sequence[tuple[float, str]]
    clocks: Sequence[tuple[list[float], list[float]]]


def axes_across(runs: Sequence[RunRecord]) -> list[Across]:
    """Steps first, then whatever all runs that have curves tell of themselves."""
    ends = [_last_step(run) for run in runs]
    found = [_across("step", "step", max([1.0, *ends]), [([], []) for _ in runs])]
    drawn = [run for run, end in zip(runs, ends, strict=True) if end]
    for key, name in _CLOCKS.items():
        if drawn and all(name in run.clocks for run in drawn):
            values = [
                _clock(run.clocks.get(name), end) for run, end in zip(runs, ends, strict=True)
            ]
            found.append(_scaled(key, values))
    return found


def _last_step(run: RunRecord) -> float:
    return max((float(each.steps[-1]) for each in run.series.values()), default=0.0)


def _clock(series: Series | None, end: float) -> tuple[Floats, Floats]:
    """The clock from step 0 to the last step that is drawn, which may be later than its own."""
    if series is None or not end:
        return np.zeros(1), np.zeros(1)
    steps, values = np.append(0.0, series.steps), np.append(0.0, series.values)
    if steps[1] == 0:
        steps, values = steps[1:], values[1:]
    if end > steps[-1] > 0:  # at the pace of the whole run
        steps, values = np.append(steps, end), np.append(values, values[-1] * end / steps[-1])
    return steps, np.maximum.accumulate(values)


def _scaled(key: str, clocks: Sequence[tuple[Floats, Floats]]) -> Across:
    last = max(float(values[-1]) for _, values in clocks) or 1.0
    size, unit = 1.0, {"epoch": "epoch", "images": "images"}.get(key, "")
    if key == "time":
        size, unit = next((size, unit) for most, size, unit in _UNITS if last > most)
    kept = [_thinned(steps, values, last) for steps, values in clocks]
    told = [(np.round(s, 2).tolist(), np.round(v / size, 6).tolist()) for s, v in kept]
    return _across(key, unit, last / size, told)


def _thinned(steps: Floats, values: Floats, last: float) -> tuple[Floats, Floats]:
    """Few points of a clock: two of one that runs evenly."""
    straight = np.interp(steps, steps[[0, -1]], values[[0, -1]])
    if np.abs(straight - values).max() <= _NEAR * last:
        return steps[[0, -1]], values[[0, -1]]
    at = np.unique(
        np.linspace(0, len(steps) - 1, min(_MOST_POINTS, len(steps))).round().astype(int)
    )
    return steps[at], values[at]


def _across(
    key: str, unit: str, last: float, clocks: Sequence[tuple[list[float], list[float]]]
) -> Across:
    ticks = linear_axis(0.0, last, from_zero=True, about=6).ticks
    is_counted = key in ("step", "images")
    shown = [tick for tick in ticks if tick <= last and (tick.is_integer() or not is_counted)]
    axis = Axis(0.0, last, shown)
    return Across(key, unit, last, axis.labels(tick_texts(axis)), clocks)


def for_script(axes: Sequence[Across]) -> list[Mapping[str, object]]:
    """What report.js needs of them."""
    return [{"key": a.key, "unit": a.unit, "last": a.last, "clocks": a.clocks} for a in axes]
