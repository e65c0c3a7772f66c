"""What a report needs to know about a run, read from its folder and from nothing else.

The folder may belong to a run that is still going, was killed in the middle of a line, or never had
labels: whatever is missing is left out, and only a folder that is no run at all is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from patchmine.config.overrides import read_yaml
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.train.log import read_line, step_of

Floats = npt.NDArray[np.float64]

_POSITION = ("step", "epoch", "samples")
_LARGEST, _SMALLEST = (
    1e100,
    1e-100,
)  # beyond it a number is damage, below it 0: charts can divide by any other
_DEEPEST, _LONGEST = 8, 500  # of settings and conditions, levels and letters that are shown
_EVALUATION_BYTES = 2**20
_SAMPLE_NAME = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Series:
    """One quantity over training: ``values`` at ``steps``, both (N,) float64, steps rising, values
    finite.
    """

    steps: Floats
    values: Floats

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


def in_percent(series: Series) -> Series:
    """Shares of one as percentages."""
    return Series(series.steps, 100 * series.values)


@dataclass(frozen=True)
class RunRecord:
    """Everything a report shows about one run.

    ``settings``: dotted name -> value as text.  ``series``: name in metrics.jsonl -> values; those
    of evaluations made during training are called ``knn.top1``.  ``evaluations``: name -> content
    of eval/NAME.json.  ``samples``: (step, picture), rising.  ``total_steps`` and
    ``steps_per_epoch`` are None where the folder does not tell.  ``unread``: complaints about files
    that could not be read.
    """

    name: str
    path: Path
    settings: Mapping[str, str]
    series: Mapping[str, Series]
    evaluations: Mapping[str, Mapping[str, object]]
    samples: Sequence[tuple[int, Path]]
    step: int
    total_steps: int | None
    seconds: float | None
    steps_per_epoch: float | None = None
    unread: Sequence[str] = field(default_factory=tuple)


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """The runs in these folders, named apart.  Raises UserError for a folder that holds no run."""
    if not paths:
        raise UserError(
            "report needs at least one run folder, for example: patchmine report runs/hpm"
        )
    folders = [Path(path) for path in paths]
    return [
        read_run(folder, name)
        for folder, name in zip(folders, distinct_names(folders), strict=True)
    ]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many last parts as it takes to tell the folders apart."""
    parts = [tuple(map(shown_name, folder.resolve().parts)) for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def read_run(folder: Path, name: str) -> RunRecord:
    """The run in ``folder``.  Raises UserError when there is neither config.yaml nor metrics.jsonl."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder that pretrain wrote (its out=)")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} holds no run (neither config.yaml nor metrics.jsonl); give the folder that pretrain wrote"
        )
    unread: list[str] = []
    config = _read_config(folder / "config.yaml", unread)
    trained, evaluated = _keep_newest(_read_lines(folder / "metrics.jsonl", unread))
    return RunRecord(
        name=name,
        path=folder,
        settings=flatten(config),
        series=_series(trained) | _series(evaluated),
        evaluations=_read_evaluations(folder / "eval", unread),
        samples=_find_samples(folder / "samples"),
        step=int(trained[-1].step) if trained else 0,
        total_steps=_total_steps(config, trained),
        seconds=_seconds(trained),
        steps_per_epoch=_steps_per_epoch(trained),
        unread=tuple(unread),
    )


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"method.mask_ratio": "0.75"}``."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and prefix.count(".") < _DEEPEST:
            flat |= flatten(value, f"{prefix}{_short(str(key))}.")
        else:
            flat[f"{prefix}{_short(str(key))}"] = _short(_as_text(value))
    return flat


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _as_text(value: object, depth: int = 0) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | Mapping) and value and depth >= _DEEPEST:
        return "..."
    if isinstance(value, list):
        return "[" + ", ".join(_as_text(part, depth + 1) for part in value[:_LONGEST]) + "]"
    if isinstance(value, Mapping) and value:
        return (
            "{"
            + ", ".join(f"{key}: {_as_text(part, depth + 1)}" for key, part in value.items())
            + "}"
        )
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _read_config(path: Path, unread: list[str]) -> dict[str, object]:
    if not path.exists():
        unread.append("config.yaml is missing")
    elif path.is_file():
        try:
            return {str(key): value for key, value in read_yaml(path).items()}
        except UserError:
            unread.append("config.yaml cannot be read")
    else:
        unread.append("config.yaml is no file")
    return {}


@dataclass(frozen=True)
class _Line:
    """One line of metrics.jsonl: what was measured at a step, in training or in an evaluation made
    meanwhile.
    """

    step: float
    numbers: Mapping[str, float]
    evaluation: bool


def _read_lines(path: Path, unread: list[str]) -> Iterator[_Line]:
    """The lines of a metrics file that can be read; what a kill cut through is counted and skipped."""
    if not path.is_file():
        unread.append("metrics.jsonl is missing")
        return
    broken = 0
    with path.open("rb") as file:
        for text in file:
            line = _parse(text)
            if line is not None:
                yield line
            elif text.strip():
                broken += 1
    if broken:
        unread.append(f"metrics.jsonl: {broken} unreadable line{'s' if broken > 1 else ''} skipped")


def _parse(text: bytes) -> _Line | None:
    content = read_line(text)
    step = None if content is None else step_of(content)
    if content is None or step is None:
        return None
    evaluation = content.get("eval")
    if not isinstance(evaluation, dict):
        return _Line(step, _numbers(content), evaluation=False)
    name = _short(str(evaluation.get("name", "eval")))
    numbers = {
        f"{name}.{key}": value for key, value in _numbers(evaluation).items() if key != "step"
    }
    return _Line(step, numbers, evaluation=True)


def finite_number(value: object) -> float | None:
    """The value if it is a number that can be drawn (a switch is none)."""
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not -_LARGEST < value < _LARGEST
    ):
        return None
    return float(value) if abs(value) >= _SMALLEST else 0.0


def _numbers(content: Mapping[str, object]) -> dict[str, float]:
    return {
        _short(key): number
        for key, value in content.items()
        if (number := finite_number(value)) is not None
    }


def _keep_newest(lines: Iterator[_Line]) -> tuple[list[_Line], list[_Line]]:
    """Training lines and evaluation lines, by rising step.

    A resumed run starts again from its checkpoint and so writes some steps a second time: a
    training step that is not above the last one takes back what was written from there on.
    """
    trained: list[_Line] = []
    evaluated: list[_Line] = []
    for line in lines:
        if not line.evaluation:
            _drop_from(line.step, trained)
            _drop_from(line.step, evaluated)
        (evaluated if line.evaluation else trained).append(line)
    return trained, evaluated


def _drop_from(step: float, lines: list[_Line]) -> None:
    while lines and lines[-1].step >= step:
        lines.pop()


def _series(lines: Sequence[_Line]) -> dict[str, Series]:
    """Name -> series.  Of two values at one step the later counts."""
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        for name, value in line.numbers.items():
            found.setdefault(name, {})[line.step] = value
    series = {}
    for name, points in found.items():
        if name not in _POSITION:
            steps = np.asarray(sorted(points), dtype=np.float64)
            series[name] = Series(
                steps, np.asarray([points[step] for step in steps], dtype=np.float64)
            )
    return series


def _seconds(lines: Sequence[_Line]) -> float | None:
    """Time spent in training, from the images seen and the rate at which they were seen."""
    total, seen = 0.0, 0.0
    for line in lines:
        rate, samples = line.numbers.get("images_per_second", 0.0), line.numbers.get("samples")
        if samples is None or rate <= 0:
            continue
        total += max(0.0, samples - seen) / rate
        seen = samples
    return total or None


def _total_steps(config: Mapping[str, object], lines: Sequence[_Line]) -> int | None:
    """The length of the run: as set, or from the epochs that are set and those that were made so
    far.
    """
    steps, epochs = finite_number(config.get("steps")), finite_number(config.get("epochs"))
    if steps is not None:
        return int(steps)
    per_epoch = _steps_per_epoch(lines)
    if epochs is None or per_epoch is None:
        return None
    return max(round(per_epoch * epochs), int(lines[-1].step))


def _steps_per_epoch(lines: Sequence[_Line]) -> float | None:
    epoch = lines[-1].numbers.get("epoch") if lines else None
    if not epoch:
        return None
    if not epoch.is_integer():
        return lines[-1].step / epoch
    # Whole epochs only: the first line of the newest one is late by an interval at the most.
    return next(line.step for line in lines if line.numbers.get("epoch") == epoch) / epoch


def _read_evaluations(folder: Path, unread: list[str]) -> dict[str, Mapping[str, object]]:
    found: dict[str, Mapping[str, object]] = {}
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            found[shown_name(path.stem)] = _read_evaluation(path)
        except _UnreadableError:
            unread.append(f"eval/{shown_name(path.name)} cannot be read")
    return found


class _UnreadableError(Exception):
    """A file of evaluations that holds none."""


def _read_evaluation(path: Path) -> Mapping[str, object]:
    with foreign_parser(_UnreadableError, _UnreadableError):
        if not path.is_file() or path.stat().st_size > _EVALUATION_BYTES:
            raise _UnreadableError("it is no file of results")
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise _UnreadableError("it holds no table of results")
    return content


def _find_samples(folder: Path) -> list[tuple[int, Path]]:
    found = [
        (int(match[1]), path)
        for path in folder.glob("step-*.png")
        if (match := _SAMPLE_NAME.fullmatch(path.name))
    ]
    return sorted(found)
