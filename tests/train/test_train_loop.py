"""The loop by its promises: exact resume, accumulation, skipped steps, stopping, hooks, metrics."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from toy import Toy, toy_batches

from patchmine.errors import UserError
from patchmine.train import keeper
from patchmine.train.checkpoint import list_checkpoints, load, load_newest
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.loop import num_pictures, train
from patchmine.train.settings import TrainSettings
from patchmine.train.signals import Interrupted, StopSignals
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.bitwise

Run = Callable[..., Any]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def stop_at(step: int, total: int, number: int = signal.SIGTERM) -> Iterator[Batch]:
    """Batches of a run that is asked to stop while ``step`` (0-based) is being made."""
    for at, batch in enumerate(toy_batches(0, total, 8)):
        if at == step:
            os.kill(os.getpid(), number)
        yield batch


@pytest.mark.parametrize("stop_step", [2, 4, 7])
def test_an_interrupted_run_goes_on_bit_by_bit(
    run_toy: Run, tmp_path: Path, stop_step: int
) -> None:
    whole = run_toy("whole")
    with pytest.raises(Interrupted):
        run_toy("parts", batches=stop_at(stop_step, 12))
    start = load_newest(tmp_path / "parts/checkpoints", print)
    assert start.step == stop_step + 1
    resumed = run_toy("parts", start=start)
    assert_same(whole, resumed)
    states = [load(tmp_path / name / "checkpoints/last") for name in ("whole", "parts")]
    assert states[0].optimizer.keys() == states[1].optimizer.keys()
    assert all(
        torch.equal(states[0].optimizer[name], states[1].optimizer[name])
        for name in states[0].optimizer
    )
    assert [line["step"] for line in lines(tmp_path / "parts")] == [4, 8, 12]


def test_a_killed_run_repeats_what_was_not_saved(run_toy: Run, tmp_path: Path) -> None:
    whole = run_toy("whole", log_every=1)

    def killed(step: int) -> Iterator[Batch]:
        yield from toy_batches(0, step, 8)
        raise ConnectionError("power failure")

    with pytest.raises(ConnectionError):
        run_toy("parts", log_every=1, batches=killed(8))
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = run_toy(
        "parts", log_every=1, start=load_newest(tmp_path / "parts/checkpoints", print)
    )
    assert_same(whole, resumed)

    def timeless(line):
        return {k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")}

    assert [timeless(line) for line in lines(tmp_path / "parts")] == [
        timeless(line) for line in lines(tmp_path / "whole")
    ]


def test_accumulating_two_halves_is_one_step(run_toy: Run) -> None:
    once, twice = run_toy("once"), run_toy("twice", accumulate=2)
    for name, value in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_metrics_hold_what_the_report_needs(run_toy: Run, tmp_path: Path) -> None:
    run_toy(total_steps=10, log_every=4)
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [4, 8, 10]
    assert found[1]["epoch"] == 1.6
    assert found[1]["samples"] == 64
    assert {
        "loss",
        "pixels",
        "lr",
        "lr_sgd",
        "grad_norm",
        "skipped",
        "images_per_second",
        "data_wait",
    } <= found[0].keys()
    assert 0 <= found[0]["data_wait"] <= 1


def test_a_metrics_line_is_the_mean_of_its_interval(run_toy: Run, tmp_path: Path) -> None:
    run_toy("each", log_every=1)
    run_toy("fours", log_every=4)
    each = [line["loss"] for line in lines(tmp_path / "each")]
    fours = [line["loss"] for line in lines(tmp_path / "fours")]
    assert fours == pytest.approx([sum(each[i : i + 4]) / 4 for i in (0, 4, 8)], rel=1e-5)


def test_steps_without_a_finite_loss_are_skipped_counted_and_left_out(
    run_toy: Run, tmp_path: Path
) -> None:
    method = run_toy(method=Toy(nan_steps=(1, 2, 9)))
    assert all(value.isfinite().all() for value in method.state_dict().values())
    found = lines(tmp_path / "run")
    assert [line["skipped"] for line in found] == [2, 0, 1]
    assert all(math.isfinite(line["loss"]) for line in found)
    assert load(tmp_path / "run/checkpoints/last").optimizer["encoder.weight.step"] == 9


def test_too_many_skipped_steps_stop_the_run_with_advice(run_toy: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"not finite in 1\d steps in a row .*step-00000015.*smaller blr \(now 0\.5\)",
    ):
        run_toy(method=Toy(nan_steps=tuple(range(6, 40))), total_steps=40)
    saved = load(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    assert all(value.isfinite().all() for value in saved.model.values())
    assert lines(tmp_path / "run")[-2]["loss"] is None


def test_skipped_steps_with_good_ones_between_do_not_stop_it(run_toy: Run) -> None:
    run_toy(method=Toy(nan_steps=tuple(step for step in range(40) if step % 5)), total_steps=40)


def spoil_teacher(method: Toy) -> None:
    method.teacher.bias.data[0] = torch.nan


def spoil_weights(method: Toy) -> None:
    method.decoder[1].weight.data[0, 0] = torch.inf


def spoil_a_buffer(method: Toy) -> None:
    method.register_buffer("centre", torch.tensor([0.0, -torch.inf]))


@pytest.mark.parametrize(
    ("spoil", "tensor"),
    [
        (spoil_teacher, "model.teacher.bias"),
        (spoil_weights, "model.decoder.1.weight"),
        (spoil_a_buffer, "model.centre"),
    ],
)
@pytest.mark.parametrize("total", [12, 10])
def test_a_state_that_is_not_finite_is_neither_saved_nor_done(
    run_toy: Run, tmp_path: Path, spoil: Callable[[Toy], None], tensor: str, total: int
) -> None:
    """Between the checkpoints of steps 5 and 10, the last of which may be the end of the run."""
    method = Toy()
    stepped = method.after_step

    def after_step(progress: Progress) -> None:
        stepped(progress)
        if progress.step == total - 2:
            spoil(method)

    method.after_step = after_step  # type: ignore[method-assign]
    good = "step-00000010" if total == 12 else "step-00000005"
    with pytest.raises(
        UserError, match=rf"after step {total} {tensor} .*last good state is .*{good}"
    ):
        run_toy(method=method, total_steps=total)
    assert list_checkpoints(tmp_path / "run/checkpoints")[-1].stem == good


def test_moments_that_are_not_finite_are_not_saved(
    run_toy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = keeper.optimizer_tensors

    def spoilt(optimizers: Any) -> dict[str, Any]:
        return {
            name: t / 0 if name.endswith("exp_avg_sq") else t
            for name, t in original(optimizers).items()
        }

    monkeypatch.setattr(keeper, "optimizer_tensors", spoilt)
    with pytest.raises(
        UserError, match=r"after step 5 optimizer\.encoder\..*exp_avg_sq .*no earlier good state"
    ):
        run_toy()


@pytest.mark.parametrize("blr", [1e30, 1e300])
def test_rates_that_overflow_the_weights_stop_at_the_first_checkpoint(
    run_toy: Run, tmp_path: Path, blr: float
) -> None:
    with pytest.raises(UserError, match="not finite"):
        run_toy(blr=blr, checkpoint_every=1, total_steps=40)
    for path in list_checkpoints(tmp_path / "run/checkpoints"):
        assert all(value.isfinite().all() for value in load(path).model.values())


def test_skipped_steps_are_summed_up_at_the_end_and_over_a_resume(
    run_toy: Run, tmp_path: Path
) -> None:
    said: list[str] = []
    spoilt = dict(method=Toy(nan_steps=(1, 2, 3, 9)))
    with pytest.raises(Interrupted):
        run_toy(batches=stop_at(6, 12), say=said.append, **spoilt)
    assert not any("were skipped" in text for text in said)
    start = load_newest(tmp_path / "run/checkpoints", print)
    assert start.facts["skipped"] == 3
    run_toy(start=start, say=said.append, method=Toy(nan_steps=(1, 2, 3, 9)))
    assert "4 of 12 steps were skipped because loss or gradient was not finite" in said[-1]


def test_a_short_run_that_skips_every_step_is_not_done(run_toy: Run) -> None:
    with pytest.raises(UserError, match="not finite in 4 steps in a row"):
        run_toy(method=Toy(nan_steps=tuple(range(4))), total_steps=4)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    run_toy: Run, tmp_path: Path, number: int, code: int, request: pytest.FixtureRequest
) -> None:
    said: list[str] = []
    given = signal.getsignal(number)
    if given == signal.SIG_IGN:  # under nohup, which a run respects
        signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, given))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run_toy(batches=stop_at(6, 12, number), say=said.append)
    assert caught.value.code == code
    assert load(tmp_path / "run/checkpoints/last").step == 7
    assert f"patchmine resume {tmp_path / 'run'}" in said[-1]
    assert signal.Signals(number).name in said[-1]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_obeyed_at_once(run_toy: Run, tmp_path: Path) -> None:
    def impatient() -> Iterator[Batch]:
        for step, batch in enumerate(toy_batches(0, 12, 8)):
            if step == 6:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with pytest.raises(KeyboardInterrupt):
        run_toy(batches=impatient())
    assert load(tmp_path / "run/checkpoints/last").step == 5


def test_a_third_interrupt_ends_the_process_without_a_traceback() -> None:
    program = """
import os, signal
from patchmine.train.signals import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_several_processes_ask_for_signals_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = list[int](), 0.0
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    stop, asked_at = StopSignals(), list[int]()

    def largest(number: int) -> int:
        asked.append(number)
        return number

    for made in range(1, 41):
        clock += 5.0 if made <= 3 else 0.25  # the first steps compile
        before = len(asked)
        stop.received = signal.SIGTERM if made > 30 else 0
        found = stop.shared(made, largest)
        if len(asked) > before:
            asked_at.append(made)
            assert found == stop.received
    assert asked_at == [*range(1, 11), *range(12, 41, 4)]


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_waits_is_told_at_the_first_signal(run_toy: Run) -> None:
    told: list[str] = []
    with pytest.raises(Interrupted):
        run_toy(batches=stop_at(6, 12), on_stop=lambda: told.append("stopping"))
    assert told == ["stopping"]


def test_a_signal_in_the_last_step_changes_nothing(run_toy: Run) -> None:
    run_toy(batches=stop_at(11, 12))


def test_checkpoints_come_every_so_often_and_at_the_end(run_toy: Run, tmp_path: Path) -> None:
    run_toy(checkpoint_every=4, total_steps=10, keep_checkpoints=2)
    assert [load(path).step for path in list_checkpoints(tmp_path / "run/checkpoints")] == [8, 10]


def test_the_pace_of_the_first_steps_is_told_once(run_toy: Run, tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []

    def on_pace(done: Any, seconds: float) -> None:
        told.append((done.step, seconds))

    run_toy(on_pace=on_pace)
    ((step, seconds),) = told
    assert step == 5
    assert 0 < seconds < math.inf
    run_toy("short", on_pace=on_pace, total_steps=5)  # whose end has come
    start = load(tmp_path / "run/checkpoints/step-00000005.safetensors")
    run_toy(start=start, on_pace=on_pace)
    assert len(told) == 1


def test_hooks_are_called_at_their_steps_and_may_switch_to_eval_mode(run_toy: Run) -> None:
    epochs: list[int] = []
    samples: list[int] = []
    method = Toy()

    def on_epoch(progress: Any) -> None:
        epochs.append(progress.step)
        method.eval()

    run_toy(
        method=method,
        on_epoch=on_epoch,
        on_sample=lambda progress: samples.append(progress.step),
        sample_every=4,
    )
    assert epochs == [5, 10, 12]
    assert samples == [4, 8, 12]
    assert method.epochs_begun == 3
    assert method.training


def test_pictures_come_before_the_first_step_soon_after_and_ever_further_apart(
    run_toy: Run, tmp_path: Path
) -> None:
    def pictured(name: str, **given: Any) -> list[int]:
        found: list[int] = []
        run_toy(name, on_sample=lambda done: found.append(done.step), total_steps=34, **given)
        return found

    assert pictured("whole") == [0, 1, 3, 10, 30, 34]
    assert num_pictures(TrainSettings(), Progress(0, 34, 5)) == 6
    assert num_pictures(TrainSettings(sample_every=10), Progress(0, 34, 5)) == 4
    with pytest.raises(Interrupted):
        pictured("parts", batches=stop_at(6, 34))
    start = load_newest(tmp_path / "parts/checkpoints", print)
    assert pictured("parts", start=start) == [10, 30, 34]


def test_the_first_steps_are_shown_whatever_the_interval_of_the_log(
    run_toy: Run, tmp_path: Path
) -> None:
    for name, every in (("seldom", 1000), ("often", 4)):
        said: list[str] = []
        run_toy(name, log_every=every, checkpoint_every=9, say=said.append)
        assert said[0].startswith("step 1/12")
        assert all(word in said[0] for word in ("loss", "samples/s", "left"))
        (told,) = [text for text in said if "first checkpoint" in text]
        assert "after step 9, under 1 min from now" in told
    # What is shown in between leaves no trace in what is written
    assert [line["step"] for line in lines(tmp_path / "seldom")] == [12]
    fours = [line["loss"] for line in lines(tmp_path / "often")]
    assert lines(tmp_path / "seldom")[0]["loss"] == pytest.approx(sum(fours) / 3, rel=1e-5)


def test_a_terminal_shows_loss_speed_and_time_left_long_before_the_log_is_written(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    reading, writing = pty.openpty()
    seen = bytearray()

    def watch() -> None:
        with suppress(OSError):  # the other end is closed
            while piece := os.read(reading, 4096):
                seen.extend(piece)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with os.fdopen(writing, "w") as terminal:
        console, length = Console(file=terminal, width=140), 2000
        assert console.is_terminal
        batches = stop_at(2, length)
        with pytest.raises(Interrupted):
            run_toy(total_steps=length, log_every=1000, batches=batches, console=console)
    watcher.join()
    os.close(reading)
    shown = seen.decode()
    assert "3/2000" in shown
    assert re.search(r"loss \d+\.\d{4}  \S+ samples/s", shown)
    assert re.search(r"left \d+:\d\d:\d\d", shown)
    assert lines(tmp_path / "run") == []


def test_a_run_that_goes_on_promises_no_first_checkpoint(run_toy: Run, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_toy(batches=stop_at(0, 12))
    said: list[str] = []
    start = load_newest(tmp_path / "run/checkpoints", print)
    run_toy(start=start, say=said.append)
    assert said[0].startswith("step 2/12")
    assert not any("first checkpoint" in text for text in said)


def test_resuming_with_other_data_or_settings_is_refused(run_toy: Run, tmp_path: Path) -> None:
    run_toy(identity={"data": "abc", "settings": "s1"})
    start = load_newest(tmp_path / "run/checkpoints", print)
    with pytest.raises(
        UserError, match=r"step-00000012\.safetensors was written with other data .*abc, now xyz"
    ):
        run_toy(start=start, total_steps=20, identity={"data": "xyz", "settings": "s1"})


def test_a_checkpoint_of_another_model_is_refused(run_toy: Run, tmp_path: Path) -> None:
    run_toy()
    start = load(tmp_path / "run/checkpoints/last")
    other = Toy()
    other.decoder = torch.nn.Sequential(torch.nn.Linear(8, 12))
    other.param_groups = lambda: Toy.__base__.param_groups(other)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="does not fit this model and method"):
        run_toy(method=other, start=start, total_steps=20)


def test_a_finished_run_has_nothing_left_to_do(run_toy: Run, tmp_path: Path) -> None:
    whole = run_toy()
    again = run_toy(start=load(tmp_path / "run/checkpoints/last"))
    assert again.epochs_begun == 0 or again.epochs_begun == whole.epochs_begun
    assert_same(whole, again)


def test_a_batch_that_cannot_be_shared_out_is_refused(run_toy: Run) -> None:
    with pytest.raises(UserError, match=r"batch_size=8 .*accumulate=3"):
        run_toy(accumulate=3)


def test_batches_of_the_wrong_size_are_a_mistake_of_ours(run_toy: Run) -> None:
    with pytest.raises(ValueError, match="step 0 needs a batch of 8 images and got 4"):
        run_toy(batches=toy_batches(0, 12, 4))
    with pytest.raises(ValueError, match="step 3 needs a batch of 8 images and got none"):
        run_toy(batches=toy_batches(0, 3, 8))


def test_bf16_computes_in_bf16_and_hands_over_the_images_untouched(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watched(Toy):
        def forward(self, batch: Batch, progress: Any) -> Any:
            seen.extend([batch.views[0].dtype, self.encoder(batch.views[0].flatten(1)).dtype])
            return super().forward(batch, progress)

    engine = Engine(device="cpu", precision="bf16")
    settings = TrainSettings(batch_size=8, warmup_epochs=0)
    method = Watched()
    with Log(tmp_path, total_steps=3, say=lambda text: None, tensorboard=False) as log:
        keeper, length = Keeper(tmp_path / "checkpoints"), Progress(0, 3, 3)
        train(method, toy_batches(0, 3, 8), engine, settings, length, keeper=keeper, log=log)
    assert seen[:2] == [torch.float32, torch.bfloat16]
    assert {p.dtype for p in method.parameters()} == {torch.float32}
