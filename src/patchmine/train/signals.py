"""Being asked to stop: the step is finished and saved, and only a second Ctrl-C is obeyed at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(SystemExit):
    """The run was asked to stop and its checkpoint is written; uncaught, the process ends with 128 + the signal."""

    def __init__(self, signal_number: int, step: int, *, is_main: bool) -> None:
        # A launcher kills the first process as soon as it sees another one end with an error.
        super().__init__(128 + signal_number if is_main else 0)
        self.signal_number = signal_number
        self.step = step


class StopSignals:
    """Within this context SIGINT, SIGTERM and SIGUSR1 only set ``received``; a second SIGINT raises KeyboardInterrupt.

    Outside of the main thread, where Python cannot listen to signals, nothing changes.
    """

    def __init__(self) -> None:
        self.received = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker that was forked from us: it goes on until the step is finished
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
