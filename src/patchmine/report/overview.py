"""The top of a report: how far each run is and how it did, as key figures of one run or as a table
of several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from patchmine.report.reading import RunRecord, finite_number
from patchmine.report.words import NOTHING, duration, number, percent, rate, title, whole


@dataclass(frozen=True)
class Fact:
    """One figure of a run: ``value`` as shown, ``best`` the number by which runs are ranked (None:
    they are not).
    """

    label: str
    value: str
    detail: str = ""
    best: float | None = None


def overview_section(runs: Sequence[RunRecord]) -> str:
    """Key figures of one run, or a table with one row per run."""
    return _key_figures(runs[0]) if len(runs) == 1 else _comparison(runs)


def legend(runs: Sequence[RunRecord]) -> str:
    """Names and colours; with several runs each is a switch for its curves."""
    if len(runs) == 1:
        return ""
    switches = "".join(
        f'<button type="button" class="run-{i % 8}{" cycle" if i >= 8 else ""}" data-toggle="{i}" aria-pressed="true">'
        f'<i class="swatch"></i>{escape(run.name)}</button>'
        for i, run in enumerate(runs)
    )
    return f'<nav class="legend" aria-label="Show or hide runs">{switches}</nav>'


def complaints(runs: Sequence[RunRecord]) -> str:
    """What could not be read, said once at the top."""
    lines = [f"{run.name}: {complaint}" for run in runs for complaint in run.unread]
    if not lines:
        return ""
    return (
        '<ul class="complaints">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
    )


def identity(run: RunRecord) -> list[str]:
    """What was trained on what, as far as the settings tell: method, model, image size, data."""
    settings = run.settings
    described = [settings.get("method.name", "").upper(), settings.get("model", "")]
    described += [_pixels(settings.get("image_size", "")), settings.get("data", "")]
    return [text for text in described if text]


def _pixels(size: str) -> str:
    """``"[224, 224]"`` -> ``"224 px"``; ``"[96, 160]"`` -> ``"96 \N{MULTIPLICATION SIGN} 160 px"``."""
    sides = list(dict.fromkeys(re.findall(r"\d+", size)))
    return " \N{MULTIPLICATION SIGN} ".join(sides) + " px" if sides else ""


def facts(run: RunRecord) -> list[Fact]:
    """The figures of a run in the order in which they are shown."""
    found = [Fact("loss", number(run.series["loss"].last))] if "loss" in run.series else []
    found += _accuracies(run)
    if "images_per_second" in run.series:
        found.append(
            Fact(
                "samples per second", rate(float(np.median(run.series["images_per_second"].values)))
            )
        )
    if "data_wait" in run.series:
        found.append(
            Fact(
                "waiting for data", percent(100 * float(np.median(run.series["data_wait"].values)))
            )
        )
    if run.seconds is not None:
        found.append(Fact("time in training", duration(run.seconds)))
    return found


def _accuracies(run: RunRecord) -> list[Fact]:
    found = []
    for name, series in run.series.items():
        if name.endswith(".top1"):
            label = f"{title(name.removesuffix('.top1'))} top-1 in training"
            top = (
                f"best {percent(series.values.max())}" if series.values.max() > series.last else ""
            )
            found.append(Fact(label, percent(series.last), top, best=series.last))
    for name, content in run.evaluations.items():
        top1 = finite_number(content.get("top1"))
        if top1 is not None:
            found.append(Fact(f"{title(name)} top-1", percent(top1), best=top1))
    return found


def _progress(run: RunRecord) -> str:
    total = run.total_steps
    if total is None or total <= 0:
        return f'<span class="progress-text">step {whole(run.step)}</span>'
    done = min(1.0, run.step / total)
    state = "finished" if run.step >= total else f"{100 * done:.0f} % done"
    return (
        f'<span class="progress" role="img" aria-label="{100 * done:.0f} % done">'
        f'<i style="width:{100 * done:.1f}%"></i></span>'
        f'<span class="progress-text">step {whole(run.step)} of {whole(total)}</span>'
        f'<small class="state">{state}</small>'
    )


def _unbroken(label: str) -> str:
    """Escaped, and no line ends within "top-1"."""
    return escape(label).replace("top-1", '<span class="whole">top-1</span>')


def _key_figures(run: RunRecord) -> str:
    figures = "".join(
        f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}"
        + (f" <small>{escape(fact.detail)}</small>" if fact.detail else "")
        + "</dd></div>"
        for fact in facts(run)
    )
    how_far = f'<div class="how-far">{_progress(run)}</div>'
    return f'<section id="overview">{how_far}<dl class="figures">{figures}</dl></section>'


def _comparison(runs: Sequence[RunRecord]) -> str:
    by_run = [{fact.label: fact for fact in facts(run)} for run in runs]
    labels = list(dict.fromkeys(label for found in by_run for label in found))
    head = "".join(f'<th scope="col" class="number">{_unbroken(label)}</th>' for label in labels)
    rows = "".join(_comparison_row(i, run, by_run, labels) for i, run in enumerate(runs))
    return (
        '<section id="overview"><h2>Runs</h2><div class="scroll"><table class="comparison"><thead><tr>'
        f'<th scope="col">run</th><th scope="col">progress</th>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></section>"
    )


def _comparison_row(
    i: int, run: RunRecord, by_run: Sequence[Mapping[str, Fact]], labels: Sequence[str]
) -> str:
    cells = []
    for label in labels:
        fact = by_run[i].get(label)
        rivals = [
            found[label].best
            for found in by_run
            if label in found and found[label].best is not None
        ]
        best = (
            fact is not None
            and len(rivals) > 1
            and fact.best == max(r for r in rivals if r is not None)
        )
        detail = f"<small>{escape(fact.detail)}</small>" if fact is not None and fact.detail else ""
        text = NOTHING if fact is None else escape(fact.value)
        cells.append(f'<td class="number{" best" if best else ""}">{text}{detail}</td>')
    about = escape(" · ".join(identity(run)))
    return (
        f'<tr><th scope="row" class="run-{i % 8}"><i class="swatch"></i>{escape(run.name)}<small>{about}</small></th>'
        f'<td class="run-{i % 8}">{_progress(run)}</td>{"".join(cells)}</tr>'
    )
