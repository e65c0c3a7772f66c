"""resume=auto: the same command again begins a run, goes on with it, or says that it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import killed
from PIL import Image
from small_runs import DECODER, SMALL, VIT, assert_near
from torch import Tensor

import patchmine
from patchmine.errors import UserError
from patchmine.runs.lock import lock

pytestmark = pytest.mark.bitwise

TINY: dict[str, Any] = SMALL | VIT
LONG: dict[str, Any] = TINY | DECODER | {"steps": 6, "checkpoint_every": 2, "log_every": 1}


def same_again(data: Path, out: Path, **settings: Any) -> patchmine.Run:
    return patchmine.pretrain(data=data, out=out, **{**LONG, "resume": "auto", **settings})


def same_killed(moment: str, data: Path, out: Path) -> None:
    killed(moment, "pretrain", data=data, out=out, resume="auto", **LONG)


@pytest.fixture(scope="module")
def whole(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory, weights: Any
) -> dict[str, Tensor]:
    """The weights of a run that nothing broke."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    found: dict[str, Tensor] = weights(patchmine.pretrain(data=image_folder, out=out, **LONG))
    return found


@pytest.mark.parametrize(
    "moment",
    [
        "before the settings",
        "within the settings",
        "before the first checkpoint",
        "after checkpoint 4",
        "after checkpoint 6",
    ],
)
def test_the_same_command_thrice_is_one_run(
    moment: str, image_folder: Path, whole: dict[str, Tensor], tmp_path: Path, weights: Any
) -> None:
    broken = tmp_path / "broken"
    same_killed(moment, image_folder, broken)
    same_again(image_folder, broken)
    said: list[str] = []
    run = same_again(image_folder, broken, say=said.append)
    assert "going on from step 6" in "\n".join(said)
    assert said[-1].startswith(f"Done: {broken}")
    for name, tensor in weights(run).items():
        assert tensor.equal(whole[name]), name
    assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_what_decides_the_weights_must_be_as_it_was(image_folder: Path, tmp_path: Path) -> None:
    run = same_again(image_folder, tmp_path / "run")
    before = run.config_file.read_bytes()
    with pytest.raises(UserError) as told:
        same_again(image_folder, run.path, blr=1.0, **{"method.mask_ratio": 0.5})
    text = str(told.value)
    assert "holds a run with other settings" in text
    assert "method.mask_ratio (was 0.75, now 0.5)" in text
    assert "blr (was 0.00015, now 1.0)" in text
    assert "choose another out" in text
    assert run.config_file.read_bytes() == before


def test_other_images_are_refused_and_moved_ones_are_not(
    image_folder: Path, tmp_path: Path
) -> None:
    same_again(image_folder, tmp_path / "run")
    moved = tmp_path / "moved"
    moved.symlink_to(image_folder)
    assert same_again(moved, tmp_path / "run").config.data == str(moved)
    with pytest.raises(UserError, match="was written with other data"):
        same_again(Path("embedded:photos"), tmp_path / "run")


def test_where_and_how_follows_the_command(image_folder: Path, tmp_path: Path) -> None:
    same_killed("after checkpoint 4", image_folder, tmp_path / "run")
    run = same_again(image_folder, tmp_path / "run", keep_checkpoints=1, workers=1)
    assert (run.config.keep_checkpoints, run.config.workers) == (1, 1)
    assert [path.name for path in run.checkpoints] == ["step-00000006.safetensors"]


def test_statistics_and_fitted_batches_are_no_other_settings(tmp_path: Path) -> None:
    """What a run finds in its data stands in its settings, and not in the command."""
    (tmp_path / "grey").mkdir()
    for i in range(6):
        Image.fromarray(np.full((20, 20), 30 * i, np.uint8)).save(tmp_path / "grey" / f"{i}.png")
    settings = {name: LONG[name] for name in LONG if name != "batch_size"}
    for _ in range(2):
        run = patchmine.pretrain(
            data=tmp_path / "grey", out=tmp_path / "run", resume="auto", channels=1, **settings
        )
    assert run.config.batch_size == 6
    assert run.config.mean is not None


def test_a_folder_that_is_no_run_is_refused(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="holds no run, but checkpoints"):
        same_again(image_folder, tmp_path)
    assert (tmp_path / "checkpoints" / "mine.txt").read_text() == "kept"


def test_a_run_of_another_kind_is_refused(image_folder: Path, tmp_path: Path) -> None:
    run = same_again(image_folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run with other settings.*kind"):
        patchmine.finetune(
            run.path, data=image_folder, out=run.path, resume="auto", steps=2, **SMALL
        )


def test_never_is_as_before(image_folder: Path, tmp_path: Path) -> None:
    same_again(image_folder, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run, which is left as it is"):
        same_again(image_folder, tmp_path / "run", resume="never")


def test_the_second_at_once_hears_of_the_first(image_folder: Path, tmp_path: Path) -> None:
    with (
        lock(tmp_path / "run"),
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on host"),
    ):
        same_again(image_folder, tmp_path / "run")


def test_fine_tuning_goes_on_by_the_same_command(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    settings: dict[str, Any] = SMALL | dict(steps=6, batch_size=8, checkpoint_every=2)
    start = same_again(image_folder, tmp_path / "start", steps=1)

    def again(out: str, **more: Any) -> patchmine.Run:
        return patchmine.finetune(
            start.path, data=image_folder, out=tmp_path / out, **{**settings, **more}
        )

    whole = weights(again("whole"))
    more = {**settings, "data": image_folder, "out": tmp_path / "broken", "resume": "auto"}
    killed("after checkpoint 4", "finetune", start.path, **more)
    said: list[str] = []
    run = again("broken", resume="auto", say=said.append)
    assert "going on from step 4" in "\n".join(said)
    for name, tensor in weights(run).items():
        assert tensor.equal(whole[name]), name
    assert (run.eval_dir / "test.json").is_file()
    with pytest.raises(UserError, match=r"holds a run with other settings.*seed \(was 0, now 3\)"):
        again("broken", resume="auto", seed=3)


def test_an_extension_goes_on_and_does_not_begin_anew(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    start = same_again(image_folder, tmp_path / "start", steps=2)

    def again(out: str, **more: Any) -> patchmine.Run:
        return start.extend(tmp_path / out, steps=6, say=lambda _: None, **more)

    whole = weights(again("whole"))
    broken = tmp_path / "broken"
    killed("after checkpoint 4", "extend", start.path, out=broken, steps=6, resume="auto")
    run = again("broken", resume="auto")
    for name, tensor in weights(run).items():
        assert tensor.equal(whole[name]), name


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_by_the_same_command(
    image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = {**LONG, "steps": 40, "data": image_folder, "out": out, "devices": 2}
    words = [f"{name}={value}" for name, value in settings.items() if name != "say"]
    program = [sys.executable, "-m", "patchmine", "pretrain", "resume=auto", *words]
    first = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 200
    while not any((out / "checkpoints").glob("step-*.safetensors")):
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run(program, check=True, capture_output=True, timeout=250, text=True)
    assert "going on from step" in again.stdout + again.stderr
    whole = patchmine.pretrain(
        data=image_folder, out=tmp_path / "whole", **{**LONG, "steps": settings["steps"]}
    )
    assert_near(patchmine.Run(out), whole, atol=2e-4, rtol=1e-3)
