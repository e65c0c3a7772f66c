"""Runs in trouble: two writers, removed folders, full disks, states that are not finite; nothing is
lost in silence.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from patchmine.errors import UserError
from patchmine.methods.mae import MAE
from patchmine.report import monitor
from patchmine.report.show import run_progress
from patchmine.runs.folder import RunFolder
from patchmine.runs.lock import lock
from patchmine.train import checkpoint
from patchmine.training import whole
from spoken import call

SMALL = [
    *(
        "model=vit_tiny_patch16_224",
        "model_args={depth: 1, embed_dim: 32, num_heads: 2}",
        "image_size=16",
    ),
    *(
        "patch_size=4",
        "method.decoder_embed_dim=16",
        "method.decoder_depth=1",
        "method.decoder_num_heads=2",
    ),
    *("batch_size=4", "steps=6", "warmup_epochs=0", "workers=0", "tensorboard=false", "device=cpu"),
    *("checkpoint_every=2", "log_every=1", "sample_every=2"),
]
FORK = multiprocessing.get_context("fork")
Weights = Callable[[Path | RunFolder], dict[str, torch.Tensor]]


def start(data: Path, out: Path, *words: str) -> Result:
    return call("pretrain", f"data={data}", f"out={out}", *SMALL, *words)


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[MAE], None]) -> None:
    """Do something in the middle of a run, once, after a step."""
    done: list[int] = []

    def after_step(self: MAE, progress: Any) -> None:
        if progress.step == step and not done:
            done.append(step)
            act(self)

    monkeypatch.setattr(MAE, "after_step", after_step)


# One writer


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_of_two_starts_at_once_one_wins_and_its_run_is_whole(
    image_folder: Path, out: Path, tmp_path: Path, weights: Weights, delay: float
) -> None:
    def begin(seed: int) -> None:
        time.sleep(delay * seed)
        result = start(image_folder, out, f"seed={seed}")
        (tmp_path / f"said-{seed}").write_text(result.stderr)
        os._exit(result.exit_code)

    both = [FORK.Process(target=begin, args=(seed,)) for seed in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    codes = [process.exitcode for process in both]
    assert sorted(codes) == [0, 2]
    winner = codes.index(0)
    assert RunFolder(out).config.seed == winner
    loser = (tmp_path / f"said-{1 - winner}").read_text()
    assert (
        f"{out} is being written by process " in loser or f"out={out} already holds a run" in loser
    )
    assert start(image_folder, tmp_path / "alone", f"seed={winner}").exit_code == 0
    alone, found = weights(tmp_path / "alone"), weights(out)
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert not (out / ".lock").exists()


def test_a_run_that_is_being_written_can_be_read_and_not_resumed(
    image_folder: Path, out: Path, tmp_path: Path
) -> None:
    assert start(image_folder, out).exit_code == 0
    with lock(out):
        for result in (call("resume", str(out)), start(image_folder, out)):
            assert f"{out} is being written by process {os.getpid()} on host" in refused(result)
        assert call("report", str(out), f"out={tmp_path / 'r.html'}").exit_code == 0
        assert call("export", str(out), f"out={tmp_path / 'export'}").exit_code == 0
    assert call("resume", str(out)).exit_code == 0


def test_a_mistake_leaves_no_folder(tmp_path: Path, out: Path) -> None:
    refused(start(tmp_path / "nowhere", out))
    assert list(tmp_path.iterdir()) == []


# Removed, in the way, full


@pytest.mark.parametrize(
    "what", [".", "config.yaml", "checkpoints", "metrics.jsonl", "samples", ".lock"]
)
def test_what_is_removed_in_mid_run_is_made_again(
    image_folder: Path,
    out: Path,
    tmp_path: Path,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    def remove(_: MAE) -> None:
        path = out / what
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    assert start(image_folder, tmp_path / "whole").exit_code == 0
    at_step(monkeypatch, 2, remove)
    result = start(image_folder, out)
    assert result.exit_code == 0, result.output
    found, whole = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert RunFolder(out).config.steps == 6
    assert RunFolder(out).encoder() is not None
    assert (out / "export" / "model.safetensors").is_file()
    assert (out / "metrics.jsonl").is_file()


def test_a_run_that_somebody_else_took_over_stops(
    image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def take(_: MAE) -> None:
        shutil.rmtree(out)
        taken.append(lock(out))
        taken[0].__enter__()

    at_step(monkeypatch, 2, take)
    assert "is being written by process" in refused(start(image_folder, out))
    taken[0].__exit__(None, None, None)


@pytest.mark.parametrize("what", ["samples", "bad_files.txt", "events"])
def test_foreign_things_in_a_run_folder_do_not_stop_a_resume(
    image_folder: Path, out: Path, what: str
) -> None:
    assert start(image_folder, out).exit_code == 0
    RunFolder(out).checkpoints[-1].unlink()
    path = out / what
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file")
    else:
        path.mkdir()
    result = call("resume", str(out))
    assert result.exit_code == 0, result.output
    assert RunFolder(out).checkpoints[-1].stem == "step-00000006"


def test_a_file_in_the_place_of_checkpoints_is_told(image_folder: Path, out: Path) -> None:
    assert start(image_folder, out).exit_code == 0
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").write_text("a file")
    assert f"checkpoint {out}/checkpoints/step-" in refused(call("resume", str(out)))


def test_a_picture_that_fails_costs_one_line(
    image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor, "draw_panels", full)
    result = start(image_folder, out)
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "the picture after step 2 failed" in warnings[0]
    assert "No space left on device" in warnings[0]


def test_an_evaluation_that_fails_costs_one_line(
    image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(*_: Any, **__: Any) -> None:
        raise UserError("labelled images are gone")

    monkeypatch.setattr(monitor, "knn_in_training", moved)
    result = start(image_folder, out, "eval_every=1", f"eval_data={image_folder}")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("labelled images are gone") == 1


def test_an_export_that_fails_is_made_up_for_by_resume(
    image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "write_export", full)
    told = refused(start(image_folder, out))
    assert f"{out} is trained to its end" in told
    assert f"patchmine resume {out}" in told
    monkeypatch.undo()
    assert call("resume", str(out)).exit_code == 0
    assert (out / "export" / "config.json").is_file()


@pytest.mark.parametrize("place", ["file/run", "file/below/run", "file"])
def test_an_out_that_cannot_be_made_is_told(image_folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    told = refused(start(image_folder, tmp_path / place))
    assert str(tmp_path / place) in told
    assert told.count("\n") == 1


# Not finite


def spoil(method: MAE) -> None:
    method.get_parameter("encoder.norm.weight").data[3] = float("nan")


@pytest.mark.parametrize(("step", "saving"), [(2, 4), (5, 6)])
def test_a_state_that_is_not_finite_ends_a_run_with_a_sentence(
    image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, step: int, saving: int
) -> None:
    """In the middle, and in the very last step, after which the loss is never seen."""
    at_step(monkeypatch, step, spoil)
    told = refused(start(image_folder, out))
    saved = RunFolder(out).checkpoints
    for part in (
        "model.encoder.norm.weight",
        f"after step {saving} ",
        f"good state is {saved[-1]}",
    ):
        assert part in told
    assert "Done" not in told
    for path in saved:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert not (out / "export").exists()


@pytest.mark.parametrize("blr", ["1e8", "1e20", "1e30"])
def test_rates_that_blow_the_weights_up_leave_only_finite_checkpoints(
    image_folder: Path, out: Path, blr: str
) -> None:
    result = start(
        image_folder, out, f"blr={blr}", "checkpoint_every=1", "steps=30", "keep_checkpoints=3"
    )
    for path in (out / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    if result.exit_code != 0:
        assert "not finite" in refused(result)


def write_as_before(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A checkpoint as versions wrote it that did not look at what they saved."""
    found = checkpoint.load(path)
    state = {name: tensor.clone() for name, tensor in found.model.items()}
    change(state)
    parts = {"model": state, "optimizer": found.optimizer}
    path.unlink()
    checkpoint.write_file(path, found.step, parts, found.facts)


def with_nan(state: dict[str, torch.Tensor]) -> None:
    state["encoder.norm.weight"][3] = float("nan")


def test_states_of_earlier_versions_that_are_not_finite(
    image_folder: Path, out: Path, weights: Weights
) -> None:
    assert start(image_folder, out).exit_code == 0
    before = weights(out)
    for path in RunFolder(out).checkpoints[1:]:
        write_as_before(path, with_nan)
    shutil.rmtree(out / "export")
    for read in (RunFolder(out).encoder, RunFolder(out).method):
        with pytest.raises(
            UserError,
            match=r"step-00000006.* encoder\.norm\.weight holds values that are not finite",
        ):
            read()
    assert "encoder.norm.weight" in refused(call("export", str(out)))
    result = call("resume", str(out))
    assert result.exit_code == 0, result.output
    for step in ("step-00000004", "step-00000006", "step-00000002"):
        assert step in result.stderr
    found = weights(out)
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_skipped_steps_are_summed_up(
    image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MAE.forward

    def sometimes(self: MAE, batch: Any, progress: Any) -> Any:
        losses = original(self, batch, progress)
        return {"loss": losses["loss"] * float("nan")} if progress.step in (1, 4) else losses

    monkeypatch.setattr(MAE, "forward", sometimes)
    result = start(image_folder, out)
    assert result.exit_code == 0
    assert "2 of 6 steps were skipped because loss or gradient was not finite" in result.stderr


def test_the_remedy_of_a_diverged_run_names_no_precision_that_it_has(
    image_folder: Path, out: Path
) -> None:
    told = refused(start(image_folder, out, "blr=1e300"))
    assert "a smaller blr (now 1e+300) or longer warmup_epochs (now 0)" in told
    assert "fp32" not in told.split("not saved")[1]
    assert "precision=fp32" in refused(
        start(image_folder, out.with_name("bf16"), "blr=1e300", "precision=bf16")
    )


# Edited, mixed up


def test_settings_that_were_edited_since_a_checkpoint_are_refused(
    image_folder: Path, out: Path
) -> None:
    """Or a run would go on with weights that no settings describe; where and how it runs may be
    edited.
    """
    assert start(image_folder, out).exit_code == 0
    RunFolder(out).checkpoints[-1].unlink()
    config = out / "config.yaml"
    whole = config.read_text()
    config.write_text(
        whole.replace("blr: 0.00015", "blr: 0.001").replace("log_every: 1", "log_every: 3")
    )
    told = refused(call("resume", str(out)))
    assert "step-00000004.safetensors was written with other settings" in told
    assert "blr (was 0.00015, now 0.001)." in told
    assert "log_every" not in told
    config.write_text(whole.replace("log_every: 1", "log_every: 3"))
    assert call("resume", str(out)).exit_code == 0
    assert RunFolder(out).config.log_every == 3


def test_a_checkpoint_of_another_run_is_refused(image_folder: Path, out: Path) -> None:
    assert start(image_folder, out).exit_code == 0
    assert start(image_folder, out.with_name("other"), "seed=5", "steps=8").exit_code == 0
    stranger = RunFolder(out.with_name("other")).checkpoints[-1]
    shutil.copy(stranger, out / "checkpoints")
    told = refused(call("resume", str(out)))
    assert stranger.name in told
    assert "seed (was 5, now 0)" in told
    assert "remove that file if it is of another run" in told


@pytest.mark.parametrize(
    "name", ["checkpoints/step-00000001.safetensors", "metrics.jsonl", "export/mine", "samples"]
)
def test_files_that_are_no_runs_are_not_written_over(
    image_folder: Path, out: Path, name: str
) -> None:
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    (out / "notes.txt").write_text("mine too")
    assert f"holds no run, but {Path(name).parts[0]}," in refused(start(image_folder, out))
    assert (out / name).read_text() == "mine"
    assert not (out / "config.yaml").exists()


def test_empty_folders_and_files_of_other_names_may_wait_for_a_run(
    image_folder: Path, out: Path
) -> None:
    (out.parent / "large disk").mkdir(parents=True)
    out.mkdir()
    (out / "checkpoints").symlink_to("../large disk")
    (out / "notes.txt").write_text("mine")
    assert start(image_folder, out).exit_code == 0
    assert len(list((out.parent / "large disk").glob("step-*"))) == 3
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", [".", "run", "../images/run", "a/b"])
def test_a_run_among_its_own_data_is_refused(image_folder: Path, place: str) -> None:
    """Its pictures would be images of the data: a resume would find other data than it began with."""
    before = sorted(image_folder.rglob("*"))
    place = place.replace("images", image_folder.name)
    assert "where the run's pictures would be taken for images" in refused(
        start(image_folder, image_folder / place)
    )
    assert sorted(image_folder.rglob("*")) == before


# Progress for `show`


@pytest.mark.parametrize(
    "line", [b'{"step": "x", "epoch": []}', b'{"step": 4, "epoch": 1e300}', b"\xff", b"[" * 9000]
)
def test_show_survives_damaged_metrics(image_folder: Path, out: Path, line: bytes) -> None:
    assert start(image_folder, out).exit_code == 0
    (out / "metrics.jsonl").write_bytes(line)
    progress = run_progress(RunFolder(out))
    assert (progress.step, progress.total_steps) == (5, 6)
    assert progress.steps_per_epoch >= 1
