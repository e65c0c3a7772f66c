"""The report: one HTML file that needs nothing else, about one run or several side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import jinja2

from patchmine.config.describe import usual_settings
from patchmine.errors import Say, silent
from patchmine.report import reading, verdict, words
from patchmine.report.charts import draw
from patchmine.report.curves import charts
from patchmine.report.health import health_of
from patchmine.report.horizontal import axes_across, for_script
from patchmine.report.outcome import Judged, judge
from patchmine.report.overview import overviews
from patchmine.report.results import end_of_bars, evaluations_of, union
from patchmine.system.disk import output


def write_report(runs: Sequence[str | Path], out: str | Path, *, say: Say = silent) -> Path:
    """Write one self-contained page about some runs.

    Whatever is missing or damaged in a run folder is left out of the page, which says so.

    Args:
        runs: run folders, finished or not.
        out: the HTML file to write.
        say: hears the verdict on each run, and on all of them.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder that holds no run, and an ``out`` that cannot be written.
    """
    found = reading.read_runs(runs)
    found.sort(key=lambda run: reading.SHARES in run.evaluations)  # colours of runs go by place
    judged = judge(found)
    page = render(found, judged, written=datetime.now(UTC))
    path = Path(out)
    with output(path) as new:
        new.write_bytes(page.encode("utf-8", "backslashreplace"))
    for sentence in judged.headlines():
        say(sentence)
    return path


def render(runs: Sequence[reading.RunRecord], judged: Judged, written: datetime) -> str:
    """The page as text."""
    across = axes_across(runs)
    drawings = [draw(chart, across[0].last) for chart in charts(runs)]
    evaluations = evaluations_of(runs)
    read = {run.name: verdict.verdict_of(run) for run in runs}
    verdicts = {name: one for name, one in read.items() if one is not None}
    tops = overviews([run for run in runs if run.name not in verdicts])
    template = templates().get_template("page.html")
    return template.render(
        written=f"{written:%Y-%m-%d %H:%M} UTC",
        runs=runs,
        about=tops[0].about if tops else verdicts[runs[0].name].about,
        verdicts=verdicts,
        outcomes=judged.each,
        comparison=judged.comparison,
        findings=[(run.name, told) for run in runs if (told := health_of(run))],
        overviews=tops,
        made_labels=union(top.made for top in tops),
        fact_labels=union(top.facts for top in tops),
        evaluations=evaluations,
        bars_end=end_of_bars(evaluations),
        num_baselines=max((len(each.baselines) for each in evaluations), default=0),
        drawings=drawings,
        across=across,
        chart_data={
            "axes": for_script(across) if drawings else [],
            "charts": [drawing.data for drawing in drawings],
        },
        strips=[(i, run.name, found) for i, run in enumerate(runs) if (found := run.pictures())],
        **_settings(runs),
    )


@cache
def templates() -> jinja2.Environment:
    """What pages are made of: escaping, strict, with our words for numbers."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("patchmine.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    in_words = (words.number, words.percent, words.points, words.spoken, words.title)
    of_scores = (words.score, words.measure)
    of_verdicts = (verdict.sentences, verdict.table, verdict.plot, verdict.drawn)
    for function in (*in_words, *of_scores, *of_verdicts):
        found.filters[function.__name__] = function
    found.filters["thousands"] = words.whole
    found.globals["nothing"] = words.NOTHING
    return found


def _settings(runs: Sequence[reading.RunRecord]) -> dict[str, Collection[str]]:
    """Names of settings: those that differ (between runs, or of one run from the defaults), those
    that stand below them, and all that are not the default in some run.
    """
    names = union(run.settings for run in runs)
    changed = set().union(*(_changed(run.settings) for run in runs))
    first = changed if len(runs) == 1 else differing([run.settings for run in runs])
    rest = [name for name in names if name not in first]
    return {
        "first_settings": [name for name in names if name in first],
        "other_settings": sorted(rest, key=lambda name: name not in changed),
        "changed_settings": changed,
    }


def _changed(settings: Mapping[str, str]) -> set[str]:
    """Names of those that are not the default; of a run of unknown kind or method none is known."""
    kind, method = settings.get("kind", "pretrain"), settings.get("method.name")
    usual = reading.flatten(usual_settings(kind, method))
    return {name for name, value in settings.items() if usual and usual.get(name) != value} - {
        "out"
    }


def differing(settings: Sequence[Mapping[str, str]]) -> set[str]:
    """Names of the settings that differ between runs; a missing one differs from every value."""
    names = set(union(settings)) - {"out"}
    return {name for name in names if len({run.get(name) for run in settings}) > 1}
