"""What a report needs to know about a run, read from its folder and from nothing else.

The folder may belong to a run that is still going, was killed in the middle of a line, or never had labels: whatever is
missing is left out, and only a folder that is no run at all is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from patchmine.errors import UserError

Floats = npt.NDArray[np.float64]

_POSITION = ("step", "epoch", "samples")
_SAMPLE_NAME = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Series:
    """One quantity over training: ``values`` at ``steps``, both (N,) float64, steps rising, values finite."""

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

    ``settings``: dotted name -> value as text.  ``series``: name in metrics.jsonl -> values; those of evaluations made
    during training are called ``knn.top1``.  ``evaluations``: name -> content of eval/NAME.json.  ``samples``: (step,
    picture), rising.  ``total_steps`` is None where the folder does not tell.  ``unread``: complaints about files that
    could not be read.
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
    unread: Sequence[str] = field(default_factory=tuple)


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """The runs in these folders, named apart.  Raises UserError for a folder that holds no run."""
    if not paths:
        raise UserError("report needs at least one run folder, for example: patchmine report runs/hpm")
    folders = [Path(path) for path in paths]
    return [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many last parts as it takes to tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
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
        unread=tuple(unread),
    )


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"method.mask_ratio": "0.75"}``."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _as_text(value)
    return flat


def _as_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(_as_text(part) for part in value) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _read_config(path: Path, unread: list[str]) -> dict[str, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unread.append("config.yaml is missing")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        unread.append("config.yaml cannot be read")
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


@dataclass(frozen=True)
class _Line:
    """One line of metrics.jsonl: what was measured at a step, in training or in an evaluation made meanwhile."""

    step: float
    numbers: Mapping[str, float]
    evaluation: bool


def _read_lines(path: Path, unread: list[str]) -> Iterator[_Line]:
    """The lines of a metrics file that can be read; what a kill cut through is counted and skipped."""
    if not path.is_file():
        unread.append("metrics.jsonl is missing")
        return
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            line = _parse(text)
            if line is not None:
                yield line
            elif text.strip():
                broken += 1
    if broken:
        unread.append(f"metrics.jsonl: {broken} unreadable line{'s' if broken > 1 else ''} skipped")


def _parse(text: str) -> _Line | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    evaluation = content.get("eval")
    if isinstance(evaluation, dict):
        numbers = {
            f"{evaluation.get('name', 'eval')}.{key}": value
            for key, value in _numbers(evaluation).items()
            if key != "step"
        }
        step = _number(content.get("step", evaluation.get("step")))
        return None if step is None else _Line(step, numbers, evaluation=True)
    step = _number(content.get("step"))
    return None if step is None else _Line(step, _numbers(content), evaluation=False)


def _number(value: object) -> float | None:
    """The value if it is a finite number (a switch is none)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _numbers(content: Mapping[str, object]) -> dict[str, float]:
    return {key: number for key, value in content.items() if (number := _number(value)) is not None}


def _keep_newest(lines: Iterator[_Line]) -> tuple[list[_Line], list[_Line]]:
    """Training lines and evaluation lines, by rising step.

    A resumed run starts again from its checkpoint and so writes some steps a second time: a training step that is not
    above the last one takes back what was written from there on.
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
            series[name] = Series(steps, np.asarray([points[step] for step in steps], dtype=np.float64))
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
    """The length of the run: as set, or from the epochs that are set and those that were made so far."""
    steps, epochs = _number(config.get("steps")), _number(config.get("epochs"))
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
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if isinstance(content, dict):
            found[path.stem] = content
        else:
            unread.append(f"eval/{path.name} cannot be read")
    return found


def _find_samples(folder: Path) -> list[tuple[int, Path]]:
    found = [
        (int(match[1]), path) for path in folder.glob("step-*.png") if (match := _SAMPLE_NAME.fullmatch(path.name))
    ]
    return sorted(found)
