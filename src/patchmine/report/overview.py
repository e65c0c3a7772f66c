"""How far the runs are and how they did, in figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchmine.report import words
from patchmine.report.reading import RunRecord
from patchmine.report.results import read_result
from patchmine.report.series import finite_number

HEADLINES = ("top1", "miou", "map", "mask_map")
"""The scores that runs are told by."""

_KINDS = {"classify": "fine-tuned", "segment": "segmentation", "detect": "detection"}


@dataclass(frozen=True)
class Fact:
    """One figure of a run; ``best`` is the number by which runs are ranked (None: they are not)."""

    label: str
    value: str
    detail: str = ""
    best: float | None = None


@dataclass(frozen=True)
class Overview:
    """A run at the top of the page.

    ``leads``: labels of the figures in which no run is better.  ``left``: when it will be done.
    ``made``: how and where, by what it says; ``command``: what was typed.
    """

    name: str
    about: str
    step: int
    total: int | None
    facts: Mapping[str, Fact]
    leads: Collection[str]
    left: str
    made: Mapping[str, str]
    command: str | None

    @property
    def done(self) -> float:
        """How far the run is, in percent."""
        return 100 * min(1.0, self.step / self.total) if self.total else 0.0


def overviews(runs: Sequence[RunRecord]) -> list[Overview]:
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
            left=_left(run),
            made=made_of(run),
            command=run.made.get("command"),
        )
        for run, own in zip(runs, facts, strict=True)
    ]


def _about(settings: Mapping[str, str]) -> str:
    """What was trained on what, as far as the settings tell: method, model, image size, data."""
    sides = list(dict.fromkeys(re.findall(r"\d+", settings.get("image_size", ""))))
    size = " \N{MULTIPLICATION SIGN} ".join(sides) + " px" if sides else ""
    method, model, data = (settings.get(name, "") for name in ("method.name", "model", "data"))
    what = (words.method(method) if method else "") or _KINDS.get(settings.get("kind", ""), "")
    return " · ".join(text for text in (what, model, size, data) if text)


def _left(run: RunRecord) -> str:
    """How long the rest takes, and from when that is, as a run that has ended says nothing more."""
    if run.seconds_left is None:
        return ""
    text = f"about {words.duration(run.seconds_left)} of training left"
    if run.written is None:
        return text
    return f"{text}; newest numbers of {words.moment(run.written)}"


def made_of(run: RunRecord) -> dict[str, str]:
    """How and where a run was made, as far as it says; earlier versions did not."""
    made = run.made
    images = made.get("images", "")
    version = [made[key] for key in ("patchmine",) if key in made]
    version += [f"torch {made['torch']}"] if "torch" in made else []
    noun = "videos" if run.is_of_clips else "images"
    found = {
        "device": " · ".join(made[key] for key in ("device", "precision") if key in made),
        "patchmine": " · ".join(version),
        noun: words.whole(float(images)) if images.isdigit() else "",
        f"broken {noun} left out": words.whole(run.bad_files) if run.made or run.bad_files else "",
    }
    return {label: text for label, text in found.items() if text}


def facts_of(run: RunRecord) -> list[Fact]:
    """The figures of a run in the order in which they are shown."""
    found = [Fact("loss", words.number(run.series["loss"].last))] if "loss" in run.series else []
    found += _scores_of(run)
    speed, wait = (run.series.get(name) for name in ("images_per_second", "data_wait"))
    if speed is not None:
        found.append(Fact("samples/s", words.rate(float(np.median(speed.values)))))
    if wait is not None:
        share = 100 * float(np.median(wait.values))
        found.append(Fact("waiting for data", words.percent(share)))
    if run.seconds is not None:
        found.append(Fact("time in training", words.duration(run.seconds)))
    return found


def _scores_of(run: RunRecord) -> Iterator[Fact]:
    """How well it does, on its way and when it was evaluated."""
    for name, series in run.series.items():
        protocol, _, quantity = name.partition(".")
        if quantity in HEADLINES:
            label = f"{words.title(protocol)} {words.score(quantity)} in training"
            top, last = float(series.values.max()), series.last
            detail = f"best {words.percent(top)}" if top > last else ""
            yield Fact(label, words.percent(last), detail, best=last)
    for name, content in run.evaluations.items():
        for quantity in HEADLINES:
            value = finite_number(content.get(quantity))
            if value is not None:
                label = f"{words.title(name)} {words.score(quantity)}"
                before = read_result(0, name, content).baselines.get("start")
                detail = f"{words.percent(before)} at the start" if before is not None else ""
                yield Fact(label, words.percent(value), detail, best=value)
