"""The part of a report that shows eval/NAME.json of every run: accuracies as bars, and the floors
below them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from patchmine.report.reading import RunRecord, finite_number, flatten
from patchmine.report.words import NOTHING, number, percent, points, title


@dataclass(frozen=True)
class Result:
    """One evaluation of one run.

    Accuracies in percent, ``floors`` name -> top-1.  ``measures``: the numbers of an evaluation
    that has no accuracy.  ``notes``: sentences for the reader.  ``conditions``: how it was made.
    """

    run: int
    name: str
    top1: float | None
    top5: float | None
    floors: Mapping[str, float]
    measures: Mapping[str, float]
    notes: Sequence[str]
    conditions: Mapping[str, str]


def evaluations_section(runs: Sequence[RunRecord]) -> str:
    """One table per evaluation, all bars on one scale; nothing where no run was evaluated."""
    by_name: dict[str, list[Result]] = {}
    for i, run in enumerate(runs):
        for name, content in run.evaluations.items():
            by_name.setdefault(name, []).append(read_result(i, run.name, content))
    if not by_name:
        return ""
    everything = [result for results in by_name.values() for result in results]
    accuracies = [
        value for r in everything for value in (r.top1, *r.floors.values()) if value is not None
    ]
    scale = min(100.0, 10.0 * math.ceil(max(accuracies, default=0.0) * 1.05 / 10)) or 100.0
    columns = max(len(_floors(results)) for results in by_name.values())
    tables = [_table(name, results, scale, columns) for name, results in sorted(by_name.items())]
    return '<section id="evaluations"><h2>Evaluation</h2>' + "".join(tables) + "</section>"


def _floors(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(floor for result in results for floor in result.floors))


def read_result(run: int, name: str, content: Mapping[str, object]) -> Result:
    """The numbers of an eval/NAME.json, whatever else it holds."""
    top1 = finite_number(content.get("top1"))
    floors = content.get("floors")
    found = {}
    for floor, accuracies in floors.items() if isinstance(floors, Mapping) else ():
        accuracy = (
            finite_number(accuracies.get("top1")) if isinstance(accuracies, Mapping) else None
        )
        if accuracy is not None:
            found[str(floor)] = accuracy
    rest = {
        key: value
        for key, value in content.items()
        if key not in ("name", "top1", "top5", "floors", "notes")
    }
    notes = content.get("notes")
    said = [str(note) for note in notes] if isinstance(notes, list) else []
    measures = (
        {}
        if top1 is not None
        else {k: n for k, value in rest.items() if (n := finite_number(value)) is not None}
    )
    conditions = flatten({key: value for key, value in rest.items() if key not in measures})
    return Result(
        run, name, top1, finite_number(content.get("top5")), found, measures, said, conditions
    )


def _table(name: str, results: Sequence[Result], scale: float, columns: int) -> str:
    """``columns``: how many floors the widest table has, so that the tables stand in line."""
    measures = list(dict.fromkeys(key for result in results for key in result.measures))
    floors = _floors(results)
    if measures:
        head = "".join(
            f'<th scope="col" class="number">{escape(_spoken(key))}</th>' for key in measures
        )
        rows = [_start(result) + _measures(result, measures) for result in results]
    else:
        spare = '<td class="number"></td>' * (columns - len(floors))
        head = _accuracy_head(floors, scale) + spare
        rows = [_start(result) + _accuracies(result, floors, scale) + spare for result in results]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="evaluation" id="eval-{escape(name)}">'
        f'<caption>{escape(title(name))}</caption><thead><tr><th scope="col">run</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{_notes(results)}{_conditions(results)}"
    )


def _start(result: Result) -> str:
    return f'<th scope="row" class="run-{result.run % 8}"><i class="swatch"></i>{escape(result.name)}</th>'


def _measures(result: Result, measures: Sequence[str]) -> str:
    return "".join(
        f'<td class="number">{number(result.measures.get(key, math.nan))}</td>' for key in measures
    )


def _accuracy_head(floors: Sequence[str], scale: float) -> str:
    cells = [
        '<th scope="col" class="number">top-1</th>',
        f'<th scope="col" class="bar-cell"><span>0</span><span>{scale:g} %</span></th>',
        '<th scope="col" class="number">top-5</th>',
    ]
    for k, floor in enumerate(floors):
        mark = f'<i class="floor floor-{k % 3}"></i>'
        cells.append(f'<th scope="col" class="number">{mark}{escape(_spoken(floor))}</th>')
    return "".join(cells)


def _accuracies(result: Result, floors: Sequence[str], scale: float) -> str:
    cells = [
        f'<td class="number main">{_accuracy(result.top1)}</td>',
        f'<td class="bar-cell">{_bar(result, floors, scale)}</td>',
        f'<td class="number">{_accuracy(result.top5)}</td>',
    ]
    for floor in floors:
        value = result.floors.get(floor)
        gain = ""
        if value is not None and result.top1 is not None:
            gain = f'<small class="gain">{points(result.top1 - value)} points</small>'
        cells.append(f'<td class="number">{_accuracy(value)}{gain}</td>')
    return "".join(cells)


def _notes(results: Sequence[Result]) -> str:
    """What the reader has to know, once where all runs agree."""
    said: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            said.setdefault(note, []).append(result.name)
    lines = [
        note if len(names) == len(results) else f"{', '.join(names)}: {note}"
        for note, names in said.items()
    ]
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _conditions(results: Sequence[Result]) -> str:
    """How it was measured, as a table that opens on demand."""
    names = list(dict.fromkeys(name for result in results for name in result.conditions))
    if not names:
        return ""
    head = "".join(f'<th scope="col">{escape(result.name)}</th>' for result in results)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(result.conditions.get(name, NOTHING))}</td>" for result in results)
        + "</tr>"
        for name in names
    )
    return (
        '<details class="numbers conditions"><summary>how it was measured</summary><div class="scroll"><table>'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _accuracy(value: float | None) -> str:
    return NOTHING if value is None else percent(value)


def _bar(result: Result, floors: Sequence[str], scale: float) -> str:
    spoken = [f"{percent(result.top1)} top-1"] if result.top1 is not None else []
    spoken += [
        f"{_spoken(floor)} {percent(result.floors[floor])}"
        for floor in floors
        if floor in result.floors
    ]
    marks = "".join(
        f'<i class="floor floor-{k % 3}" style="left:{_along(result.floors[floor], scale):.2f}%"></i>'
        for k, floor in enumerate(floors)
        if floor in result.floors
    )
    width = 0.0 if result.top1 is None else _along(result.top1, scale)
    return (
        f'<span class="bar run-{result.run % 8}" role="img" aria-label="{escape("; ".join(spoken))}">'
        f'<i class="fill" style="width:{width:.2f}%"></i>{marks}</span>'
    )


def _along(value: float, scale: float) -> float:
    return 100 * min(1.0, max(0.0, value / scale)) if scale else 0.0
