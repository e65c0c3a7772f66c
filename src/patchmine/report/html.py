"""The report: one HTML file that needs nothing else, about one run or about several side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from patchmine.disk import output
from patchmine.report.charts import Chart, draw, make_curve
from patchmine.report.evaluations import evaluations_section
from patchmine.report.overview import complaints, identity, legend, overview_section
from patchmine.report.pictures import pictures_section
from patchmine.report.reading import RunRecord, in_percent, read_runs
from patchmine.report.settings_table import settings_section
from patchmine.report.words import number, percent, rate, title

_LAST = ("lr", "images_per_second", "data_wait")
_LINES = (
    '<p class="note">A strong line is a moving mean; faint: the values as logged; shaded: their extremes, where a long '
    "run has more values than fit. Point at a chart to read all charts at that step.</p>"
)
_NOTES = {
    "loss": "What training minimises.",
    "skipped": "Steps without a finite gradient, which were left out.",
    "data_wait": "Above a tenth of the time, more workers help.",
}


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained page about run folders.

    Args:
        runs: the folders; what is missing or damaged in one is left out of the page, which says so.
        out: the page to write.

    Returns:
        ``out``.

    Raises:
        UserError: a folder holds no run, or ``out`` cannot be written.
    """
    page = render(read_runs(runs), written=datetime.now(UTC))
    path = Path(out)
    with output(path) as new:
        new.write_bytes(page.encode("utf-8", "backslashreplace"))
    return path


def render(runs: Sequence[RunRecord], written: datetime) -> str:
    """The page as text."""
    figures, data = _draw_all(charts(runs))
    curves = (
        f'<section id="curves"><h2>Curves</h2>{_LINES}<div class="grid">{figures}</div></section>'
        if figures
        else ""
    )
    heading = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    about = (
        " · ".join(identity(runs[0])) if len(runs) == 1 else " · ".join(run.name for run in runs)
    )
    body = [
        overview_section(runs),
        evaluations_section(runs),
        curves,
        pictures_section(runs),
        settings_section(runs),
    ]
    return Template(_static("page.html")).substitute(
        title=escape(" · ".join(run.name for run in runs)),
        heading=escape(heading),
        about=escape(about),
        written=f"{written:%Y-%m-%d %H:%M} UTC",
        style=_static("report.css"),
        script=_static("report.js"),
        # A "<" inside a script element could end it.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        legend=legend(runs),
        body=complaints(runs) + "\n".join(part for part in body if part),
    )


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """One chart per logged quantity: the loss, evaluations, the method's own terms, then rate and
    speed.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    if not any(run.series["skipped"].values.any() for run in runs if "skipped" in run.series):
        names = [name for name in names if name != "skipped"]  # no step was lost: nothing to see
    first = [name for name in names if name == "loss"] + [name for name in names if "." in name]
    last = [name for name in _LAST if name in names]
    middle = [name for name in names if name not in first and name not in last]
    return [_chart(name, runs) for name in first + middle + last]


def _chart(name: str, runs: Sequence[RunRecord]) -> Chart:
    evaluated = "." in name
    protocol, _, quantity = name.partition(".")
    accuracy = quantity in ("top1", "top5")
    percents = accuracy or name == "data_wait"
    smooth = not evaluated and name != "lr"
    spoken = quantity.replace("top", "top-") if accuracy else quantity.replace("_", " ")
    note = _NOTES.get(name, "On the labelled images, while training runs." if evaluated else "")
    if name == "loss" and len({run.settings.get("method.name") for run in runs}) > 1:
        note += " Different methods minimise different things: compare the shapes, not the heights."
    return Chart(
        key=re.sub(r"[^a-z0-9]+", "-", name.lower()),
        title=f"{title(protocol)} {spoken}" if evaluated else title(name),
        note=note,
        curves=[
            make_curve(
                i,
                run.name,
                in_percent(run.series[name]) if name == "data_wait" else run.series[name],
                smooth=smooth,
            )
            for i, run in enumerate(runs)
            if name in run.series
        ],
        wide=name == "loss",
        from_zero=name in ("images_per_second", "data_wait", "lr"),
        log_axis=not evaluated and name not in ("images_per_second", "data_wait"),
        dots=evaluated,
        show=percent if percents else rate if name == "images_per_second" else number,
        unit=" %" if percents else "",
    )


def _draw_all(chosen: Sequence[Chart]) -> tuple[str, list[dict[str, object]]]:
    last_step = max(
        (float(curve.steps[-1]) for chart in chosen for curve in chart.curves), default=1.0
    )
    drawn = [draw(chart, position, last_step) for position, chart in enumerate(chosen)]
    return "\n".join(figure for figure, _ in drawn), [data for _, data in drawn]


def _static(name: str) -> str:
    return (files("patchmine.report") / "static" / name).read_text(encoding="utf-8")
