"""benchmarks/mining.py: runs of rows at equal time, and a table that goes on elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.drawn import draw_images

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
