"""The numbers of a metrics.jsonl as series over training; whatever is damaged is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from patchmine.train.log import read_line, step_of

Floats = npt.NDArray[np.float64]

_POSITION = ("step", "epoch", "samples")
# A number beyond the largest is damage, one below the smallest 0: charts divide by any other.
_LARGEST, _SMALLEST = 1e100, 1e-100
LONGEST = 500  # letters of a name or a value that are shown


@dataclass(frozen=True)
class Series:
    """One quantity over training: finite ``values`` at rising ``steps``, both (N,)."""

    steps: Floats
    values: Floats

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


class Line(NamedTuple):
    """The numbers of a line of metrics.jsonl; those of an evaluation carry its name."""

    step: float
    numbers: Mapping[str, float]
    is_evaluation: bool


def read_series(metrics: Path) -> tuple[dict[str, Series], float | None]:
    """The series of a metrics.jsonl as `RunRecord` has them, and the steps of an epoch."""
    trained, evaluated = read_lines(metrics, [])
    return series_of(trained) | series_of(evaluated), steps_per_epoch_of(trained)


def short(text: str) -> str:
    """The text, or its beginning where it is longer than anything that is shown."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def finite_number(value: object) -> float | None:
    """The value if it is a number that can be drawn (a switch is none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -_LARGEST < value < _LARGEST:
        return None
    return float(value) if abs(value) >= _SMALLEST else 0.0


def numbers_in(content: Mapping[str, object]) -> dict[str, float]:
    """What can be drawn of a table."""
    found = {short(str(key)): finite_number(value) for key, value in content.items()}
    return {key: number for key, number in found.items() if number is not None}


def read_lines(path: Path, unread: list[str]) -> tuple[list[Line], list[Line]]:
    """Training lines and evaluation lines, by rising step; what a kill cut through is counted."""
    trained: list[Line] = []
    evaluated: list[Line] = []
    if not path.is_file():
        unread.append("metrics.jsonl is missing")
        return trained, evaluated
    broken = 0
    with path.open("rb") as file:
        for text in file:
            line = _parse(text)
            if line is None:
                broken += bool(text.strip())
            elif line.is_evaluation:
                evaluated.append(line)
            else:
                # A resumed run writes the steps after its checkpoint again: the newest ones count.
                _drop_from(line.step, trained)
                _drop_from(line.step, evaluated)
                trained.append(line)
    if broken:
        unread.append(f"metrics.jsonl: {broken} unreadable line{'s' if broken > 1 else ''} skipped")
    return trained, evaluated


def _parse(text: bytes) -> Line | None:
    content = read_line(text)
    step = None if content is None else step_of(content)
    if content is None or step is None:
        return None
    evaluation = content.get("eval")
    if not isinstance(evaluation, dict):
        return Line(step, numbers_in(content), is_evaluation=False)
    name = short(str(evaluation.pop("name", "eval")))
    evaluation.pop("step", None)
    numbers = {f"{name}.{key}": value for key, value in numbers_in(evaluation).items()}
    return Line(step, numbers, is_evaluation=True)


def _drop_from(step: float, lines: list[Line]) -> None:
    while lines and lines[-1].step >= step:
        lines.pop()


def series_of(lines: Sequence[Line]) -> dict[str, Series]:
    """The numbers of lines as series by name, without those that say where they are."""
    points: dict[str, dict[float, float]] = {}
    for line in lines:
        for name, value in line.numbers.items():
            points.setdefault(name, {})[line.step] = value  # of two at one step the later counts
    return {
        name: Series(*np.asarray(sorted(found.items()), dtype=np.float64).T)
        for name, found in points.items()
        if name not in _POSITION
    }


def clocks_of(lines: Sequence[Line]) -> dict[str, Series]:
    """How far training was at its steps: ``epoch``, ``samples`` and ``seconds`` spent in it.

    The seconds come of the samples seen and the rate at which they were seen.
    """
    found: dict[str, dict[float, float]] = {"epoch": {}, "samples": {}, "seconds": {}}
    total, seen = 0.0, 0.0
    for line in lines:
        for name in ("epoch", "samples"):
            if name in line.numbers:
                found[name][line.step] = line.numbers[name]
        rate, samples = line.numbers.get("images_per_second", 0.0), line.numbers.get("samples")
        if samples is not None and rate > 0:
            total += max(0.0, samples - seen) / rate
            seen = samples
            found["seconds"][line.step] = total
    return {
        name: Series(*np.asarray(sorted(each.items()), dtype=np.float64).T)
        for name, each in found.items()
        if each and max(each.values()) > 0
    }


def steps_per_epoch_of(lines: Sequence[Line]) -> float | None:
    """As far as the newest line tells."""
    epoch = lines[-1].numbers.get("epoch") if lines else None
    if not epoch:
        return None
    if not epoch.is_integer():
        return lines[-1].step / epoch
    # Whole epochs only: the first line of the newest one is late by an interval at the most.
    return next(line.step for line in lines if line.numbers.get("epoch") == epoch) / epoch
