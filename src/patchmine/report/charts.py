"""Line charts as HTML with the curves in SVG, complete without JavaScript.

The plot area is an SVG that stretches, its strokes do not; labels are HTML placed by percent.  So
letters keep their size at any width and on paper.  Every curve is drawn twice, on a linear and on a
logarithmic axis, and report.js only chooses.  For the read-out it finds positions and ready-made
texts in the chart's data: no number is formatted in two languages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from patchmine.report.axes import Axis, linear_axis, log_axis, tick_texts
from patchmine.report.reading import Floats, Series
from patchmine.report.words import number, whole

MOST_POINTS = 360
"""Bins of a longer curve: one for every three pixels of the widest chart."""

_TABLE_ROWS = 24
_ENOUGH_TO_SMOOTH = 60
_VIEW = 1000.0


@dataclass(frozen=True)
class Curve:
    """One run's line in a chart: ``mean``, ``low`` and ``high`` at ``steps``, each (N,) with N <=
    MOST_POINTS.

    ``smooth`` (N,) is a moving mean, or None where the values themselves are the line.
    """

    run: int
    name: str
    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    binned: bool
    smooth: Floats | None = None


@dataclass(frozen=True)
class Chart:
    """What a chart shows and how.

    ``wide``: over the whole page.  ``from_zero``: the axis starts at 0.  ``log_axis``: a
    logarithmic one makes sense. ``dots``: few values, each of them marked.  ``show`` writes a
    value, ``unit`` stands behind the numbers of the axis.
    """

    key: str
    title: str
    note: str
    curves: Sequence[Curve]
    wide: bool = False
    from_zero: bool = False
    log_axis: bool = False
    dots: bool = False
    show: Callable[[float], str] = number
    unit: str = ""


def make_curve(
    run: int, name: str, series: Series, *, smooth: bool, most: int = MOST_POINTS
) -> Curve:
    """The series as it is, or as means with their extremes over ``most`` bins of steps when it is
    longer.

    ``smooth``: add a moving mean, because the values are noisy and there are enough of them.
    """
    curve = _binned(run, name, series, most)
    if not smooth or len(curve.steps) < _ENOUGH_TO_SMOOTH:
        return curve
    return replace(curve, smooth=moving_mean(curve.mean, len(curve.mean) // 40 + 1))


def moving_mean(values: Floats, reach: int) -> Floats:
    """Mean over ``reach`` neighbours to either side; fewer near the ends, as many as there are on
    *both* sides.

    So a slope stays a slope and the ends stay where they are.
    """
    count = len(values)
    at = np.arange(count)
    reaches = np.minimum(reach, np.minimum(at, count - 1 - at))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[at + reaches + 1] - sums[at - reaches]) / (2 * reaches + 1)


def _binned(run: int, name: str, series: Series, most: int) -> Curve:
    if len(series.steps) <= most:
        return Curve(
            run, name, series.steps, series.values, series.values, series.values, binned=False
        )
    edges = np.linspace(series.steps[0], series.steps[-1], most + 1)
    starts = np.unique(
        np.searchsorted(series.steps, edges[:-1], side="left")
    )  # an empty bin starts where the next does
    sizes = np.diff(np.append(starts, len(series.steps)))
    return Curve(
        run,
        name,
        np.add.reduceat(series.steps, starts) / sizes,
        np.add.reduceat(series.values, starts) / sizes,
        np.minimum.reduceat(series.values, starts),
        np.maximum.reduceat(series.values, starts),
        binned=True,
    )


def draw(chart: Chart, position: int, last_step: float) -> tuple[str, dict[str, object]]:
    """The chart as a <figure>, and what report.js reads out of it.

    ``position`` counts the charts of the page, all of which end at ``last_step``.
    """
    x = _step_axis(last_step)
    low = min(float(curve.low.min()) for curve in chart.curves)
    high = max(float(curve.high.max()) for curve in chart.curves)
    linear = linear_axis(low, high, chart.from_zero)
    log = (
        log_axis(low, high)
        if chart.log_axis and low > 0 and (chart.wide or high > 3 * low)
        else None
    )
    figure = "\n".join(
        [
            f'<figure class="chart{" wide" if chart.wide else ""}" id="chart-{escape(chart.key)}">',
            _caption(chart, log is not None),
            _readout(chart),
            f'<div class="plot" data-chart="{position}" tabindex="0" aria-label="{escape(chart.title)}: left and right '
            'arrow keys move the read-out">',
            _svg(chart, x, linear, log),
            _labels(chart, x, linear, log),
            '<i class="cross off"></i>',
            *(
                f'<i class="dot run-{curve.run % 8} off" data-run="{curve.run}"></i>'
                for curve in chart.curves
            ),
            "</div>",
            numbers_table(chart),
            "</figure>",
        ]
    )
    return figure, _data(chart, x, linear, log)


def _step_axis(last: float) -> Axis:
    axis = linear_axis(0.0, max(last, 1.0), from_zero=True, about=6)
    return Axis(
        0.0, max(last, 1.0), [tick for tick in axis.ticks if tick <= last and tick.is_integer()]
    )


def _caption(chart: Chart, has_log: bool) -> str:
    button = (
        '<button type="button" class="log" aria-pressed="false">log scale</button>'
        if has_log
        else ""
    )
    return f'<figcaption><h3>{escape(chart.title)}</h3><p class="note">{escape(chart.note)}</p>{button}</figcaption>'


def _readout(chart: Chart) -> str:
    """One line above the plot: the newest values, until somebody points at a step."""
    values = "".join(
        f'<span class="value run-{curve.run % 8}" data-run="{curve.run}"><i class="swatch"></i>'
        f'<span class="name">{escape(curve.name)}</span> <b>{escape(chart.show(float(curve.mean[-1])))}</b></span>'
        for curve in chart.curves
    )
    return f'<p class="readout"><span class="at">last</span>{values}</p>'


def _svg(chart: Chart, x: Axis, linear: Axis, log: Axis | None) -> str:
    names = ", ".join(curve.name for curve in chart.curves)
    summary = "; ".join(
        f"{curve.name}: {chart.show(float(curve.mean[0]))} at step {whole(curve.steps[0])}, "
        f"{chart.show(float(curve.mean[-1]))} at step {whole(curve.steps[-1])}"
        for curve in chart.curves
    )
    scales = [f'<g class="linear">{_drawing(chart, x, linear)}</g>']
    if log is not None:
        scales.append(f'<g class="log off">{_drawing(chart, x, log)}</g>')
    ident = f"t-{escape(chart.key)}"
    return (
        f'<svg role="img" aria-labelledby="{ident} {ident}-d" viewBox="0 0 {_VIEW:g} {_VIEW:g}" '
        'preserveAspectRatio="none">'
        f'<title id="{ident}">{escape(chart.title)} over training steps: {escape(names)}</title>'
        f'<desc id="{ident}-d">{escape(summary)}</desc>{"".join(scales)}</svg>'
    )


def _drawing(chart: Chart, x: Axis, y: Axis) -> str:
    grid = "".join(
        f'<path class="grid" d="M0 {_down(place):.1f}H{_VIEW:g}"/>'
        for place in y.place(np.asarray(y.ticks, dtype=float))
        if place > 1e-6  # the axis itself is there already
    )
    parts = [grid]
    for curve in chart.curves:
        across = x.place(curve.steps) * _VIEW
        run = f'data-run="{curve.run}" class="%s run-{curve.run % 8}{" cycle" if curve.run >= 8 else ""}"'
        if curve.binned:
            parts.append(
                f'<path {run % "band"} d="{_band(across, y.place(curve.low), y.place(curve.high))}"/>'
            )
        if curve.smooth is not None:
            parts.append(f'<path {run % "faint"} d="{_line(across, y.place(curve.mean))}"/>')
        line = curve.mean if curve.smooth is None else curve.smooth
        parts.append(f'<path {run % "line"} d="{_line(across, y.place(line))}"/>')
        if chart.dots and len(curve.steps) <= 60:
            points = zip(across, y.place(curve.mean), strict=True)
            dots = "".join(f"M{a:.1f} {_down(b):.1f}h0" for a, b in points)
            parts.append(f'<path {run % "points"} d="{dots}"/>')
    return "".join(parts)


def _down(place: float) -> float:
    """SVG counts from the top."""
    return _VIEW * (1.0 - place)


def _line(across: Floats, places: Floats) -> str:
    points = [f"{a:.1f} {_down(b):.1f}" for a, b in zip(across, places, strict=True)]
    # A single point would be invisible: a dot is a line without length and with round ends.
    return "M" + "L".join(points) + ("h0" if len(points) == 1 else "")


def _band(across: Floats, low: Floats, high: Floats) -> str:
    there = [f"{a:.1f} {_down(b):.1f}" for a, b in zip(across, high, strict=True)]
    back = [f"{a:.1f} {_down(b):.1f}" for a, b in zip(across[::-1], low[::-1], strict=True)]
    return "M" + "L".join(there + back) + "Z"


def _labels(chart: Chart, x: Axis, linear: Axis, log: Axis | None) -> str:
    spans = [
        f'<span class="tick y {scale}" style="bottom:{100 * place:.2f}%">{escape(text + chart.unit)}</span>'
        for axis, scale in ((linear, "linear"), (log, "log off"))
        if axis is not None
        for place, text in zip(
            axis.place(np.asarray(axis.ticks, dtype=float)), tick_texts(axis), strict=True
        )
    ]
    spans += [
        f'<span class="tick x" style="left:{100 * place:.2f}%">{whole(tick)}</span>'
        for place, tick in zip(x.place(np.asarray(x.ticks, dtype=float)), x.ticks, strict=True)
    ]
    return f'<div class="labels" aria-hidden="true">{"".join(spans)}<span class="unit">step</span></div>'


def _data(chart: Chart, x: Axis, linear: Axis, log: Axis | None) -> dict[str, object]:
    """Per curve: steps, and for each the place across, the places up on both axes and the text of
    the value.
    """
    curves = [
        {
            "run": curve.run,
            "step": [round(step) for step in curve.steps.tolist()],
            "across": np.round(x.place(curve.steps), 5).tolist(),
            "linear": np.round(linear.place(curve.mean), 5).tolist(),
            "log": [] if log is None else np.round(log.place(curve.mean), 5).tolist(),
            "text": [chart.show(value) for value in curve.mean.tolist()],
        }
        for curve in chart.curves
    ]
    return {"key": chart.key, "last_step": x.high, "curves": curves}


def numbers_table(chart: Chart) -> str:
    """The same curves as numbers, at most some two dozen rows of each."""
    rows: dict[int, dict[int, str]] = {}
    for curve in chart.curves:
        chosen = np.unique(
            np.linspace(0, len(curve.steps) - 1, min(_TABLE_ROWS, len(curve.steps)))
            .round()
            .astype(int)
        )
        for i in chosen:
            rows.setdefault(round(float(curve.steps[i])), {})[curve.run] = chart.show(
                float(curve.mean[i])
            )
    head = "".join(f'<th scope="col">{escape(curve.name)}</th>' for curve in chart.curves)
    body = "".join(
        f'<tr><th scope="row">{whole(step)}</th>'
        + "".join(f"<td>{escape(row.get(curve.run, ''))}</td>" for curve in chart.curves)
        + "</tr>"
        for step, row in sorted(rows.items())
    )
    return (
        f'<details class="numbers"><summary>numbers</summary><div class="scroll"><table>'
        f'<thead><tr><th scope="col">step</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )
