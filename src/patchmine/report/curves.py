"""A chart for every quantity of the runs, with sentences about it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from patchmine.report import words
from patchmine.report.charts import Chart, make_curve
from patchmine.report.curve_words import about, does
from patchmine.report.reading import RunRecord
from patchmine.report.results import union
from patchmine.report.series import Series

_LAST_CHARTS = ("lr", "images_per_second", "data_wait")
# Scores of a validation that no chart is drawn of, those of masks too; metrics.jsonl has them.
_ASIDE = ("map75", "map_small", "map_medium", "map_large", "mar100")
_ERRORS = ("loss", "rmse", "mae")  # of a validation, of which less is better
_MOST_SENTENCES = 4  # runs of which it is said what their curves do
_SET = ("lr", "skipped")  # curves that say nothing by their shape


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """A chart per quantity: loss, evaluations, the method's own terms, then rate and speed."""
    names = union(run.series for run in runs)
    if not any(run.series["skipped"].values.any() for run in runs if "skipped" in run.series):
        names = [name for name in names if name != "skipped"]  # no step was lost: nothing to see
    names = [name for name in names if not _is_aside(name)]
    evaluated = sorted((n for n in names if "." in n), key=lambda n: n.startswith("monitor."))
    first = [name for name in names if name == "loss"] + evaluated
    last = [name for name in _LAST_CHARTS if name in names]
    middle = [name for name in names if name not in first and name not in last]
    return [_chart(name, runs) for name in first + middle + last]


def _is_aside(name: str) -> bool:
    return name.partition(".")[2].removeprefix("mask_") in _ASIDE


def _chart(name: str, runs: Sequence[RunRecord]) -> Chart:
    protocol, evaluated, quantity = name.partition(".")
    is_score = bool(evaluated) and words.is_share(quantity)
    is_speed, is_wait = name == "images_per_second", name == "data_wait"
    found = [(i, run.name, run.series[name]) for i, run in enumerate(runs) if name in run.series]
    if is_wait:
        found = [(i, label, Series(own.steps, 100 * own.values)) for i, label, own in found]
    smooth = not evaluated and name != "lr"
    # Tasks log it in percent, DropPos as a share
    in_percent = name == "accuracy" and not any("method.name" in run.settings for run in runs)
    is_share = is_score or is_wait or in_percent
    show = words.percent if is_share else words.rate if is_speed else words.number
    rises = bool(evaluated) and protocol != "monitor" and quantity not in _ERRORS
    does_what = {run: does(own, show, is_score=rises) for run, _, own in found}
    methods = {run.settings.get("method.name") for run in runs}
    return Chart(
        key=re.sub(r"[^a-z0-9]+", "-", name.lower()),
        title=_title(name),
        note=about(name, one_kind=len(methods) <= 1),
        does=_sentences(does_what, runs) if name not in _SET else (),
        curves=[make_curve(i, label, series, smooth=smooth) for i, label, series in found],
        wide=name == "loss",
        from_zero=is_speed or is_wait or name == "lr",
        is_share=is_share,
        log_axis=not (evaluated or is_speed or is_wait),
        dots=bool(evaluated),
        show=show,
        unit=" %" if is_share else "",
    )


def _title(name: str) -> str:
    protocol, _, quantity = name.partition(".")
    score = words.score(quantity)
    return words.TITLES.get(name) or " ".join(filter(None, [words.title(protocol), score]))


def _sentences(does_what: dict[int, str], runs: Sequence[RunRecord]) -> list[str]:
    """Of one run a sentence of its own, of a few with their names."""
    if len(runs) == 1:
        return [
            f"It {text}." if not text[0].isdigit() else f"{text}." for text in does_what.values()
        ]
    if len(does_what) > _MOST_SENTENCES:
        return []
    return [f"{runs[i].name}: {text}." for i, text in does_what.items()]
