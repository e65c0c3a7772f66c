"""One writer for a run folder: who is told what, and that nothing is left when the writer ends or
dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from patchmine.errors import UserError
from patchmine.runs import lock as locks
from patchmine.runs.lock import NAME, OWNER, lock

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def in_child(work: Callable[[], None]) -> int:
    """Exit code of ``work`` in a forked process."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except UserError:
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def take(folder: Path) -> None:
    with lock(folder):
        pass


def test_the_second_is_told_who_holds_it(folder: Path) -> None:
    with lock(folder):
        with pytest.raises(UserError) as told, lock(folder):
            pass
        assert in_child(lambda: take(folder)) == 2
    text = str(told.value)
    assert (
        f"{folder} is being written by process {os.getpid()} on host {socket.gethostname()} since "
        in text
    )
    assert text.endswith("wait for it, stop it, or choose another out")
    with lock(folder):
        pass


def test_a_folder_that_nothing_was_put_into_is_gone_again(folder: Path) -> None:
    with lock(folder) as held:
        assert (folder / NAME).exists()
        held.renew()
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    with pytest.raises(RuntimeError), lock(folder):
        raise RuntimeError
    assert list(folder.iterdir()) == []
    with lock(folder):
        (folder / "config.yaml").write_text("a: 1")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_dead_holder_holds_nothing_and_its_workers_do_not_either(folder: Path) -> None:
    """kill -9 while a forked data worker lives on: the next start gets the lock at once."""
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock(folder):
            if os.fork() == 0:  # the worker
                os.write(ready[1], b"x")
                os.read(done[0], 1)
                os._exit(0)
            signal.pause()
    os.read(ready[0], 1)
    assert in_child(lambda: take(folder)) == 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    take(folder)
    os.write(done[1], b"x")


def test_of_many_at_once_one_wins(folder: Path) -> None:
    """Six processes come and go, each often; nobody is let in beside another."""
    folder.mkdir(parents=True)

    def many() -> None:
        for _ in range(20):
            try:
                with lock(folder):
                    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                    (folder / "inside").unlink()
            except UserError:
                continue

    children = [FORK.Process(target=many) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 6


def test_a_holder_that_is_stopping_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    may_end = threading.Event()

    def hear(text: str) -> None:
        said.append(text)
        may_end.set()

    with lock(folder) as held:
        held.stopping()
        (folder / "config.yaml").write_text("a: 1")
        release, held.release = held.release, lambda: None  # type: ignore[method-assign]
        ending = threading.Thread(target=lambda: (may_end.wait(20), release()))
        ending.start()
    with lock(folder, hear):
        assert len(said) == 1
        assert "which was asked to stop: waiting for it" in said[0]
    ending.join()
    monkeypatch.setattr(locks, "STOPPING_SECONDS", 0.0)
    with lock(folder) as held:
        held.stopping()
        with pytest.raises(UserError, match="is being written by process"), lock(folder):
            pass


def test_a_lock_file_that_was_removed_is_taken_again_or_told(folder: Path) -> None:
    with lock(folder) as held:
        (folder / NAME).unlink()
        folder.rmdir()
        held.renew()
        with pytest.raises(UserError, match="is being written by"), lock(folder):
            pass
        (folder / NAME).unlink()
        with (
            lock(folder),
            pytest.raises(UserError, match=f"is being written by process {os.getpid()}"),
        ):
            held.renew()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_file_stands_for_one(folder: Path) -> None:
    with lock(folder) as held:
        assert (folder / OWNER).exists()
        held.renew()
        with (
            pytest.raises(
                UserError, match=rf"this file system has no locks.*remove {folder / OWNER}"
            ),
            lock(folder),
        ):
            pass
        assert in_child(lambda: take(folder)) == 2
        (folder / "config.yaml").write_text("a: 1")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(("host", "taken"), [("here", True), ("elsewhere", False)])
def test_without_locks_a_dead_process_is_known_on_its_own_host_only(
    folder: Path, host: str, taken: bool
) -> None:
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    name = socket.gethostname() if host == "here" else "another-host"
    (folder / OWNER).write_text(json.dumps({"pid": pid, "host": name, "since": 0.0}))
    if taken:
        take(folder)
        assert not (folder / OWNER).exists()
    else:
        with pytest.raises(UserError, match="on host another-host since 1970-01-01"), lock(folder):
            pass


def held_by(**changes: object) -> bytes:
    return json.dumps({"pid": 1, "host": "h", "since": 0.0} | changes).encode()


GARBLED = [
    *(b"", b"{", b"\xff\xfe", b"[1]", b'{"pid": 1}', b"3", b"[" * 9000),
    *(
        held_by(pid="x"),
        held_by(pid=2**70),
        held_by(pid=-1),
        held_by(host=None),
        held_by(since="y"),
    ),
    *(held_by(since=1e30), held_by(since=float("nan"))),
]


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("content", GARBLED)
def test_a_garbled_file_in_place_of_a_lock_is_told(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / OWNER).write_bytes(content)
    with (
        pytest.raises(
            UserError, match=rf"being written by another process.*remove {folder / OWNER}"
        ),
        lock(folder),
    ):
        pass


def test_a_lock_file_that_is_a_link_is_not_written_through(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("a: 1")
    (folder / NAME).symlink_to("config.yaml")
    with pytest.raises(UserError, match="a link stands there"), lock(folder):
        pass
    assert (folder / "config.yaml").read_text() == "a: 1"


@pytest.mark.parametrize("content", GARBLED)
def test_a_garbled_lock_file_is_no_obstacle_and_no_traceback(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(content)
    with lock(folder):
        (folder / NAME).write_bytes(content)
        with pytest.raises(UserError, match="is being written by another process"), lock(folder):
            pass


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"cannot be written .*a part of its path is a file"),
        lock(tmp_path / "file/run"),
    ):
        pass
    with pytest.raises(UserError, match="cannot be written"), lock(Path("/proc/run")):
        pass
