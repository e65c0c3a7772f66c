"""What a report needs of a run, read from its folder, which may be unfinished or damaged."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from patchmine.config.overrides import read_yaml
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.train.log import read_line, step_of

Floats = npt.NDArray[np.float64]

SHARES = "shares"
"""eval/shares.json compares runs with parts of the labels."""

_POSITION = ("step", "epoch", "samples")
# A number beyond the largest is damage, one below the smallest 0: charts divide by any other.
_LARGEST, _SMALLEST = 1e100, 1e-100
_DEEPEST, _LONGEST = 8, 500  # levels and letters of settings that are shown
_EVALUATION_BYTES, _PICTURE_BYTES, _PICTURE_PIXELS = 2**20, 2**26, 2**25  # ours are smaller
_PLAIN_BYTES = 200_000  # a larger PNG is a photograph and shrinks to a tenth as WebP
_MOST_PICTURES = 12
_SAMPLE_NAME = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Series:
    """One quantity over training: finite ``values`` at rising ``steps``, both (N,)."""

    steps: Floats
    values: Floats

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


@dataclass(frozen=True)
class RunRecord:
    """Everything a report shows about one run.

    Args:
        name: unlike that of every other run of the report.
        path: the run folder.
        settings: dotted name to value as text.
        series: name in metrics.jsonl to values; evaluations made during training: ``knn.top1``.
        evaluations: name to the content of eval/NAME.json.
        samples: (step, picture), rising.
        step: that of the newest line.
        total_steps, steps_per_epoch: None where the folder does not tell.
        seconds: spent in training, None where the folder does not tell.
        unread: complaints about files that could not be read.
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
    unread: Sequence[str] = ()

    def pictures(self) -> list[Picture]:
        """Those made during training that can be read, of many some with the first and the last."""
        found = [embed(step, path) for step, path in choose(self.samples)]
        return [picture for picture in found if picture is not None]


class Picture(NamedTuple):
    """A picture as a data URI, with its size in pixels."""

    step: int
    uri: str
    width: int
    height: int


class _Line(NamedTuple):
    """The numbers of a line of metrics.jsonl; those of an evaluation carry its name."""

    step: float
    numbers: Mapping[str, float]
    is_evaluation: bool


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """The runs in these folders, named apart.  Raises UserError for a folder that holds no run."""
    if not paths:
        raise UserError("report needs at least one run folder, as in: patchmine report runs/hpm")
    folders = [Path(path) for path in paths]
    names = distinct_names(folders)
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many last parts as it takes to tell them apart."""
    parts = [tuple(map(shown_name, path.resolve().parts)) for path in paths]
    depth = 1
    while len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(own[-depth:]) for own in parts]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def read_run(folder: Path, name: str) -> RunRecord:
    """The run in ``folder``, or the comparison of runs, which has ``eval/shares.json`` alone.

    Raises UserError where there is neither.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder that pretrain wrote (its out=)")
    unread: list[str] = []
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        if not (folder / "eval" / f"{SHARES}.json").is_file():
            raise UserError(
                f"{folder} holds no run (neither config.yaml nor metrics.jsonl); "
                "give the folder that pretrain wrote"
            )
        found = _read_evaluations(folder / "eval", unread)
        equal = found.get(SHARES, {}).get("settings")
        settings = flatten(equal) if isinstance(equal, Mapping) else {}
        return RunRecord(name, folder, settings, {}, found, [], 0, None, None, unread=tuple(unread))
    config = _read_config(folder / "config.yaml", unread)
    trained, evaluated = _read_lines(folder / "metrics.jsonl", unread)
    steps_per_epoch = _steps_per_epoch(trained)
    return RunRecord(
        name=name,
        path=folder,
        settings=flatten(config),
        series=_series(trained) | _series(evaluated),
        evaluations=_read_evaluations(folder / "eval", unread),
        samples=sorted(
            (int(match[1]), path)
            for path in folder.glob("samples/step-*.png")
            if (match := _SAMPLE_NAME.fullmatch(path.name))
        ),
        step=int(trained[-1].step) if trained else 0,
        total_steps=_total_steps(config, steps_per_epoch, trained),
        seconds=_seconds(trained),
        steps_per_epoch=steps_per_epoch,
        unread=tuple(unread),
    )


def read_series(metrics: Path) -> tuple[dict[str, Series], float | None]:
    """The series of a metrics.jsonl as `RunRecord` has them, and the steps of an epoch."""
    trained, evaluated = _read_lines(metrics, [])
    return _series(trained) | _series(evaluated), _steps_per_epoch(trained)


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"method.mask_ratio": "0.75"}``."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = prefix + _short(str(key))
        if isinstance(value, Mapping) and value and prefix.count(".") < _DEEPEST:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = _short(_as_text(value))
    return flat


def _as_text(value: object, depth: int = 0) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | Mapping) and value and depth >= _DEEPEST:
        return "..."
    if isinstance(value, list):
        return "[" + ", ".join(_as_text(part, depth + 1) for part in value[:_LONGEST]) + "]"
    if isinstance(value, Mapping) and value:
        parts = (f"{key}: {_as_text(part, depth + 1)}" for key, part in value.items())
        return "{" + ", ".join(parts) + "}"
    return json.dumps(value, default=str, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def finite_number(value: object) -> float | None:
    """The value if it is a number that can be drawn (a switch is none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -_LARGEST < value < _LARGEST:
        return None
    return float(value) if abs(value) >= _SMALLEST else 0.0


def numbers_in(content: Mapping[str, object]) -> dict[str, float]:
    """What can be drawn of a table."""
    found = {_short(str(key)): finite_number(value) for key, value in content.items()}
    return {key: number for key, number in found.items() if number is not None}


def _read_config(path: Path, unread: list[str]) -> dict[str, object]:
    if path.is_file():
        try:
            return {str(key): value for key, value in read_yaml(path).items()}
        except UserError:
            unread.append("config.yaml cannot be read")
    else:
        unread.append(f"config.yaml is {'no file' if path.exists() else 'missing'}")
    return {}


def _read_lines(path: Path, unread: list[str]) -> tuple[list[_Line], list[_Line]]:
    """Training lines and evaluation lines, by rising step; what a kill cut through is counted."""
    trained: list[_Line] = []
    evaluated: list[_Line] = []
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


def _parse(text: bytes) -> _Line | None:
    content = read_line(text)
    step = None if content is None else step_of(content)
    if content is None or step is None:
        return None
    evaluation = content.get("eval")
    if not isinstance(evaluation, dict):
        return _Line(step, numbers_in(content), is_evaluation=False)
    name = _short(str(evaluation.pop("name", "eval")))
    evaluation.pop("step", None)
    numbers = {f"{name}.{key}": value for key, value in numbers_in(evaluation).items()}
    return _Line(step, numbers, is_evaluation=True)


def _drop_from(step: float, lines: list[_Line]) -> None:
    while lines and lines[-1].step >= step:
        lines.pop()


def _series(lines: Sequence[_Line]) -> dict[str, Series]:
    points: dict[str, dict[float, float]] = {}
    for line in lines:
        for name, value in line.numbers.items():
            points.setdefault(name, {})[line.step] = value  # of two at one step the later counts
    return {
        name: Series(*np.asarray(sorted(found.items()), dtype=np.float64).T)
        for name, found in points.items()
        if name not in _POSITION
    }


def _seconds(lines: Sequence[_Line]) -> float | None:
    """Time spent in training, from the samples seen and the rate at which they were seen."""
    total, seen = 0.0, 0.0
    for line in lines:
        rate, samples = line.numbers.get("images_per_second", 0.0), line.numbers.get("samples")
        if samples is not None and rate > 0:
            total += max(0.0, samples - seen) / rate
            seen = samples
    return total or None


def _total_steps(
    config: Mapping[str, object], steps_per_epoch: float | None, lines: Sequence[_Line]
) -> int | None:
    """The length of the run: as set, or from the epochs that are set."""
    steps, epochs = finite_number(config.get("steps")), finite_number(config.get("epochs"))
    if steps is not None:
        return int(steps)
    if epochs is None or steps_per_epoch is None:
        return None
    return max(round(steps_per_epoch * epochs), int(lines[-1].step))


def _steps_per_epoch(lines: Sequence[_Line]) -> float | None:
    epoch = lines[-1].numbers.get("epoch") if lines else None
    if not epoch:
        return None
    if not epoch.is_integer():
        return lines[-1].step / epoch
    # Whole epochs only: the first line of the newest one is late by an interval at the most.
    return next(line.step for line in lines if line.numbers.get("epoch") == epoch) / epoch


class _UnreadableError(Exception):
    """A file that does not hold what its name says."""


def _small_file(path: Path, most_bytes: int) -> bytes:
    """The content of a file that is no larger; opening a pipe would wait for ever."""
    if not path.is_file() or path.stat().st_size > most_bytes:
        raise _UnreadableError
    return path.read_bytes()


def _read_evaluations(folder: Path, unread: list[str]) -> dict[str, Mapping[str, object]]:
    found: dict[str, Mapping[str, object]] = {}
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            with foreign_parser(_UnreadableError):
                content = json.loads(_small_file(path, _EVALUATION_BYTES))
        except _UnreadableError:
            content = None
        if isinstance(content, dict):
            found[shown_name(path.stem)] = content
        else:
            unread.append(f"eval/{shown_name(path.name)} cannot be read")
    return found


def choose(
    samples: Sequence[tuple[int, Path]], most: int = _MOST_PICTURES
) -> list[tuple[int, Path]]:
    """At most ``most`` of the pictures, evenly spread, the first and the last included."""
    if len(samples) <= most:
        return list(samples)
    return [samples[round(k * (len(samples) - 1) / (most - 1))] for k in range(most)]


def embed(step: int, path: Path) -> Picture | None:
    """A picture, packed smaller where it is a photograph; None for a file that is no picture."""
    try:
        with foreign_parser(_UnreadableError):
            raw = _small_file(path, _PICTURE_BYTES)
            with Image.open(io.BytesIO(raw)) as picture:
                if math.prod(picture.size) > _PICTURE_PIXELS:
                    return None
                picture.load()
                kind, (width, height) = (picture.format or "png").lower(), picture.size
                packed = io.BytesIO()
                if len(raw) > _PLAIN_BYTES:
                    picture.convert("RGB").save(packed, "WEBP", quality=88)
    except _UnreadableError:
        return None
    if 0 < packed.tell() < len(raw):
        kind, raw = "webp", packed.getvalue()
    content = base64.b64encode(raw).decode("ascii")
    return Picture(step, f"data:image/{kind};base64,{content}", width, height)
