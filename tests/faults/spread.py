"""Work that is spread over forked processes, each with results on the way and one end of time for
all.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import scene


@dataclass
class Outcome:
    """What a group found: how many cases were tried, which went wrong, and how many were left when
    time was up.
    """

    tried: int = 0
    faults: list[str] = field(default_factory=list)
    left: int = 0
    remark: str = ""


Work = Callable[[Any], tuple[int, list[str]]]
"""From a case to how many things it tried and the faults that it found."""


def spread(work: Work, cases: Sequence[Any], *, processes: int, seconds: float) -> Outcome:
    """Do ``work`` on the cases; those that are not begun after ``seconds`` are left out."""
    end = time.monotonic() + seconds
    pids = dict(
        _fork(work, cases[start::processes], end) for start in range(min(processes, len(cases)))
    )
    rests = dict.fromkeys(pids, b"")
    outcome, done = Outcome(), 0
    while rests:
        for pipe in select.select(list(rests), [], [], 1.0)[0]:
            block = os.read(pipe, 1 << 16)
            if not block:
                os.close(pipe)
                os.waitpid(pids[pipe], 0)
                del rests[pipe]
                continue
            *lines, rests[pipe] = (rests[pipe] + block).split(b"\n")
            for line in lines:
                tried, faults = json.loads(line)
                outcome.tried += tried
                outcome.faults += faults
                done += 1
        if time.monotonic() > end + 200:  # a case has its own limits, all of them shorter
            for pipe in rests:
                with suppress(ProcessLookupError):
                    os.kill(pids[pipe], signal.SIGKILL)
    outcome.left = len(cases) - done
    return outcome


def _fork(work: Work, cases: Sequence[Any], end: float) -> tuple[int, int]:
    """The pipe to read its results from, and its number."""
    read, write = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of a fork beside threads, which torch holds idle
        pid = os.fork()
    if pid:
        os.close(write)
        return read, pid
    code = 1
    try:
        os.close(read)
        scene.PIPES.append(write)
        for case in cases:
            if time.monotonic() > end:
                break
            try:
                result = work(case)
            except Exception:  # noqa: BLE001, a mistake of the campaign itself is told like a fault
                result = (
                    1,
                    [
                        f"the campaign itself, on {case!r}: "
                        f"{' '.join(traceback.format_exc().split())[-400:]}"
                    ],
                )
            os.write(write, json.dumps(result).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)
