"""What a run says while it trains: metrics.jsonl, TensorBoard, wandb, and what a person sees.

Only metrics.jsonl is worth stopping for: whatever fails at the others is said once, and training
goes on without them.

``Meter`` is the only place where a training tensor is read: every ``log_every`` steps, and at a few
steps between which lie ever further apart.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from patchmine.errors import Say, UserError, foreign_parser
from patchmine.system.disk import remedy, replacing
from patchmine.train.display import Display, minutes

if TYPE_CHECKING:
    from rich.console import Console

MOST_STEPS = 2**53  # beyond it a number in a file is no count of steps
DAMAGED = "metrics.damaged.jsonl"


class Meter:
    """Means of 0-d tensors over an interval, summed on the device; only what is finite counts."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one more value of each name.  All processes must add the same names."""
        now = torch.stack([value.detach().float() for value in values.values()])  # (K,)
        finite = now.isfinite()
        counted = torch.stack([now.where(finite, 0.0), finite.float()])  # (2, K)
        names = tuple(values)
        held = self._sums.get(names)
        self._sums[names] = counted if held is None else held + counted

    def read(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last reading; ``mean`` averages a tensor over processes.  This waits for
        the device.
        """
        found = self.glance(mean)
        self._sums = {}
        return found

    def glance(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The same, and the interval goes on.  This waits for the device."""
        if not self._sums:
            return {}
        names = [name for group in self._sums for name in group]
        sums, counts = mean(torch.cat(list(self._sums.values()), dim=1)).tolist()
        totals: dict[str, tuple[float, float]] = {}
        for name, total, count in zip(names, sums, counts, strict=True):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + total, before[1] + count
        return {
            name: total / count if count else math.nan for name, (total, count) in totals.items()
        }


class Interval(NamedTuple):
    """Steps, the seconds that they took, and of these the seconds of waiting for data and of
    computing losses: both are a process's own, while in the rest it may wait for others.
    """

    steps: int
    seconds: float
    waited: float
    computed: float

    def since(self, other: Interval) -> Interval:
        """What came to this after ``other``; of the seconds at least a moment."""
        steps, seconds, *rest = (mine - theirs for mine, theirs in zip(self, other, strict=True))
        return Interval(int(steps), max(seconds, 1e-9), *rest)


_BEGINNING = Interval(0, 0.0, 0.0, 0.0)


class Stopwatch:
    """Steps and seconds since the last reading, pauses not counted."""

    def __init__(self) -> None:
        self.steps = 0
        self._waited = self._computed = 0.0
        self._started = time.perf_counter()
        self._glanced = _BEGINNING

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around the losses of a batch; of a GPU it is the time that the host takes."""
        began = time.perf_counter()
        yield
        self._computed += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training (evaluation, pictures, checkpoints)."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self) -> Interval:
        """All since the last reading, and start anew."""
        found = self._now().since(_BEGINNING)
        self.steps, self._waited, self._computed = 0, 0.0, 0.0
        self._started = time.perf_counter()
        self._glanced = _BEGINNING
        return found

    def glance(self) -> Interval:
        """The same since the last glance or reading, and the interval goes on."""
        before, self._glanced = self._glanced, self._now()
        return self._glanced.since(before)

    def _now(self) -> Interval:
        passed = time.perf_counter() - self._started
        return Interval(self.steps, passed, self._waited, self._computed)


class Log:
    """The written and the visible log of one process; with ``folder=None`` (processes other than
    the first) it does nothing.

    Lines of ``metrics.jsonl`` after ``first_step``, the step that training starts from, are
    removed: they will come again; those that cannot be read are set aside.  ``wandb`` is the name
    of a project there.  ``console``: where a bar is drawn when it is a terminal; otherwise ``say``
    gets lines.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int,
        first_step: int = 0,
        say: Say,
        tensorboard: bool = True,
        wandb: str | None = None,
        console: Console | None = None,
    ) -> None:
        self.folder = folder
        self._say = say
        self._writers: list[_TensorBoard | _Wandb] = []
        if folder is None:
            return
        self._path = folder / "metrics.jsonl"
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            if aside := trim_metrics(self._path, first_step):
                say(
                    f"{self._path}: {aside} damaged line{'s' * (aside > 1)} moved to "
                    f"{folder / DAMAGED}."
                )
            self._file = self._path.open(
                "ab", buffering=0
            )  # a line is on its way as soon as it is written
        if tensorboard:
            with self._spared("TensorBoard"):
                self._writers.append(_TensorBoard(folder, first_step))
        if wandb is not None:
            with self._spared("wandb"):
                self._writers.append(_Wandb(folder, wandb))
        self._display = Display(total_steps, first_step, say, console)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one JSON object with a ``step``; numbers that are not finite become null."""
        if self.folder is None:
            return
        text = json.dumps({key: _clean(value) for key, value in line.items()}, allow_nan=False)
        scalars = dict(_flatten(line))
        with self._told():
            self._append(text.encode() + b"\n")
        for writer in list(self._writers):
            with self._spared(writer.name, writer):
                writer.write(scalars, int(line["step"]))
        self.show(line)

    def show(self, line: Mapping[str, Any]) -> None:
        """Let a person see the numbers of a line that is not written."""
        if self.folder is not None and "loss" in line:
            self._display.show(line)

    def advance(self, step: int) -> None:
        """``step`` steps are finished."""
        if self.folder is not None:
            self._display.advance(step)

    def say_first_checkpoint(self, done: int, due: int) -> None:
        """Say, after ``done`` steps, when the first checkpoint will be written."""
        if self.folder is not None:
            wait = minutes(self._display.seconds_until(due, done))
            self._say(
                f"The first checkpoint is due after step {due:,}, {wait} from now; until then a "
                "kill loses everything (Ctrl-C saves before it ends)."
            )

    def say(self, text: str) -> None:
        """Say a sentence to the user, above the bar; from the first process only."""
        if self.folder is not None:
            self._say(text)

    def close(self) -> None:
        """End the bar and the files."""
        if self.folder is None:
            return
        self._display.close()
        with suppress(OSError):  # each line was written at once
            self._file.close()
        for writer in self._writers:
            with suppress(Exception):  # its last numbers; they stand in metrics.jsonl
                writer.close()

    def _append(self, data: bytes) -> None:
        """One whole line at the end of the file, or none; the file is made again where somebody
        removed it.
        """
        if not (
            self._path.exists()
            and os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        ):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file.close()
            self._file = self._path.open("ab", buffering=0)
        before = os.fstat(self._file.fileno()).st_size
        if (written := self._file.write(data)) != len(data):  # a disk that is full takes a part
            if written:
                self._file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} could not be written ({error.strerror}); {remedy(error)}, then go "
                f"on with `patchmine resume {self.folder}`"
            ) from error

    @contextmanager
    def _spared(self, name: str, writer: _TensorBoard | _Wandb | None = None) -> Iterator[None]:
        """Around a writer that is not worth a run: it is dropped when it fails."""
        try:
            with foreign_parser(_WriterError):
                yield
        except _WriterError as error:
            self._writers = [other for other in self._writers if other is not writer]
            self.say(
                f"warning: {name} gets no more numbers ({error}); training goes on, "
                "metrics.jsonl has them all"
            )

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_line(text: str | bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None where it is none: cut short by a kill, or damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and step_of(line) is not None else None


def step_of(line: Mapping[str, Any]) -> float | None:
    """The step that a line is about, or None where it names none that can be."""
    evaluation = line.get("eval")
    step = line.get("step", evaluation.get("step") if isinstance(evaluation, dict) else None)
    valid = isinstance(step, int | float) and not isinstance(step, bool) and 0 <= step <= MOST_STEPS
    return float(step) if valid else None


def trim_metrics(path: Path, step: int) -> int:
    """Remove the lines after ``step`` (of 0: all), and a last one that was cut short.

    Lines that cannot be read otherwise are moved to `DAMAGED` beside it; returns how many.
    """
    if not path.exists():
        return 0
    if not path.is_file():  # reading a pipe would wait for ever
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    kept, damaged = [], []
    *whole, cut = path.read_bytes().split(b"\n")
    for text in [*whole, cut] if read_line(cut) else whole:
        line = read_line(text)
        if line is None:
            damaged.append(text + b"\n")
        elif step > 0 and (step_of(line) or 0) <= step:  # one that begins anew writes all again
            kept.append(text + b"\n")
    damaged = [text for text in damaged if text.strip()]
    if damaged:
        with path.with_name(DAMAGED).open("ab") as file:
            file.writelines(damaged)
    with replacing(path) as new:
        new.write_bytes(b"".join(kept))
    return len(damaged)


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flatten(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every number of a line with a path for a name: ``eval/knn/top1``."""
    found = []
    for key, value in line.items():
        if isinstance(value, Mapping):
            found += _flatten(
                value, f"{prefix}{key}/{value['name']}/" if "name" in value else f"{prefix}{key}/"
            )
        elif isinstance(value, (int, float)) and key != "step":
            found.append((prefix + key, float(value)))
    return found


class _WriterError(Exception):
    """A writer of numbers failed at something."""


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    name = "wandb"

    def __init__(self, folder: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"wandb={project}, but wandb is not installed; run `pip install patchmine[wandb]`"
            ) from error
        # The same folder is the same run, so that a resumed one goes on in the same curves.
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder)
        )

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
