"""The campaign sees what it is there to see: every planted fault is found, and the same seed makes
the same mutants.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import campaign
import mutators
import pytest
import seeds
from filesystem import CRASHED, FileSystem, calls
from formats import Format
from spread import spread

from patchmine.errors import UserError

SOUND = b"sound"


def planted(fault: Callable[[bytes], Any], **given: Any) -> Format:
    """A format whose reader does ``fault`` to everything but the sound file."""

    def read(data: bytes, folder: Path) -> Any:  # noqa: ARG001
        return SOUND if data == SOUND else fault(data)

    return Format(
        "planted",
        [SOUND],
        [lambda data, chance: data + bytes([chance.randrange(256)])],
        read,
        **given,
    )


def kinds(each: Format, tmp_path: Path, count: int = 3) -> tuple[campaign.Tally, set[str]]:
    tally = campaign.run([each], count=count, seed=0, processes=1, seconds=60, scratch=tmp_path)[
        each.name
    ]
    return tally, {fault.kind for fault in tally.faults}


def spin(_: bytes) -> None:
    while True:
        pass


def refuse(text: str) -> Callable[[bytes], None]:
    def read(_: bytes) -> None:
        raise UserError(text)

    return read


def swell(_: bytes) -> None:
    # Well above the limit: a kernel may take file pages of this process back meanwhile.
    assert len(bytearray(b"x") * (128 << 20)) == 128 << 20


def connect(_: bytes) -> None:
    with suppress(OSError), socket.socket() as other:
        other.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("fault", "given", "kind"),
    [
        (lambda data: data.index(b"absent"), {}, "ValueError"),
        (lambda _: os.kill(os.getpid(), signal.SIGSEGV), {}, "crash"),
        (lambda _: os._exit(0), {}, "crash"),
        (spin, {}, "hang"),
        (lambda _: time.sleep(60), {}, "hang"),
        (swell, {}, "memory"),
        (lambda _: os.system("true"), {}, "executed"),
        (connect, {}, "executed"),
        (lambda _: Path(seeds.CANARY).touch(), {}, "executed"),
        (lambda _: b"other", {"sealed": True}, "silent"),
        (refuse(""), {}, "no words"),
        (refuse("two\nlines"), {}, "lines"),
        (refuse("a letter \x1b[31m"), {}, "letters"),
        (refuse("x.pth is damaged"), {"named": "y.pth"}, "nameless"),
    ],
)
def test_a_planted_fault_is_found(
    fault: Any, given: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "hang":  # any other fault may take its time where the machine is busy
        monkeypatch.setattr(campaign, "SECONDS", 0.3)
        monkeypatch.setattr(campaign, "CLOCK_SECONDS", 1.0)
    monkeypatch.setattr(campaign, "MEMORY", 32 << 20)
    tally, found = kinds(planted(fault, **given), tmp_path, count=2)
    assert (tally.tried, len(tally.faults), found) == (2, 2, {kind})


def test_what_is_read_or_refused_in_a_sentence_is_no_fault(tmp_path: Path) -> None:
    tally, found = kinds(planted(refuse("x.pth is damaged"), named="x.pth"), tmp_path / "a")
    assert (tally.refused, tally.read, found) == (3, 0, set())
    tally, found = kinds(planted(lambda data: SOUND, sealed=True), tmp_path / "b")
    assert (tally.refused, tally.read, found) == (0, 3, set())


@pytest.mark.parametrize(
    "mutate", sorted({*mutators.YAML, *mutators.BYTES}, key=lambda each: each.__name__)
)
def test_a_seed_makes_the_same_mutants_also_of_tiny_files(mutate: mutators.Mutator) -> None:
    for data in (b"", b"x", b'{"a": [1, 2.5, "b"]}\n' * 40):
        for number in range(50):
            assert mutate(data, random.Random(number)) == mutate(data, random.Random(number))


def written(folder: Path, system: FileSystem) -> int:
    """Exit code of a child that writes two files and renames one while the file system is watched."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            system.install()
            (folder / "a").write_text("first")
            (folder / "a").replace(folder / "b")
            (folder / "c").write_text("second")
            code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_every_call_can_be_the_last(tmp_path: Path) -> None:
    folder, listing = tmp_path / "folder", tmp_path / "calls"
    folder.mkdir()
    assert written(folder, FileSystem(folder, record=listing)) == 0
    found = calls(listing)
    assert [name for name, _ in found] == ["open", "write", "replace", "open", "write"]
    states = []
    for number, (name, _) in enumerate(found):
        for action in ("before", "half", "after"):
            for path in folder.iterdir():
                path.unlink()
            assert written(folder, FileSystem(folder, action, number)) == CRASHED  # type: ignore[arg-type]
            states.append(
                (name, action, {path.name: path.read_text() for path in folder.iterdir()})
            )
    assert ("open", "before", {}) in states
    assert ("write", "half", {"a": "fi"}) in states
    assert ("replace", "before", {"a": "first"}) in states
    assert ("replace", "after", {"b": "first"}) in states
    assert ("write", "half", {"b": "first", "c": "sec"}) in states


def test_a_disk_that_is_full_stays_full(tmp_path: Path) -> None:
    import errno

    assert written(tmp_path, FileSystem(tmp_path, "full", 1)) == errno.ENOSPC
    assert (tmp_path / "a").read_text() == "fi"
    assert not (tmp_path / "c").exists()


def test_work_that_is_spread_tells_what_was_left() -> None:
    def work(case: int) -> tuple[int, list[str]]:
        if case == 2:
            raise KeyError(case)
        return 1, ["wrong"] if case == 1 else []

    outcome = spread(work, range(4), processes=2, seconds=60)
    assert (outcome.tried, outcome.left, len(outcome.faults)) == (4, 0, 2)
    assert spread(work, range(4), processes=2, seconds=-1).left == 4
