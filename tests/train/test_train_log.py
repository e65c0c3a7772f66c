"""What a user sees and what is written."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from patchmine.errors import UserError
from patchmine.train import log as logs
from patchmine.train.log import Log, Meter, trim_metrics

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


def test_plain_lines_come_first_now_and_then_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    with Log(tmp_path, total_steps=40, say=said.append, tensorboard=False, console=Console(file=io.StringIO())) as log:
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
    with Log(tmp_path, total_steps=40, first_step=5, say=said.append, tensorboard=False, console=console) as log:
        log.write(LINE)
        log.advance(10)
    shown = screen.getvalue()
    assert "10/40" in shown
    assert "loss 0.5000  812 samples/s  data wait 3%" in shown
    assert said == []


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
    written = [{"step": 5}, {"step": 10}, {"eval": {"name": "knn", "step": 10}}, {"eval": {"name": "knn", "step": 15}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*written, {"step": 15}]) + '{"step": 1')
    trim_metrics(path, 10)
    assert [json.loads(text) for text in path.read_text().splitlines()] == written[:3]


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


def test_a_full_disk_is_the_users_to_know(tmp_path: Path) -> None:
    def write() -> None:
        with Log(tmp_path, total_steps=40, say=lambda text: None, tensorboard=False) as log:
            log._file.close()
            log._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115  (the log closes it)
            log.write(LINE)

    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written \(No space left on device\)"):
        write()
