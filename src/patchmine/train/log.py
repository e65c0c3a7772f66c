"""What a run says while it trains: metrics.jsonl, TensorBoard, wandb, a progress bar or plain lines.

``Meter`` is the only place where a training tensor is read, and it is read every ``log_every`` steps.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchmine.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

PLAIN_SECONDS = 5.0  # without a terminal, at most one line in this time


class Meter:
    """Means of 0-d tensors over an interval, summed on the device.  What is not finite is left out."""

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
        """Means since the last reading; ``mean`` averages a tensor over processes.  This waits for the device."""
        if not self._sums:
            return {}
        names = [name for group in self._sums for name in group]
        sums, counts = mean(torch.cat(list(self._sums.values()), dim=1)).tolist()
        self._sums = {}
        totals: dict[str, tuple[float, float]] = {}
        for name, total, count in zip(names, sums, counts, strict=True):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + total, before[1] + count
        return {name: total / count if count else math.nan for name, (total, count) in totals.items()}


class Stopwatch:
    """Steps, seconds and seconds of waiting for data since the last reading, pauses not counted."""

    def __init__(self) -> None:
        self.steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training (evaluation, pictures, checkpoints)."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self) -> tuple[int, float, float]:
        """(steps, seconds, seconds waited), and start anew."""
        now = time.perf_counter()
        found = self.steps, max(now - self._started, 1e-9), self._waited
        self.steps, self._waited, self._started = 0, 0.0, now
        return found


class Log:
    """The written and the visible log of one process; with ``folder=None`` (processes other than the first) it does
    nothing.

    Lines of ``metrics.jsonl`` after ``first_step``, the step that training starts from, are removed: they will come
    again. ``wandb`` is the name of a project there.  ``console``: where a bar is drawn when it is a terminal;
    otherwise ``say`` gets lines.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int,
        first_step: int = 0,
        say: Callable[[str], None],
        tensorboard: bool = True,
        wandb: str | None = None,
        console: Console | None = None,
    ) -> None:
        self.folder = folder
        self._say = say
        self._total = total_steps
        self._last_line = -math.inf
        self._bar: Bar | None = None
        self._writers: list[_TensorBoard | _Wandb] = []
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        trim_metrics(self._path, first_step)
        self._file = self._path.open("ab", buffering=0)  # a line is on its way as soon as it is written
        if tensorboard:
            self._writers.append(_TensorBoard(folder, first_step))
        if wandb is not None:
            self._writers.append(_Wandb(folder, wandb))
        self._start_bar(first_step, console)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one JSON object; it must hold ``step``.  Numbers that are not finite become null."""
        if self.folder is None:
            return
        text = json.dumps({key: _clean(value) for key, value in line.items()}, allow_nan=False)
        scalars = dict(_flatten(line))
        try:
            self._file.write(text.encode() + b"\n")
            for writer in self._writers:
                writer.write(scalars, int(line["step"]))
        except OSError as error:
            raise UserError(
                f"{self._path} could not be written ({error.strerror}); make room there, then go on with"
                f" `patchmine resume {self.folder}`"
            ) from error
        self._show(line)

    def advance(self, step: int) -> None:
        """Move the bar; ``step`` steps are finished."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def say(self, text: str) -> None:
        """Say a sentence to the user, above the bar; from the first process only."""
        if self.folder is not None:
            self._say(text)

    def close(self) -> None:
        """End the bar and the files."""
        if self.folder is None:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._file.close()
        for writer in self._writers:
            with suppress(OSError):  # a full disk has been told already
                writer.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start_bar(self, first_step: int, console: Console | None) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBar

        console = console or RichConsole()
        if not console.is_terminal:
            self._clock = (time.monotonic(), first_step)
            return
        self._bar = RichBar(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar.add_task("", total=self._total, completed=first_step, numbers="")
        self._bar.start()

    def _show(self, line: Mapping[str, Any]) -> None:
        if "loss" not in line:
            return
        numbers = describe(line)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], numbers=numbers)
            return
        now, step = time.monotonic(), int(line["step"])
        if now - self._last_line < PLAIN_SECONDS and step < self._total:
            return
        self._last_line = now
        started, first_step = self._clock
        left = (self._total - step) * (now - started) / max(1, step - first_step)
        self._say(f"step {step}/{self._total}  epoch {line['epoch']:.2f}  {numbers}  {_minutes(left)} left")


def describe(line: Mapping[str, Any]) -> str:
    """The numbers of a metrics line that a watcher wants to see."""
    text = f"loss {line['loss']:.4f}  {line['images_per_second']:.0f} samples/s  data wait {line['data_wait']:.0%}"
    return text + (f"  skipped {line['skipped']}" if line.get("skipped") else "")


def trim_metrics(path: Path, step: int) -> None:
    """Remove the lines after ``step``, and a last one that was cut short."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if (line["step"] if "step" in line else line["eval"]["step"]) <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a kill
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


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
            found += _flatten(value, f"{prefix}{key}/{value['name']}/" if "name" in value else f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            found.append((prefix + key, float(value)))
    return found


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"wandb={project}, but wandb is not installed; run `pip install patchmine[wandb]`"
            ) from error
        # The same folder is the same run, so that a resumed one goes on in the same curves.
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, name=folder.name, id=identity, resume="allow", dir=str(folder))

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
