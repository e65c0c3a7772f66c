"""Mutants by the thousand: forked workers read them under a watchdog, and every one gets a verdict.

A worker is a fork of a process that has imported everything, so that a mutant costs milliseconds.
The parent hears when a mutant is begun and when it is done; one that uses more than ``SECONDS`` of
processor time, or of the clock while nothing happens, or too much memory, is ended with its worker
and counted as a fault.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import seeds
from formats import Format
from run_readers import digest

from patchmine.system.heap import give_back_freed

SECONDS, CLOCK_SECONDS = 10.0, 60.0
MEMORY = 2**30  # bytes above those that the worker had, for a file under SMALL
SMALL = 2**20
# Audit events of the interpreter that reading a file has no business with.
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.bind",
    "webbrowser.open",
    "ctypes.dlopen/",
)
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


@dataclass
class Fault:
    """A mutant that did what none may do."""

    format: str
    number: int
    mutators: str
    kind: str
    reason: str


@dataclass
class Tally:
    """What became of the mutants of one format."""

    tried: int = 0
    read: int = 0
    refused: int = 0
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    format: int
    number: int


def run(
    formats: Sequence[Format],
    *,
    count: int,
    seed: int,
    processes: int,
    seconds: float,
    scratch: Path,
) -> dict[str, Tally]:
    """Try ``count`` mutants, evenly over the formats and in turn, and stop after ``seconds``."""
    jobs = [_Job(place % len(formats), place // len(formats)) for place in range(count)]
    tallies = {each.name: Tally() for each in formats}
    end = time.monotonic() + seconds
    workers = [
        _Worker(formats, jobs[start::processes], seed, scratch / f"worker-{start}")
        for start in range(processes)
    ]
    try:
        while any(worker.busy for worker in workers) and time.monotonic() < end:
            ready, _, _ = select.select(
                [worker.pipe for worker in workers if worker.busy], [], [], 0.1
            )
            for worker in workers:
                if worker.pipe in ready:
                    worker.hear(tallies)
                worker.watch(tallies)
    finally:
        for worker in workers:
            worker.end()
    return tallies


class _Worker:
    """A forked process that goes through its jobs, and is forked again after each that it does not
    survive.
    """

    def __init__(
        self, formats: Sequence[Format], jobs: Sequence[_Job], seed: int, scratch: Path
    ) -> None:
        self.formats, self.jobs, self.seed, self.scratch = formats, jobs, seed, scratch
        self.next = 0
        self.busy = bool(jobs)
        self.pid = -1
        self.pipe = -1
        if self.busy:
            self._fork()

    def hear(self, tallies: dict[str, Tally]) -> None:
        """Take in what the process has written, or that it died."""
        block = os.read(self.pipe, 1 << 16)
        if not block:
            _, status = os.waitpid(self.pid, 0)
            self.pid = -1
            if self.next >= len(self.jobs):
                self.busy = False
                return
            self._lost(
                tallies, "crash", f"the process ended with {os.waitstatus_to_exitcode(status)}"
            )
            return
        self._rest += block
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._began, self._cpu = time.monotonic(), _cpu(self.pid)
            if line != b"begin":
                self._count(tallies, *json.loads(line))

    def watch(self, tallies: dict[str, Tally]) -> None:
        """End a process whose mutant takes too long or too much memory."""
        if not self.busy or self.pid < 0 or self._began is None:
            return
        clock, cpu = time.monotonic() - self._began, _cpu(self.pid) - self._cpu
        if cpu > SECONDS or (
            clock > CLOCK_SECONDS and cpu < SECONDS / 2
        ):  # at work, or waiting for something
            self._lost(
                tallies, "hang", f"no answer after {cpu:.0f} s of work ({clock:.0f} s of the clock)"
            )
        elif (held := _resident(self.pid)) > self._memory + 2 * MEMORY:
            self._lost(tallies, "memory", f"{(held - self._memory) / 2**30:.1f} GB and rising")

    def end(self) -> None:
        """Leave no process behind."""
        if self.pid > 0:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.pipe >= 0:
            os.close(self.pipe)

    def _lost(self, tallies: dict[str, Tally], kind: str, reason: str) -> None:
        self.end()
        self.pid = self.pipe = -1
        self._count(tallies, "fault", kind, reason)
        self.busy = self.next < len(self.jobs)
        if self.busy:
            self._fork()

    def _count(self, tallies: dict[str, Tally], verdict: str, kind: str, reason: str) -> None:
        job = self.jobs[self.next]
        self.next += 1
        each = self.formats[job.format]
        tally = tallies[each.name]
        tally.tried += 1
        tally.read += verdict == "read"
        tally.refused += verdict == "refused"
        if verdict == "fault":
            names, _ = each.mutant(job.number, self.seed)
            tally.faults.append(Fault(each.name, job.number, names, kind, reason))

    def _fork(self) -> None:
        self._rest, self._began, self._cpu = b"", None, 0.0
        self.pipe, write = os.pipe()
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of a fork beside threads, which torch holds idle
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            with suppress(BaseException):
                _work(
                    self.formats,
                    self.jobs[self.next :],
                    self.seed,
                    self.scratch / str(self.next),
                    write,
                )
            os._exit(0)
        os.close(write)
        self._memory = _resident(self.pid)


def _work(
    formats: Sequence[Format], jobs: Sequence[_Job], seed: int, scratch: Path, pipe: int
) -> None:
    """Inside the fork: one mutant after the other."""
    scratch.mkdir(parents=True)
    os.chdir(scratch)
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)  # decoders in C write where they like
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    trespass: list[str] = []
    sound = {each.name: _sound(each, number) for number, each in enumerate(formats)}
    sys.addaudithook(
        lambda event, arguments: (
            trespass.append(f"{event} {arguments!r}"[:200]) if event in FORBIDDEN else None
        )
    )
    for job in jobs:
        each = formats[job.format]
        _, data = each.mutant(job.number, seed)
        os.write(pipe, b"begin\n")
        trespass.clear()
        verdict = judge(each, data, Path(f"f{job.format}"), sound[each.name], trespass)
        os.write(pipe, json.dumps(verdict).encode() + b"\n")


def _sound(each: Format, number: int) -> str:
    """What the first sound file gives; it must be readable, or else its mutants tell nothing."""
    folder = Path(f"f{number}")
    folder.mkdir()
    return digest(each.read(each.seeds[0], folder))


def judge(
    each: Format, data: bytes, folder: Path, sound: str, trespass: Sequence[str] = ()
) -> tuple[str, str, str]:
    """("read" | "refused" | "fault", kind, reason) of one mutant, read in this process."""
    give_back_freed()  # or else a reader takes unseen what others before it have freed
    before = _reset_peak()
    verdict = _read(each, data, folder, sound)
    grown = _peak() - before
    if Path(seeds.CANARY).exists():
        Path(seeds.CANARY).unlink()
        return "fault", "executed", "code in the file was run"
    if trespass:
        return "fault", "executed", trespass[0]
    if grown > MEMORY and len(data) < SMALL:
        return "fault", "memory", f"{grown / 2**30:.1f} GB for {len(data):,} bytes; {verdict[0]}"
    return verdict


def _read(each: Format, data: bytes, folder: Path, sound: str) -> tuple[str, str, str]:
    try:
        value = each.read(data, folder)
    except each.refusals as error:
        return _judge_refusal(each, error)
    except BaseException as error:  # noqa: BLE001, whatever a reader lets through is what we look for
        return (
            "fault",
            type(error).__name__,
            f"{_place(error)}: {ADDRESS.sub('0x', str(error))[:160]!r}",
        )
    if each.sealed and digest(value) != sound:
        return "fault", "silent", "other contents than those of the sound file, without a word"
    return "read", "", ""


def _judge_refusal(each: Format, error: Exception) -> tuple[str, str, str]:
    text = str(error)
    if not text.strip():
        return "fault", "no words", f"{type(error).__name__} without a text at {_place(error)}"
    if "\n" in text and not each.lines:
        return "fault", "lines", f"a refusal of several lines at {_place(error)}: {text[:120]!r}"
    if any(not letter.isprintable() and letter != "\n" for letter in text):
        return (
            "fault",
            "letters",
            f"a refusal that no terminal can show at {_place(error)}: {text[:120]!r}",
        )
    if each.named and each.named not in text:
        return (
            "fault",
            "nameless",
            f"a refusal that does not name {each.named} at {_place(error)}: {text[:120]!r}",
        )
    return "refused", "", ""


def _place(error: BaseException) -> str:
    """The innermost line of the package that an exception came through."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}patchmine{os.sep}" in f.filename
    ]
    frame = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _cpu(pid: int) -> float:
    """Seconds of processor time of a process."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="ascii", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    try:
        return (
            int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
            * resource.getpagesize()
        )
    except OSError:
        return 0


def _reset_peak() -> int:
    """Bytes in memory now, from where the peak is counted again."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident(os.getpid())


def _peak() -> int:
    for line in (
        Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    ):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def grouped(faults: Sequence[Fault]) -> list[tuple[Fault, int]]:
    """One example of each kind of fault with its count, the most frequent first."""

    def same(fault: Fault) -> tuple[Any, ...]:
        return fault.format, fault.kind, fault.reason.split(": ")[0]

    counts = Counter(map(same, faults))
    first = {same(fault): fault for fault in reversed(faults)}
    return [(first[key], count) for key, count in counts.most_common()]
