"""The report: one HTML file that needs nothing else, about one run or several side by side."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from pathlib import Path

import jinja2
import numpy as np

from patchmine.disk import output
from patchmine.report import health, reading, verdict, words
from patchmine.report.charts import Chart, draw, make_curve
from patchmine.report.classes import ByClass, take_classes

_LAST_CHARTS = ("lr", "images_per_second", "data_wait")
_HEADLINES = ("top1", "miou", "map", "mask_map")  # the scores that runs are told by
# Scores of a validation that no chart is drawn of, those of masks too; metrics.jsonl has them.
_ASIDE = ("map75", "map_small", "map_medium", "map_large", "mar100")
_KINDS = {"classify": "fine-tuned", "segment": "segmentation", "detect": "detection"}
_NOTES = {
    "loss": "What training minimises.",
    "skipped": "Steps without a finite gradient, which were left out.",
    "data_wait": "Above a tenth of the time, more workers help.",
    "monitor.rankme": "How many directions the features use; near 1 they have collapsed.",
    "monitor.feature_std": "How much directions of features differ; 0: all images look alike.",
    "monitor.neighbours_kept": "Nearest neighbours at step 0 that are neighbours still.",
    "monitor.held_out_loss": "On images not trained on; rising while the loss falls: over-fitting.",
}


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained page about some runs.

    Whatever is missing or damaged in a run folder is left out of the page, which says so.

    Args:
        runs: run folders, finished or not.
        out: the HTML file to write.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder that holds no run, and an ``out`` that cannot be written.
    """
    found = reading.read_runs(runs)
    found.sort(key=lambda run: reading.SHARES in run.evaluations)  # colours of runs go by place
    page = render(found, written=datetime.now(UTC))
    path = Path(out)
    with output(path) as new:
        new.write_bytes(page.encode("utf-8", "backslashreplace"))
    return path


def render(runs: Sequence[reading.RunRecord], written: datetime) -> str:
    """The page as text."""
    steps = [series.steps[-1] for run in runs for series in run.series.values()]
    last_step = float(max(steps, default=1.0))
    drawings = [draw(chart, last_step) for chart in charts(runs)]
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
        findings=[(run.name, told) for run in runs if (told := _health(run))],
        overviews=tops,
        fact_labels=_union(top.facts for top in tops),
        evaluations=evaluations,
        bars_end=_end_of_bars(evaluations),
        num_baselines=max((len(each.baselines) for each in evaluations), default=0),
        drawings=drawings,
        chart_data=[drawing.data for drawing in drawings],
        strips=[(i, run.name, found) for i, run in enumerate(runs) if (found := run.pictures())],
        setting_names=_union(run.settings for run in runs),
        different=differing([run.settings for run in runs]),
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


def _health(run: reading.RunRecord) -> list[health.Finding]:
    is_adapted = run.settings.get("init", "none") != "none"
    return health.findings_of(run.series, run.steps_per_epoch, is_adapted=is_adapted)


def _union(tables: Iterable[Iterable[str]]) -> list[str]:
    """All keys in the order in which they come up."""
    return list(dict.fromkeys(chain.from_iterable(tables)))


# ---- how far each run is, and how it did ----


@dataclass(frozen=True)
class Fact:
    """One figure of a run; ``best`` is the number by which runs are ranked (None: they are not)."""

    label: str
    value: str
    detail: str = ""
    best: float | None = None


@dataclass(frozen=True)
class Overview:
    """A run at the top of the page; ``leads``: labels of the figures in which no run is better."""

    name: str
    about: str
    step: int
    total: int | None
    facts: Mapping[str, Fact]
    leads: Collection[str]

    @property
    def done(self) -> float:
        """How far the run is, in percent."""
        return 100 * min(1.0, self.step / self.total) if self.total else 0.0


def overviews(runs: Sequence[reading.RunRecord]) -> list[Overview]:
    """The runs in their order, with the best of each ranked figure marked."""
    facts = [{fact.label: fact for fact in facts_of(run)} for run in runs]
    ranked = [(f.label, f.best) for own in facts for f in own.values() if f.best is not None]
    best, rivals = dict(sorted(ranked)), Counter(label for label, _ in ranked)
    return [
        Overview(
            name=run.name,
            about=_about(run.settings),
            step=run.step,
            total=run.total_steps if (run.total_steps or 0) > 0 else None,
            facts=own,
            leads={
                label
                for label, fact in own.items()
                if rivals[label] > 1 and fact.best == best[label]
            },
        )
        for run, own in zip(runs, facts, strict=True)
    ]


def _about(settings: Mapping[str, str]) -> str:
    """What was trained on what, as far as the settings tell: method, model, image size, data."""
    sides = list(dict.fromkeys(re.findall(r"\d+", settings.get("image_size", ""))))
    size = " \N{MULTIPLICATION SIGN} ".join(sides) + " px" if sides else ""
    method, model, data = (settings.get(name, "") for name in ("method.name", "model", "data"))
    what = method.upper() or _KINDS.get(settings.get("kind", ""), "")
    return " · ".join(text for text in (what, model, size, data) if text)


def facts_of(run: reading.RunRecord) -> list[Fact]:
    """The figures of a run in the order in which they are shown."""
    found = [Fact("loss", words.number(run.series["loss"].last))] if "loss" in run.series else []
    found += _scores_of(run)
    speed, wait = (run.series.get(name) for name in ("images_per_second", "data_wait"))
    if speed is not None:
        found.append(Fact("samples per second", words.rate(float(np.median(speed.values)))))
    if wait is not None:
        share = 100 * float(np.median(wait.values))
        found.append(Fact("waiting for data", words.percent(share)))
    if run.seconds is not None:
        found.append(Fact("time in training", words.duration(run.seconds)))
    return found


def _scores_of(run: reading.RunRecord) -> Iterator[Fact]:
    """How well it does, on its way and when it was evaluated."""
    for name, series in run.series.items():
        protocol, _, quantity = name.partition(".")
        if quantity in _HEADLINES:
            label = f"{words.title(protocol)} {words.score(quantity)} in training"
            top, last = float(series.values.max()), series.last
            detail = f"best {words.percent(top)}" if top > last else ""
            yield Fact(label, words.percent(last), detail, best=last)
    for name, content in run.evaluations.items():
        for quantity in _HEADLINES:
            value = reading.finite_number(content.get(quantity))
            if value is not None:
                label = f"{words.title(name)} {words.score(quantity)}"
                before = read_result(0, name, content).baselines.get("start")
                detail = f"{words.percent(before)} at the start" if before is not None else ""
                yield Fact(label, words.percent(value), detail, best=value)


# ---- evaluations ----


@dataclass(frozen=True)
class Result:
    """One evaluation of one run.

    Accuracies in percent, ``baselines`` name -> top-1.  ``measures``: the numbers of an evaluation
    that has no accuracy.  ``notes``: sentences for the reader.  ``conditions``: how it was made.
    ``by_class``: what it says of each class, where it does.
    """

    run: int
    name: str
    top1: float | None
    top5: float | None
    baselines: Mapping[str, float]
    measures: Mapping[str, float]
    notes: Sequence[str]
    conditions: Mapping[str, str]
    by_class: ByClass | None

    @property
    def lines(self) -> list[tuple[str, Mapping[str, float]]]:
        """The measures in rows of a table: those of masks below those of boxes."""
        masks = {key: value for key, value in self.measures.items() if key.startswith("mask_")}
        if not masks:
            return [("", self.measures)]
        boxes = {key: value for key, value in self.measures.items() if key not in masks}
        under = {key.removeprefix("mask_"): value for key, value in masks.items()}
        return [("boxes", boxes), ("masks", under)]

    @property
    def in_words(self) -> str:
        """The accuracies for those who hear the page."""
        own = [f"{words.percent(self.top1)} top-1"] if self.top1 is not None else []
        others = [f"{words.spoken(k)} {words.percent(v)}" for k, v in self.baselines.items()]
        return "; ".join(own + others)


@dataclass(frozen=True)
class Evaluation:
    """The results of one protocol, with the names of what any of them holds."""

    name: str
    results: Sequence[Result]
    baselines: Sequence[str]
    measures: Sequence[str]
    conditions: Sequence[str]
    notes: Sequence[str]


def evaluations_of(runs: Sequence[reading.RunRecord]) -> list[Evaluation]:
    """All evaluations of the runs by name."""
    by_name: dict[str, list[Result]] = {}
    for i, run in enumerate(runs):
        for name, content in run.evaluations.items():
            if name == reading.SHARES:
                continue  # the verdict, which the page opens with
            by_name.setdefault(name, []).append(read_result(i, run.name, content))
    return [
        Evaluation(
            name=name,
            results=results,
            baselines=_union(result.baselines for result in results),
            measures=_union(line for result in results for _, line in result.lines),
            conditions=_union(result.conditions for result in results),
            notes=_shared_notes(results),
        )
        for name, results in sorted(by_name.items())
    ]


def read_result(run: int, name: str, content: Mapping[str, object]) -> Result:
    """The numbers of an eval/NAME.json, whatever else it holds."""
    rest = dict(content)
    rest.pop("name", None)
    rest.pop("top1_interval", None)
    by_class = take_classes(rest)
    top1, top5 = (reading.finite_number(rest.pop(key, None)) for key in ("top1", "top5"))
    older, notes = rest.pop("floors", None), rest.pop("notes", None)  # the older name of baselines
    baselines = rest.pop("baselines", older)
    accuracies = {
        str(key): reading.finite_number(scores.get("top1"))
        for key, scores in (baselines.items() if isinstance(baselines, Mapping) else ())
        if isinstance(scores, Mapping)
    }
    measures = reading.numbers_in(rest) if top1 is None else {}
    return Result(
        run=run,
        name=name,
        top1=top1,
        top5=top5,
        baselines={key: value for key, value in accuracies.items() if value is not None},
        measures=measures,
        notes=[str(note) for note in notes] if isinstance(notes, list) else [],
        conditions=reading.flatten(
            {key: value for key, value in rest.items() if key not in measures}
        ),
        by_class=by_class,
    )


def _shared_notes(results: Sequence[Result]) -> list[str]:
    """What the reader has to know, once where all runs agree."""
    said: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            said.setdefault(note, []).append(result.name)
    return [
        note if len(names) == len(results) else f"{', '.join(names)}: {note}"
        for note, names in said.items()
    ]


def _end_of_bars(evaluations: Sequence[Evaluation]) -> float:
    """The accuracy at which the bars of all evaluations end, in percent."""
    results = [result for evaluation in evaluations for result in evaluation.results]
    shown = [value for result in results for value in (result.top1, *result.baselines.values())]
    largest = max((value for value in shown if value is not None), default=0.0)
    end = min(100.0, 10.0 * math.ceil(largest * 1.05 / 10))
    return end if end > 0 else 100.0


# ---- curves ----


def charts(runs: Sequence[reading.RunRecord]) -> list[Chart]:
    """A chart per quantity: loss, evaluations, the method's own terms, then rate and speed."""
    names = _union(run.series for run in runs)
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


def _chart(name: str, runs: Sequence[reading.RunRecord]) -> Chart:
    protocol, evaluated, quantity = name.partition(".")
    is_score = bool(evaluated) and words.is_share(quantity)
    is_speed, is_wait = name == "images_per_second", name == "data_wait"
    note = _NOTES.get(name, "On the labelled images, while training runs." if evaluated else "")
    losses = ("loss", "monitor.held_out_loss")
    if name in losses and len({run.settings.get("method.name") for run in runs}) > 1:
        note += " Different methods minimise different things: compare the shapes, not the heights."
    found = [(i, run.name, run.series[name]) for i, run in enumerate(runs) if name in run.series]
    if is_wait:
        found = [(i, label, reading.Series(own.steps, 100 * own.values)) for i, label, own in found]
    smooth = not evaluated and name != "lr"
    label = words.score(quantity)
    is_share = is_score or is_wait
    return Chart(
        key=re.sub(r"[^a-z0-9]+", "-", name.lower()),
        title=words.TITLES.get(name) or " ".join(filter(None, [words.title(protocol), label])),
        note=note,
        curves=[make_curve(i, label, series, smooth=smooth) for i, label, series in found],
        wide=name == "loss",
        from_zero=is_speed or is_wait or name == "lr",
        log_axis=not (evaluated or is_speed or is_wait),
        dots=bool(evaluated),
        show=words.percent if is_share else words.rate if is_speed else words.number,
        unit=" %" if is_share else "",
    )


# ---- settings ----


def differing(settings: Sequence[Mapping[str, str]]) -> set[str]:
    """Names of the settings that differ between runs; a missing one differs from every value."""
    names = set(_union(settings)) - {"out"}
    return {name for name in names if len({run.get(name) for run in settings}) > 1}
