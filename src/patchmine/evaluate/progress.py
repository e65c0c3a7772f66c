"""How far an evaluation is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

from patchmine.errors import Say, silent

Tick = Callable[[int], None]

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(title: str, total: int, say: Say) -> Iterator[Tick]:
    """Yields what takes the number of items just done; with `silent` nothing is shown."""
    console = Console(stderr=True)
    if say is silent:
        yield lambda _: None
        return
    if console.is_terminal:
        kinds = (bars.BarColumn, bars.MofNCompleteColumn, bars.TimeElapsedColumn)
        columns = [kind() for kind in (*kinds, bars.TimeRemainingColumn)]
        name = bars.TextColumn("{task.description}", markup=False)
        with bars.Progress(name, *columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    start = last = time.monotonic()
    done = 0

    def tick(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if done >= total or now - last > _SECONDS_BETWEEN_LINES:
            rate = done / max(now - start, 1e-9)
            speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"  # as a run says it
            say(f"{title}: {done:,} of {total:,} ({speed} samples/s)")
            last = now

    yield tick
