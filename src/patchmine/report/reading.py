"""What a report needs of a run, read from its folder, which may be unfinished or damaged."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from patchmine.backbones.names import reads_clips
from patchmine.config.overrides import read_yaml
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.report.series import (
    LONGEST,
    Line,
    Series,
    clocks_of,
    finite_number,
    read_lines,
    series_of,
    short,
    steps_per_epoch_of,
)
from patchmine.runs.files import ORIGIN

SHARES = "shares"
"""eval/shares.json compares runs with parts of the labels."""

_DEEPEST = 8  # levels of settings that are shown
_EVALUATION_BYTES, _PICTURE_BYTES, _PICTURE_PIXELS = 2**20, 2**26, 2**25  # ours are smaller
_PLAIN_BYTES = 200_000  # a larger PNG is a photograph and shrinks to a tenth as WebP
_MOST_PICTURES = 12
_SAMPLE_NAME = re.compile(r"step-(\d+)\.png")


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
        clocks: ``epoch``, ``samples`` and ``seconds`` of training over its steps, where they are
            told.
        made: what origin.jsonl says: ``command``, ``device``, ``patchmine``, ``images``.
        bad_files: how many are listed.
        written: when its newest numbers were, in seconds since 1970.
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
    clocks: Mapping[str, Series] = field(default_factory=dict)
    steps_per_epoch: float | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    bad_files: int = 0
    written: float | None = None
    unread: Sequence[str] = ()

    @property
    def seconds(self) -> float | None:
        """Time spent in training, None where the folder does not tell."""
        return self.clocks["seconds"].last if "seconds" in self.clocks else None

    @property
    def is_of_clips(self) -> bool:
        """Whether it is trained on videos."""
        return reads_clips(self.settings.get("model", ""))

    @property
    def is_finished(self) -> bool | None:
        """None where the folder does not tell how long the run is."""
        return self.step >= self.total_steps if self.total_steps else None

    @property
    def seconds_left(self) -> float | None:
        """Training still to come, at its median speed; None where it is over or unknown."""
        speed, samples = self.series.get("images_per_second"), self.clocks.get("samples")
        if self.is_finished is not False or speed is None or samples is None:
            return None
        left = (self.total_steps or 0) - self.step
        median = float(np.median(speed.values))
        return left * samples.last / samples.steps[-1] / median if median > 0 else None

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
        return RunRecord(name, folder, settings, {}, found, [], 0, None, unread=tuple(unread))
    config = _read_config(folder / "config.yaml", unread)
    metrics = folder / "metrics.jsonl"
    trained, evaluated = read_lines(metrics, unread)
    steps_per_epoch = steps_per_epoch_of(trained)
    return RunRecord(
        name=name,
        path=folder,
        settings=flatten(config),
        series=series_of(trained) | series_of(evaluated),
        evaluations=_read_evaluations(folder / "eval", unread),
        samples=sorted(
            (int(match[1]), path)
            for path in folder.glob("samples/step-*.png")
            if (match := _SAMPLE_NAME.fullmatch(path.name))
        ),
        step=int(trained[-1].step) if trained else 0,
        total_steps=_total_steps(config, steps_per_epoch, trained),
        clocks=clocks_of(trained),
        steps_per_epoch=steps_per_epoch,
        made=_read_origin(folder / ORIGIN),
        bad_files=_count_lines(folder / "bad_files.txt"),
        written=metrics.stat().st_mtime if metrics.is_file() else None,
        unread=tuple(unread),
    )


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"method.mask_ratio": "0.75"}``."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = prefix + short(str(key))
        if isinstance(value, Mapping) and value and prefix.count(".") < _DEEPEST:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = short(_as_text(value))
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
        return "[" + ", ".join(_as_text(part, depth + 1) for part in value[:LONGEST]) + "]"
    if isinstance(value, Mapping) and value:
        parts = (f"{key}: {_as_text(part, depth + 1)}" for key, part in value.items())
        return "{" + ", ".join(parts) + "}"
    return json.dumps(value, default=str, ensure_ascii=False)


def _read_config(path: Path, unread: list[str]) -> dict[str, object]:
    if path.is_file():
        try:
            return {str(key): value for key, value in read_yaml(path).items()}
        except UserError:
            unread.append("config.yaml cannot be read")
    else:
        unread.append(f"config.yaml is {'no file' if path.exists() else 'missing'}")
    return {}


def _read_origin(path: Path) -> dict[str, str]:
    """How a run began, and where it went on last; nothing of runs that left no such file."""
    try:
        with foreign_parser(_UnreadableError):
            lines = [json.loads(text) for text in _small_file(path, _EVALUATION_BYTES).splitlines()]
    except _UnreadableError:
        return {}
    told = [line for line in lines if isinstance(line, dict)]
    if not told:
        return {}
    found = told[-1] | {"command": told[0].get("command")}
    return {key: value for key, value in flatten(found).items() if value != "none"}


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _total_steps(
    config: Mapping[str, object], steps_per_epoch: float | None, lines: Sequence[Line]
) -> int | None:
    """The length of the run: as set, or from the epochs that are set."""
    steps, epochs = finite_number(config.get("steps")), finite_number(config.get("epochs"))
    if steps is not None:
        return int(steps)
    if epochs is None or steps_per_epoch is None:
        return None
    return max(round(steps_per_epoch * epochs), int(lines[-1].step))


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
