"""What a person sees of a run while it trains: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from patchmine.errors import Say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

PLAIN_SECONDS = 5.0  # without a terminal, at most one line in this time


class Display:
    """Loss, speed and the time left, from the first finished step on.

    ``console``: where the bar is drawn when it is a terminal; otherwise ``say`` gets lines.
    """

    def __init__(
        self, total_steps: int, first_step: int, say: Say, console: Console | None = None
    ) -> None:
        self._total, self._first, self._say = total_steps, first_step, say
        self._since = (time.monotonic(), first_step)  # from where the pace is measured
        self._last_line = -math.inf
        self._bar = _started_bar(total_steps, first_step, console)

    def advance(self, step: int) -> None:
        """``step`` steps are finished."""
        if self._bar is not None:
            left = timedelta(seconds=round(self.seconds_until(self._total, step)))
            self._bar.update(self._bar.task_ids[0], completed=step, left=str(left))
        if step == self._first + 1:
            # It also waits for workers and compilation: the pace is that of the others.
            self._since = (time.monotonic(), step)

    def seconds_until(self, step: int, done: int) -> float:
        """How long it takes from ``done`` steps to ``step``, at the pace of this process so far,
        with what is done between steps.
        """
        began, first = self._since
        return (step - done) * (time.monotonic() - began) / max(1, done - first)

    def show(self, line: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl."""
        numbers = describe(line)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], numbers=numbers)
            return
        now, step = time.monotonic(), int(line["step"])
        if now - self._last_line < PLAIN_SECONDS and step < self._total:
            return
        self._last_line = now
        left = minutes(self.seconds_until(self._total, step))
        epoch = line["epoch"]
        self._say(f"step {step}/{self._total}  epoch {epoch:.2f}  {numbers}  {left} left")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            with suppress(OSError):  # the terminal may be gone
                self._bar.stop()
            self._bar = None


def _started_bar(total_steps: int, first_step: int, console: Console | None) -> Bar | None:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichBar

    console = console or RichConsole()
    if not console.is_terminal:
        return None
    bar = RichBar(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        # Not rich's own estimate, which knows nothing where a step takes more than half a minute
        TextColumn("left {task.fields[left]}"),
        console=console,
    )
    bar.add_task("", total=total_steps, completed=first_step, numbers="", left="-:--:--")
    bar.start()
    return bar


def describe(line: Mapping[str, Any]) -> str:
    """The numbers of a metrics line that a watcher wants to see."""
    rate, wait = line["images_per_second"], line["data_wait"]
    # A slow machine makes less than one in a second
    speed = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    text = f"loss {line['loss']:.4f}  {speed} samples/s  data wait {wait:.0%}"
    return text + (f"  skipped {line['skipped']}" if line.get("skipped") else "")


def minutes(seconds: float) -> str:
    """A time for people, to the minute."""
    whole = round(seconds / 60)
    if whole >= 60:
        return f"{whole // 60} h {whole % 60} min"
    return f"{whole} min" if whole else "under 1 min"
