"""HPM's ways to look in whole runs: what is remembered of the images survives a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import patchmine
from fixtures.small_runs import DECODER, SMALL, VIT, assert_resumes

# Epochs of 4 steps, hard patches from the first one on.
TINY = {
    **SMALL,
    **VIT,
    **DECODER,
    "method": "hpm",
    "method.decoder_depth": 2,
    "method.alpha_start": 0.5,
    "method.ema_start": 0.9,
    "steps": 16,
    "blr": 1e-2,
    "sample_every": 8,
    "log_every": 1,
    "checkpoint_every": 2,
    "keep_checkpoints": 20,
}
RUNGS = {
    "masked": {"method.look": "masked", "method.predictor": "head", "method.predictor_depth": 1},
    "observed": {"method.look": "masked", "method.score": "observed", "method.num_looks": 2},
    "memory": {"method.look": "memory", "method.prediction": "none"},
    "every": {"method.look": "masked", "method.predictor": "head", "method.every": 2},
}


@pytest.mark.bitwise
@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 8], ids=["within an epoch", "between epochs"])
@pytest.mark.parametrize("options", RUNGS.values(), ids=list(RUNGS))
def test_resumed_is_as_if_never_stopped(
    options: dict[str, Any], step: int, image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    run = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **(TINY | options))
    whole = weights(run)
    if "method.every" in options or options["method.look"] == "memory":
        assert whole["model.maps.values"].shape == (36, 16)
        assert whole["model.maps.values"].float().std() > 5
    assert_resumes(run, step, weights)


def test_a_run_tells_whether_mining_follows_the_image(image_folder: Path, tmp_path: Path) -> None:
    run = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **(TINY | RUNGS["masked"]))
    lines = [line for line in run.metrics() if "loss" in line]
    with pytest.raises(patchmine.UserError, match=r"has method\.predictor=head: use what=encoder"):
        run.export(tmp_path / "full.safetensors", what="full")
    assert len(lines) == 16
    assert all(-1 <= line["rank_correlation"] <= 1 for line in lines)
    assert all(line["position_share"] <= 1 for line in lines)
