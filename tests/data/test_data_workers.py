"""A process that reads data and dies, hangs or fails on one item: what is said, and that the rest
goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading import seen, start

from patchmine.data import workers as workers_module
from patchmine.data.badfiles import BadFiles
from patchmine.data.decoding.bounds import DecodeError, missing
from patchmine.data.loader import data_statistics, plain_batches
from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import IMAGES, Labels
from patchmine.data.views.images import PlainView, TrainView
from patchmine.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "workers"),
    [
        *((1, 1, 1, 0), (2, 1, 2, 1), (2, 2, 1, 1), (4, 1, 4, 1), (8, 1, 8, 2)),  # on processors
        *((16, 1, 16, 4), (64, 1, 64, 16), (64, 2, 32, 8), (64, 1, 1, 1), (192, 1, 192, 16)),
        *((1, 1, 0, 1), (2, 1, 0, 2), (16, 1, 0, 16), (64, 1, 0, 16), (64, 8, 0, 8)),  # on GPUs
    ],
)
def test_workers_follow_the_cores_that_training_leaves(
    cores: int, processes: int, threads: int, workers: int
) -> None:
    assert workers_module.workers_for(cores, processes, threads) == workers


class Images:
    """Sixteen grey images; number 5 does what a test asks for when it is read."""

    name = fingerprint = "images"

    def __init__(self, number_5: Any) -> None:
        self.number_5 = number_5

    def __len__(self) -> int:
        return 16

    def read(self, index: int) -> Any:
        if index == 5:
            self.number_5()
        return np.full((16, 20, 3), index, np.uint8)

    def path(self, index: int) -> str:
        return f"folder/{index}\n.png"

    def labels(self) -> Labels | None:
        return None


def train(source: Images, workers: int = 2, bad: BadFiles | None = None, **settings: Any) -> int:
    """How many batches come."""
    settings = {"batch_size": 4, "bad": BadFiles(None, 0.5) if bad is None else bad, **settings}
    batches = start(source, TrainView(seen(8)), workers=workers, **settings)
    return sum(1 for _ in batches)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are looked at after 0.2 seconds of silence."""
    monkeypatch.setattr(workers_module, "_POLL", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (
            signal.SIGKILL,
            r"was killed while it read folder/5\\n.png, most likely because the memory ran out: "
            r"lower workers=2",
        ),
        (signal.SIGBUS, r"ran out of shared memory while it read folder/5\\n.png: give more"),
        (signal.SIGABRT, r"ended by SIGABRT while it read folder/5\\n.png"),
    ],
)
def test_a_worker_that_dies_is_one_sentence(number: signal.Signals, words: str) -> None:
    def die() -> None:
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match=words) as caught:
        train(Images(die))
    assert "patchmine resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None
    assert signal.getsignal(signal.SIGCHLD) == handler
    with pytest.raises(UserError, match=words):
        list(plain_batches(Images(die), PlainView(seen(8)), batch_size=4, workers=2))


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_does_not_answer_is_given_up_and_its_item_named() -> None:
    with pytest.raises(
        UserError, match=r"reading folder/5\\n.png has taken more than read_timeout=0\.5 seconds"
    ):
        train(Images(lambda: time.sleep(60)), read_timeout=0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("read_timeout", [0.0, 60.0])
def test_a_slow_item_is_waited_for(read_timeout: float) -> None:
    assert train(Images(lambda: time.sleep(0.7)), read_timeout=read_timeout) == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "cannot be read (MemoryError)"),
        (KeyError("image"), "cannot be read ('image')"),
        (AssertionError("line\nline"), "cannot be read (line line)"),
        (DecodeError("is no image"), "is no image"),
        (OSError(5, "Input/output error"), "cannot be read ([Errno 5] Input/output error)"),
    ],
)
def test_whatever_one_item_raises_is_that_items_failure(
    error: Exception, reason: str, workers: int, tmp_path: Path
) -> None:
    def fail() -> None:
        raise error

    bad = BadFiles(tmp_path / "bad_files.txt", 0.5)
    assert train(Images(fail), workers=workers, bad=bad) == 8
    assert (tmp_path / "bad_files.txt").read_text() == f"folder/5\\n.png\t{reason}\n"
    assert data_statistics(Images(fail), InputSettings())[0].shape == (3,)


def test_a_missing_package_is_said_once_not_as_broken_files(tmp_path: Path) -> None:
    class Telephone(Images):
        def read(self, index: int) -> Any:
            if index % 4:
                raise missing("an HEIF image (HEIC)", "pillow-heif", "pip install pillow-heif")
            raise DecodeError("is no image")

    bad = BadFiles(tmp_path / "bad_files.txt", 0.1)
    with pytest.raises(
        UserError, match=r"images tried so far need a package .*: pip install pillow-heif$"
    ):
        train(Telephone(None), workers=0, bad=bad)
    with pytest.raises(UserError, match=r"none of the 16 items"):
        data_statistics(Telephone(None), InputSettings())


def test_too_many_workers_are_refused() -> None:
    with pytest.raises(UserError, match=r"workers=100000.*1024"):
        plain_batches(Images(None), PlainView(seen(8)), batch_size=4, workers=100_000)


def test_a_bad_list_that_cannot_be_written_does_not_end_a_run(tmp_path: Path) -> None:
    def fail() -> None:
        raise DecodeError("is no image")

    (tmp_path / "file").touch()
    assert (
        train(Images(fail), workers=0, bad=BadFiles(tmp_path / "file" / "bad_files.txt", 0.5)) == 8
    )


def test_pipes_devices_and_files_that_shrink_or_vanish_are_items_that_failed(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in (str(tmp_path / "pipe.png"), "/dev/zero", str(tmp_path)):
        with pytest.raises(OSError, match=r"not a file|directory"):
            IMAGES.read(name)
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match=r"1,099\.5 GB, more than a file of one image may have"):
        IMAGES.read(str(tmp_path / "sparse.png"))
    (tmp_path / "short.png").write_bytes(b"")
    assert IMAGES.read(str(tmp_path / "short.png")) == b""


def test_a_worker_whose_main_process_was_killed_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for error in (
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(),
        EOFError(),
    ):
        workers_module._quiet_of_lost_connections(type(error), error, None)
    assert capsys.readouterr().err == ""
    workers_module._quiet_of_lost_connections(ValueError, ValueError("a fault"), None)
    assert "a fault" in capsys.readouterr().err


def test_a_worker_whose_main_process_was_killed_before_it_began_ends_by_itself() -> None:
    pid = os.fork()
    if pid == 0:  # a worker that is told of another main process than its parent, which is gone
        workers_module._prepare_worker(os.getppid() + 1, 0)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
