"""Checkpoints that are written while training goes on: the bits, the order and the errors of those
that are not.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Toy, toy_batches

from patchmine.errors import UserError
from patchmine.train import checkpoint, keeper
from patchmine.train.background import Beside, Snapshot
from patchmine.train.checkpoint import list_checkpoints, load
from patchmine.train.signals import Interrupted
from patchmine.types import Batch, Progress

Run = Callable[..., Toy]
BOTH = ("blocking", "background")
SOON = 60.0  # seconds after which a thread that should have been quick has failed


def files(folder: Path) -> dict[str, Any]:
    """Of each checkpoint all that the head says and the bytes behind it."""
    found = {}
    for path in list_checkpoints(folder / "checkpoints"):
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        found[path.name] = json.loads(content[8:end]), content[end:]
    return found


@pytest.mark.bitwise
def test_every_file_has_the_bits_of_blocking_saving(run_toy: Run, tmp_path: Path) -> None:
    for saving in BOTH:
        run_toy(saving, checkpoint_every=1, keep_checkpoints=20, saving=saving)
    made = [files(tmp_path / saving) for saving in BOTH]
    assert len(made[0]) == 12
    assert made[0] == made[1]
    assert not [*(tmp_path / "background" / "checkpoints").glob(".*")]


class Late:
    """Keeps `save` from writing until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
        self.asked, self.free = threading.Event(), threading.Event()
        save = keeper.save

        def late(folder: Path, own: int, *given: Any, **named: Any) -> Path:
            if own == step:
                self.asked.set()
                assert self.free.wait(SOON)
            return save(folder, own, *given, **named)

        monkeypatch.setattr(keeper, "save", late)


def test_steps_go_on_while_the_state_of_the_step_is_written(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_toy("blocking", keep_checkpoints=20)
    late, seen = Late(monkeypatch, step=5), list[bool]()

    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(toy_batches(0, 12, 8)):
            if step == 8:  # three steps on
                assert late.asked.wait(SOON)
                seen.append((tmp_path / "background" / "checkpoints" / "last").exists())
                late.free.set()
            yield batch

    run_toy("background", keep_checkpoints=20, saving="background", batches=batches())
    assert seen == [False]
    assert files(tmp_path / "background") == files(tmp_path / "blocking")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_what_cannot_be_written_stops_the_run_in_the_same_words(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write = checkpoint.save_file

    def refuse(tensors: Any, path: Path, **named: Any) -> None:
        if "00000005" in path.name:
            raise OSError(number, os.strerror(number))
        write(tensors, path, **named)

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    told = []
    for saving in BOTH:
        with pytest.raises(UserError, match="earlier checkpoints are intact") as error:
            run_toy(saving, checkpoint_every=1, saving=saving)
        told.append(str(error.value).replace(saving, "run"))
        assert [*files(tmp_path / saving)] == [f"step-{n:08d}.safetensors" for n in (2, 3, 4)]
    assert told[0] == told[1]


def test_an_error_is_told_before_the_next_checkpoint_is_due(
    run_toy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    drawn = list[int]()

    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(toy_batches(0, 40, 8)):
            drawn.append(step)
            for thread in threading.enumerate():
                if thread.name == "saving":
                    thread.join()
            yield batch

    with pytest.raises(UserError, match="No space left"):
        run_toy(checkpoint_every=20, total_steps=40, saving="background", batches=batches())
    assert drawn[-1] == 20


@pytest.mark.parametrize("saving", BOTH)
def test_a_state_that_is_not_finite_stops_the_run(
    run_toy: Run, tmp_path: Path, saving: str
) -> None:
    method = Toy()

    def spoil(_: Progress) -> None:
        method.teacher.weight.data[0, 0] = torch.inf

    with pytest.raises(UserError) as told:
        run_toy(method=method, on_epoch=spoil, saving=saving)
    assert "after step 5 model.teacher.weight holds values that are not finite" in str(told.value)
    assert "training stopped: start a new run with a smaller blr (now 0.5)" in str(told.value)
    assert not files(tmp_path / "run")


def test_who_is_asked_to_stop_waits_for_what_is_written(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, said = Late(monkeypatch, step=7), list[tuple[bool, str]]()
    last = tmp_path / "run" / "checkpoints" / "step-00000007.safetensors"

    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(toy_batches(0, 12, 8)):
            if step == 6:
                os.kill(os.getpid(), signal.SIGUSR1)
                threading.Timer(0.2, late.free.set).start()
            yield batch

    with pytest.raises(Interrupted):
        run_toy(
            saving="background",
            batches=batches(),
            say=lambda text: said.append((last.exists(), text)),
        )
    assert late.asked.is_set()
    assert [whole for whole, text in said if "checkpoint written" in text] == [True]
    assert load(last).step == 7


def test_another_error_waits_for_what_is_written_and_is_told(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(monkeypatch, step=5)

    def batches() -> Iterator[Batch]:
        yield from toy_batches(0, 6, 8)
        threading.Timer(0.2, late.free.set).start()
        raise UserError("data=photos is gone")

    with pytest.raises(UserError, match="data=photos is gone"):
        run_toy(saving="background", batches=batches())
    assert [load(path).step for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [5]


def test_a_snapshot_has_memory_of_its_own_which_is_used_again() -> None:
    take, tensor = Snapshot(), torch.arange(6.0).view(2, 3)
    first = take("a", tensor.t())
    assert first.is_contiguous()
    tensor += 1
    assert torch.equal(first, torch.arange(6.0).view(2, 3).t())
    assert take("a", tensor.t()).data_ptr() == first.data_ptr()
    assert torch.equal(take("a", tensor.half()), tensor.half())  # of another type, then
    assert take("b", tensor).data_ptr() != take("a", tensor).data_ptr()


def test_what_is_done_beside_is_raised_once_and_one_at_a_time() -> None:
    beside, order = Beside(), list[str]()
    free = threading.Event()
    beside.begin(lambda: (free.wait(SOON), order.append("first"))[1])
    threading.Timer(0.05, free.set).start()
    beside.begin(lambda: order.append("second"))
    beside.wait()
    assert order == ["first", "second"]
    beside.begin(lambda: [].pop())
    with pytest.raises(IndexError):
        beside.wait()
    assert not beside.failed
    beside.wait()


KILLED = """
import os, random, signal, sys, time, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from toy import Toy, toy_batches
from patchmine.train.checkpoint import list_checkpoints, load, load_newest
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.loop import train
from patchmine.train.settings import TrainSettings
from patchmine.types import Progress
torch.set_num_threads(1)
folder, engine = Path(sys.argv[1]), Engine(device="cpu")
settings = TrainSettings(batch_size=8, checkpoint_every=1, keep_checkpoints=2, saving="background",
                         warmup_epochs=0, sample_every=100_000)
def refuse(text):
    raise AssertionError(text)
def go_on(total):
    kept = list_checkpoints(folder)
    start = load_newest(folder, refuse) if kept else None
    first = start.step if start else 0
    with Log(None, total_steps=total, first_step=first, say=lambda text: None,
             tensorboard=False) as log:
        toy = Toy()
        toy.register_buffer("ballast", torch.zeros(200_000))
        train(toy, toy_batches(first, total, 8), engine, settings, Progress(0, total, 100_000),
              keeper=Keeper(folder, start), log=log)
random.seed(0)
warnings.simplefilter("ignore")
reached = 0
for trial in range(10):
    child = os.fork()
    if child == 0:
        go_on(100_000)
    while not (kept := list_checkpoints(folder)) or int(kept[-1].name[5:13]) <= reached:
        time.sleep(0.001)
    time.sleep(0.05 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = load_newest(folder, refuse)
    assert load(folder / "last").step in (found.step, found.step - 1)
    assert all(load(path) for path in list_checkpoints(folder))
    assert found.step > reached
    reached = found.step
go_on(reached + 3)
assert load_newest(folder, refuse).step == reached + 3
left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
assert left == [], left
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "kept"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
