"""The processes that read data: how they start, what each reads, what is said when one is lost.

Torch's loader tells that a worker died or did not answer; it knows neither why nor at which item.
Every worker notes the item that it begins in memory shared with the main process, which can say so.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from patchmine.data.sources.contract import Source
from patchmine.errors import UserError, reason_of, shown_name
from patchmine.strict import MOST_WORKERS
from patchmine.system.heap import give_back_freed

_POLL = 5.0  # seconds of silence after which the workers are looked at
_RESUME = "then `patchmine resume` goes on from the last checkpoint"
# In what torch says when something could not be handed over
_SHORT_OF = ("shared memory", "ancdata", "open files", "Cannot allocate memory")


_NOWHERE = nullcontext()


class _Noted:
    """Around reading item ``index``, which stands in ``note`` meanwhile."""

    def __init__(self, note: NDArray[np.float64], index: int) -> None:
        self.note, self.index = note, index

    def __enter__(self) -> None:
        self.note[:] = (self.index, time.monotonic(), os.getpid())

    def __exit__(self, *_: object) -> None:
        self.note[1] = 0


class Desk:
    """What each worker is reading: (index, since when, process) in shared memory."""

    def __init__(self, workers: int) -> None:
        self._notes: Tensor = torch.zeros(workers, 3, dtype=torch.float64)
        self._notes.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._notes)

    def reading(self, index: int) -> AbstractContextManager[None]:
        """Around reading one item, in a worker; takes a few microseconds."""
        worker = get_worker_info()
        return _NOWHERE if worker is None else _Noted(self._notes.numpy()[worker.id], index)

    def since(self) -> list[tuple[int, float, int]]:
        """(index, seconds that it is being read, process) of every worker that reads."""
        now = time.monotonic()
        notes: list[list[float]] = self._notes.tolist()
        return [(int(index), now - start, int(pid)) for index, start, pid in notes if start]


def num_workers(setting: int | Literal["auto"], device: torch.device, processes: int) -> int:
    """Processes that read data for one of the ``processes`` that train on this machine."""
    if setting != "auto":
        return setting
    can_ask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return workers_for(cores, processes, threads)


def workers_for(cores: int, processes: int, threads: int) -> int:
    """The number of `num_workers` on so many cores, which ``processes`` that train share.

    ``threads`` are those that each of them computes with on these cores; 0: it has a GPU.
    """
    if threads == 0:
        return max(1, min(16, cores // processes))
    # The cores are needed for arithmetic; a few workers overlap reading with it.
    return min(cores - 1, 16, max(1, threads // 4))


class Workers:
    """A started loader of a source, and the processes that belong to it.

    Raises UserError where so many processes cannot be started.
    """

    def __init__(
        self,
        samples: Dataset[Any],
        order: Sampler[Any],
        desk: Desk,
        source: Source,
        *,
        pin: bool = False,
    ) -> None:
        self.desk, self.number, self.source = desk, len(desk), source
        if self.number > MOST_WORKERS:
            raise UserError(f"workers={self.number}: set at most {MOST_WORKERS}")
        before = active_children()
        self.parts: Iterator[Any] = _start(samples, order, self.number, pin)
        self.processes: list[BaseProcess] = [
            child for child in active_children() if child not in before
        ]

    def trouble(self, error: Exception, read_timeout: float) -> str | None:
        """Why the run must end, in a sentence; None where the workers are merely slow."""
        text = str(error)
        if "exited unexpectedly" in text:
            return f"a process that reads data {self._death()}; {_RESUME}"
        if "timed out" in text:
            return self._silence(read_timeout)
        if any(word in text for word in _SHORT_OF):
            return (
                f"a batch could not be handed over by workers={self.number} ({reason_of(error)}): "
                "give more shared memory (docker: --shm-size=8g) or open files (ulimit -n), or "
                f"lower workers; {_RESUME}"
            )
        raise error

    def _silence(self, read_timeout: float) -> str | None:
        late = [note for note in self.desk.since() if note[1] > read_timeout > 0]
        if not late:
            return None
        late.sort(key=lambda note: -note[1])
        for child in self.processes:
            if child.pid in {pid for *_, pid in late}:
                child.kill()  # or its end would be waited for
        names = " and ".join(shown_name(self.source.path(index)) for index, *_ in late[:3])
        return (
            f"reading {names} has taken more than read_timeout={read_timeout:g} seconds; see "
            "whether the disk answers, remove what cannot be read or raise read_timeout, "
            f"{_RESUME}"
        )

    def _death(self) -> str:
        reading = {pid: index for index, _, pid in self.desk.since()}
        dead = next((child for child in self.processes if child.exitcode), None)
        number, where = 0, ""
        if dead is not None:
            number = dead.exitcode or 0
            if dead.pid in reading:
                where = f" while it read {shown_name(self.source.path(reading[dead.pid]))}"
        lower = f"lower workers={self.number}"
        if number == -signal.SIGKILL:
            return f"was killed{where}, most likely because the memory ran out: {lower}"
        if number == -signal.SIGBUS:
            more = "give more (docker: --shm-size=8g)"
            return f"ran out of shared memory{where}: {more}, or {lower}"
        if number < 0:
            known = {each.value: each.name for each in signal.Signals}
            name = known.get(-number, f"signal {-number}")
            remedy = "a decoder may have failed on it, remove it if that repeats"
            return f"ended by {name}{where}: {remedy}"
        return f"ended{where} with exit code {number}: see what it printed"


def _start(samples: Dataset[Any], order: Sampler[Any], number: int, pin: bool) -> Iterator[Any]:
    """A running loader.

    Workers are forked where that is safe (Linux): they start in milliseconds instead of seconds, a
    data set need not be picklable, a script needs no main guard, and they use neither CUDA nor a
    pool of threads, which a fork breaks.
    """
    with warnings.catch_warnings():
        # How many workers there are is the user's choice.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        forks = ".*multi-threaded, use of fork"
        warnings.filterwarnings("ignore", message=forks, category=DeprecationWarning)
        loader = DataLoader(
            samples,
            sampler=order,
            batch_size=None,
            num_workers=number,
            collate_fn=_as_is,
            pin_memory=pin and torch.cuda.is_available(),
            timeout=_POLL if number else 0,
            worker_init_fn=partial(_prepare_worker, os.getpid()) if number else None,
            multiprocessing_context="fork" if number and sys.platform == "linux" else None,
            # Or else starting a loader would draw from the global random state
            generator=torch.Generator(),
        )
        try:
            with _signals_kept():
                return iter(loader)
        except OSError as error:
            reason = reason_of(error)
            raise UserError(f"workers={number} cannot be started ({reason}); lower it") from error


def _as_is(part: Any) -> Any:
    return part


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Around the birth of workers, in the main process.

    Ctrl-C is blocked in them too, until they ignore it themselves.  And torch's loader asks to hear
    of dead children by a signal whose handler raises wherever the main process happens to be, in
    the midst of writing a checkpoint for instance; we ask for them when a batch is missing.
    """
    if sys.platform == "win32":
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Around decoding in a worker: libjpeg and libtiff warn on its standard error and name no file.

    What they cannot decode is refused by name.  Outside of a worker others write there too, and
    `unnamed_warnings` tells apart whose words these are.
    """
    if get_worker_info() is None:
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _prepare_worker(main: int, _: int) -> None:
    """Ctrl-C is for the main process, which ends its workers; a group of its own keeps others out.

    Torch's loader has already set one thread per worker.  Memory of large images is given back.
    """
    give_back_freed()
    threading.Thread(target=_end_with, args=(main,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _quiet_of_lost_connections
    if sys.platform != "win32":
        os.setpgrp()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_with(main: int) -> None:
    """Ends with the main process: torch's workers miss its end where it died before they looked."""
    while os.getppid() == main:
        time.sleep(_POLL)
    os._exit(1)


def _quiet_of_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What the thread that hands over a batch prints when the main process is killed meanwhile."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
