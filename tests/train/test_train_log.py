"""What a user sees and what is written."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from patchmine.errors import UserError
from patchmine.train import log as logs
from patchmine.train.display import describe
from patchmine.train.log import Log, Meter, read_line, trim_metrics

LINE = {
    "step": 10,
    "epoch": 1.0,
    "samples": 80,
    "loss": 0.5,
    "lr": 1e-3,
    "images_per_second": 812.3,
    "data_wait": 0.034,
}


def test_meter_means_leave_out_what_is_not_finite() -> None:
    meter = Meter()
    for value in (1.0, math.nan, 3.0, math.inf):
        meter.add({"loss": torch.tensor(value), "other": torch.tensor(2.0)})
    meter.add({"rare": torch.tensor(5.0)})
    assert meter.read(lambda t: t) == {"loss": 2.0, "other": 2.0, "rare": 5.0}
    assert meter.read(lambda t: t) == {}
    meter.add({"loss": torch.tensor(math.nan)})
    assert math.isnan(meter.read(lambda t: t)["loss"])


def test_a_name_in_two_sets_of_losses_is_one_mean() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0)})
    meter.add({"loss": torch.tensor(3.0), "extra": torch.tensor(7.0)})
    assert meter.read(lambda t: t) == {"loss": 2.0, "extra": 7.0}


def test_plain_lines_come_first_now_and_then_and_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    with Log(
        tmp_path,
        total_steps=40,
        say=said.append,
        tensorboard=False,
        console=Console(file=io.StringIO()),
    ) as log:
        for step in (10, 20, 30, 40):
            now[0] += 3.0
            log.write({**LINE, "step": step})
    assert [text.split()[1] for text in said] == ["10/40", "30/40", "40/40"]
    assert "loss 0.5000  812 samples/s  data wait 3%" in said[0]
    assert "left" in said[0]


def test_a_terminal_gets_a_bar_with_the_numbers(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    said: list[str] = []
    with Log(
        tmp_path, total_steps=40, first_step=5, say=said.append, tensorboard=False, console=console
    ) as log:
        log.write(LINE)
        log.advance(10)
    shown = screen.getvalue()
    assert "10/40" in shown
    assert "loss 0.5000  812 samples/s  data wait 3%" in shown
    assert said == []


def test_the_time_left_is_that_of_the_steps_behind_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    said: list[str] = []
    with Log(
        tmp_path, total_steps=41, first_step=1, say=said.append, tensorboard=False, console=console
    ) as log:
        now[0] += 60.0  # workers start, blocks are compiled
        log.advance(2)
        log._display._bar.refresh()
        assert "left 0:39:00" in screen.getvalue()
        now[0] += 2.0
        log.advance(3)
        log.say_first_checkpoint(3, 33)
        log._display._bar.refresh()
    assert "left 0:01:16" in screen.getvalue()
    assert "due after step 33, 1 min from now" in said[0]


def test_a_slow_machine_has_a_speed_too() -> None:
    assert "0.35 samples/s" in describe({**LINE, "images_per_second": 0.351})


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path, total_steps=40, say=lambda text: None) as log:
        log.write(LINE)
        log.write({"step": 10, "eval": {"name": "knn", "top1": 43.2, "step": 10}})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "lr", "images_per_second", "eval/knn/top1"} <= set(events.Tags()["scalars"])
    assert events.Scalars("eval/knn/top1")[0].value == pytest.approx(43.2)


def test_resuming_removes_lines_that_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written = [
        {"step": 5},
        {"step": 10},
        {"eval": {"name": "knn", "step": 10}},
        {"eval": {"name": "knn", "step": 15}},
    ]
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [*written, {"step": 15}]) + '{"step": 1'
    )
    trim_metrics(path, 10)
    assert [json.loads(text) for text in path.read_text().splitlines()] == written[:3]


def test_a_run_that_begins_anew_writes_its_first_line_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval": {"name": "monitor"}}\n{"step": 5}\n')
    trim_metrics(path, 5)
    assert path.read_text().count("\n") == 2
    trim_metrics(path, 0)
    assert path.read_text() == ""


def test_json_stays_valid_when_numbers_are_not_finite(tmp_path: Path) -> None:
    with Log(tmp_path, total_steps=40, say=lambda text: None, tensorboard=False) as log:
        log.write({**LINE, "loss": math.nan, "grad_norm": math.inf})
    found = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert found["loss"] is None
    assert found["grad_norm"] is None


def test_other_processes_write_and_say_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with Log(None, total_steps=40, say=said.append) as log:
        log.write(LINE)
        log.advance(3)
        log.say("hello")
    assert said == []
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of any file fails, after a part of it may have been written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 20])
def test_a_full_disk_is_the_users_to_know_and_leaves_whole_lines(tmp_path: Path, room: int) -> None:
    with Log(tmp_path, total_steps=40, say=lambda text: None, tensorboard=False) as log:
        log.write(LINE)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with (
            files_of_at_most(len(before) + room),
            pytest.raises(
                UserError,
                match=r"metrics\.jsonl could not be written .*; make room|raise.*patchmine resume",
            ),
        ):
            log.write(LINE)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_metrics_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Log(folder, total_steps=40, say=lambda text: None, tensorboard=False) as log:
        log.write(LINE)
        shutil.rmtree(folder)
        log.write({**LINE, "step": 20})
    assert [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ] == [20]


def test_a_writer_that_fails_is_dropped_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def fail(*_: object) -> None:
        raise RuntimeError("the writer's thread is dead")

    monkeypatch.setattr(logs._TensorBoard, "write", fail)
    with Log(tmp_path, total_steps=40, say=said.append) as log:
        for step in (10, 20, 30):
            log.write({**LINE, "step": step})
    warnings = [text for text in said if text.startswith("warning")]
    assert len(warnings) == 1
    assert "TensorBoard gets no more numbers (the writer's thread is dead)" in warnings[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


DAMAGED_LINES = [
    b"\xff\xfe{",
    b'{"step": 5, "lo',
    b"[" * 5000,
    b'{"loss": 1}',
    b'{"step": NaN}',
    b'{"step": Infinity}',
    b'{"step": "5"}',
    b'{"step": true}',
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": 1e400}',
    b'{"eval": 3}',
    b"null",
    b"\x00\x00",
]


@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_a_damaged_line_is_set_aside_and_said(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 5}\n' + line + b'\n{"step": 10}\n{"step": 15}\n')
    said: list[str] = []
    Log(tmp_path, total_steps=40, first_step=10, say=said.append, tensorboard=False).close()
    assert path.read_bytes() == b'{"step": 5}\n{"step": 10}\n'
    assert (tmp_path / logs.DAMAGED).read_bytes() == line + b"\n"
    assert f"{path}: 1 damaged line moved to {tmp_path / logs.DAMAGED}." in said


def test_a_pipe_in_place_of_the_metrics_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written .*something else"):
        Log(tmp_path, total_steps=40, first_step=10, say=lambda text: None, tensorboard=False)


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_to_the_metrics_stops_a_resume(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    text = bytearray(
        b"".join(json.dumps({**LINE, "step": step}).encode() + b"\n" for step in range(10))
    )
    for at in random.integers(0, len(text), 1 + seed % 8):
        text[at] = random.integers(0, 256)
    (tmp_path / "metrics.jsonl").write_bytes(bytes(text))
    Log(tmp_path, total_steps=40, first_step=10, say=lambda text: None, tensorboard=False).close()
    for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines():
        assert read_line(line) is not None
