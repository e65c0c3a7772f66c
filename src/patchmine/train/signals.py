"""Being asked to stop: the step is finished and saved, and only a second Ctrl-C is obeyed at once.

A lost terminal (SIGHUP) asks like a scheduler (SIGTERM, SIGUSR1) and a person (SIGINT) do, unless
`nohup` said that it must not.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

ASKING_SECONDS = 1.0  # how long a signal to one process may take until all of them know
_FIRST_STEPS = 10  # in which processes ask each other after every one, and learn how long they take

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(SystemExit):
    """The run was asked to stop and its checkpoint is written; uncaught, the process ends with 128
    + the signal.
    """

    def __init__(self, signal_number: int, step: int, *, is_main: bool) -> None:
        # A launcher kills the first process as soon as it sees another one end with an error.
        super().__init__(128 + signal_number if is_main else 0)
        self.signal_number = signal_number
        self.step = step


class StopSignals:
    """Within this context the signals of `WATCHED` only set ``received``; a second SIGINT raises
    KeyboardInterrupt.

    A third one, while that unwinds, ends the process where it stands, as `kill -9` would.
    ``on_stop`` is called at the first signal.  Outside of the main thread, where Python cannot
    listen to signals, nothing changes.
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None) -> None:
        self.received = 0
        self._on_stop = on_stop
        self._every = 1  # steps
        self._half_way = math.nan
        self._unwinding = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def shared(self, made: int, largest: Callable[[int], int]) -> int:
        """The signal that any of several processes received, or 0; to be called after every step.

        ``largest`` gives that of the processes' numbers, for which they wait for each other: after
        each of the first steps, of which ``made`` is the count, then about every second.
        """
        if made == _FIRST_STEPS // 2:
            self._half_way = time.perf_counter()
        elif made == _FIRST_STEPS:
            seconds = (time.perf_counter() - self._half_way) / (_FIRST_STEPS - _FIRST_STEPS // 2)
            self._every = max(1, largest(int(ASKING_SECONDS / seconds)))
        return largest(self.received) if made % self._every == 0 else 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # started by nohup
            watched = [number for number in WATCHED if not (ignored and number == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._note) for number in watched}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker that was forked from us: it goes on until the step is finished
        if self._unwinding and number == signal.SIGINT:
            os._exit(128 + number)
        if self.received and number == signal.SIGINT:
            self._unwinding = True
            raise KeyboardInterrupt
        first, self.received = not self.received, number
        if first:
            self._on_stop()
