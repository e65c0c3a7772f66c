"""benchmarks/mining.py: runs of rows at equal time, and a table that goes on elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from fixtures.drawn import draw_images
from fixtures.small_runs import DECODER, VIT
from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import build_method
from patchmine.methods.hpm import HPM

TINY = ("batch_size=16", "device=cpu", "workers=0", "warmup_epochs=0", "tensorboard=false")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_get_the_time_of_mae_and_what_is_told_is_not_run_again(
    tmp_path: Path, repository: Path
) -> None:
    train = draw_images(tmp_path / "train", 64, ("a", "b"))
    test = draw_images(tmp_path / "test", 16, ("a", "b"))
    out = tmp_path / "out"

    def table(rows: str) -> str:
        command = [sys.executable, str(repository / "benchmarks" / "mining.py"), "train"]
        command += [str(train), str(test), "--out", str(out), "--rows", rows, "--seeds", "0"]
        command += ["--epochs", "5", "--equal", "time", *TINY]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout

    table("mae,hpm")
    price = json.loads((out / "prices.json").read_text())["hpm"]
    config = (out / "hpm-seed0" / "config.yaml").read_text()
    assert f"steps: {round(20 / price)}" in config

    shutil.rmtree(out / "hpm-seed0")
    shutil.rmtree(out / "mae-seed0")
    told = table("mae,hpm,half-size-first")
    assert not (out / "mae-seed0").exists()
    assert not (out / "hpm-seed0").exists()
    assert all(f"| {row} | 1 |" in told for row in ("mae", "hpm", "half-size-first"))
    assert "half-size-first-seed0-small" in (out / "half-size-first-seed0/config.yaml").read_text()


def test_claims_are_judged_by_the_seeds_that_both_rows_have(
    tmp_path: Path, repository: Path
) -> None:
    def run(linear: float, knn: float, **more: float) -> dict[str, float]:
        return {"linear": linear, "knn": knn, **more}

    few = {"1%": 30.0}
    mae = {"0": run(50, 40, **few), "1": run(50, 40), "2": run(50, 40), "7": run(10, 10)}
    hpm = {"0": run(51, 41, **{"1%": 35.0}), "1": run(52, 41), "2": run(53, 41)}
    easiest = {"0": run(50.0, 41), "1": run(49.9, 41), "2": run(50.1, 41), "7": run(9.8, 10)}
    told = {"mae": mae, "hpm": hpm, "easiest": easiest, "blocks-2": {"1": run(49, 40)}}
    (tmp_path / "results.json").write_text(json.dumps(told))
    command = [sys.executable, str(repository / "benchmarks" / "mining.py"), "page", str(tmp_path)]
    lines = subprocess.run(command, check=True, text=True, capture_output=True).stdout.splitlines()
    # Three seeds: Student's t is 4.303, so +-2.48 about 2 with a deviation of 1.
    published = "+2.00 (-0.48 to +4.48) | +1.00 (+1.00 to +1.00) | +5.00 | cannot be told |"
    assert f"| HPM as published | hpm over mae | {published}" in lines
    assert any("blocks-2 over mae | -1.00 | +0.00 |  | too few seeds |" in line for line in lines)
    (other,) = [line for line in lines if "mae over easiest" in line]
    assert "| +0.05 (-0.16 to +0.26) |" in other


@pytest.mark.parametrize(("gain", "said"), [(1.0, "holds"), (-1.0, "does not hold")])
def test_a_claim_holds_where_its_interval_leaves_no_zero(
    gain: float, said: str, tmp_path: Path, repository: Path
) -> None:
    seeds = {str(seed): 50 + seed / 10 for seed in range(3)}
    mae = {seed: {"linear": linear, "knn": 40.0} for seed, linear in seeds.items()}
    amt = {seed: {"linear": linear + gain, "knn": 40.0} for seed, linear in seeds.items()}
    (tmp_path / "results.json").write_text(json.dumps({"mae": mae, "amt": amt}))
    command = [sys.executable, str(repository / "benchmarks" / "mining.py"), "page", str(tmp_path)]
    told = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    assert f"({gain:+.2f} to {gain:+.2f}) | +0.00 (+0.00 to +0.00) | {said} |" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["page", "."], "holds no finished run of a row"),
        (["train", ".", ".", "--out", "out", "--rows", "none"], "no row none; there are mae,"),
        (["train", ".", ".", "--out", "out", "--seeds", "0,x"], "--seeds 0,x: give whole numbers"),
        (["train", ".", ".", "--out", "out"], "data=.: no image"),
    ],
)
def test_wrong_words_end_in_a_sentence_and_leave_nothing(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[str], ModuleType],
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(script("mining").main, words)
    assert isinstance(ended.exception, SystemExit)
    assert ended.exit_code != 0
    assert said in ended.output
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_is_named(tmp_path: Path, repository: Path) -> None:
    train = draw_images(tmp_path / "train", 16, ("a", "b"))
    command = [sys.executable, str(repository / "benchmarks" / "mining.py"), "train"]
    command += [str(train), str(train), "--out", str(tmp_path / "out"), "--rows", "mae"]
    command += ["--seeds", "0", "--epochs", "1", *TINY, "init=nowhere.pth"]
    ended = subprocess.run(command, text=True, capture_output=True, check=False)
    assert ended.returncode != 0
    assert "nowhere.pth" in ended.stderr
    assert "mae-seed0: a command of it failed, see above" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("row", "halved"), [("half-size-look", True), ("hpm", False)])
def test_a_row_is_priced_by_the_look_that_it_takes(
    row: str, halved: bool, script: Callable[[str], ModuleType]
) -> None:
    rows = script("mining_rows")
    options = {name.removeprefix("method."): value for name, value in DECODER.items()}
    sizes = {name: VIT[name] for name in ("model", "model_args", "patch_size", "image_size")}
    method = build_method("hpm", options, BenchStepSettings(**sizes))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rows.bend_look(rows.ROWS[row], method)
    assert isinstance(method, HPM)
    _, found = method.ask_teachers(images, True)
    assert found is not None
    assert torch.equal(found, rows.half_size_look(method, images)) is halved
