"""The results of eval/NAME.json: numbers with their baselines, by protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from patchmine.report import words
from patchmine.report.classes import ByClass, take_classes
from patchmine.report.reading import SHARES, RunRecord, flatten
from patchmine.report.series import finite_number, numbers_in


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


def evaluations_of(runs: Sequence[RunRecord]) -> list[Evaluation]:
    """All evaluations of the runs by name."""
    by_name: dict[str, list[Result]] = {}
    for i, run in enumerate(runs):
        for name, content in run.evaluations.items():
            if name == SHARES:
                continue  # the verdict, which the page opens with
            by_name.setdefault(name, []).append(read_result(i, run.name, content))
    return [
        Evaluation(
            name=name,
            results=results,
            baselines=union(result.baselines for result in results),
            measures=union(line for result in results for _, line in result.lines),
            conditions=union(result.conditions for result in results),
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
    top1, top5 = (finite_number(rest.pop(key, None)) for key in ("top1", "top5"))
    older, notes = rest.pop("floors", None), rest.pop("notes", None)  # the older name of baselines
    baselines = rest.pop("baselines", older)
    accuracies = {
        str(key): finite_number(scores.get("top1"))
        for key, scores in (baselines.items() if isinstance(baselines, Mapping) else ())
        if isinstance(scores, Mapping)
    }
    measures = numbers_in(rest) if top1 is None else {}
    return Result(
        run=run,
        name=name,
        top1=top1,
        top5=top5,
        baselines={key: value for key, value in accuracies.items() if value is not None},
        measures=measures,
        notes=[str(note) for note in notes] if isinstance(notes, list) else [],
        conditions=flatten({key: value for key, value in rest.items() if key not in measures}),
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


def end_of_bars(evaluations: Sequence[Evaluation]) -> float:
    """The accuracy at which the bars of all evaluations end, in percent."""
    results = [result for evaluation in evaluations for result in evaluation.results]
    shown = [value for result in results for value in (result.top1, *result.baselines.values())]
    largest = max((value for value in shown if value is not None), default=0.0)
    end = min(100.0, 10.0 * math.ceil(largest * 1.05 / 10))
    return end if end > 0 else 100.0


def union(tables: Iterable[Iterable[str]]) -> list[str]:
    """All keys in the order in which they come up."""
    return list(dict.fromkeys(chain.from_iterable(tables)))
