"""Whole runs on GeoTIFFs with nodata (missing=mask)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import patchmine
from fixtures.small_runs import DECODER, SMALL, VIT, assert_resumes
from patchmine.errors import UserError

SETTINGS: dict[str, Any] = {
    **VIT,
    **SMALL,
    "channels": 2,
    "steps": 10,
    "checkpoint_every": 5,
    "missing": "mask",
}


def scenes(root: Path, nodata: float, count: int = 24) -> Path:
    """Two float bands of 30x34 pixels, most with a corner without data, one without any."""
    tifffile = pytest.importorskip("tifffile")
    root.mkdir()
    rng = np.random.default_rng(0)
    tags = [(42113, "s", 0, f"{nodata:g}", True)]
    for number in range(count):
        bands = rng.normal(300, 20, (2, 30, 34)).astype(np.float32)
        if number % 4:
            bands[:, : 6 + number, 10:] = nodata
        if number == 5:
            bands[:] = nodata
        file = root / f"{number:02d}.tif"
        how = {"photometric": "minisblack", "planarconfig": "separate"}
        tifffile.imwrite(file, bands, **how, extratags=tags)
    return root


@pytest.mark.bitwise
@pytest.mark.parametrize("method", ["mae", "hpm"])
def test_a_run_learns_of_what_there_is_and_resumes(
    method: str, tmp_path: Path, weights: Callable[[Any], dict[str, Tensor]]
) -> None:
    given = {**SETTINGS, **DECODER}
    run = patchmine.pretrain(
        data=scenes(tmp_path / "data", -9999), out=tmp_path / "run", method=method, **given
    )
    lines = [line for line in run.metrics() if "loss" in line]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert all(0 < line["counted"] < 1 for line in lines)
    # By the pixels with data, whatever number the file puts into the others.
    config = run.config
    assert np.allclose(config.mean, 300, atol=3)
    assert np.allclose(config.std, 20, atol=2)
    other = patchmine.pretrain(
        data=scenes(tmp_path / "other", 12345), out=tmp_path / "again", method=method, **given
    )
    one, same = weights(run.path), weights(other.path)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert_resumes(run, 5, weights)


@pytest.mark.parametrize("method", ["droppos", "mokd", "scfs"])
def test_a_method_that_predicts_no_patches_refuses(method: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"missing: given mask, but method={method} predicts no"):
        patchmine.pretrain(data="x", out=tmp_path / "run", method=method, missing="mask")


def test_videos_miss_no_pixels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: given mask, but model=video_vit"):
        patchmine.pretrain(
            data="x", out=tmp_path / "run", model="video_vit_small_patch16", missing="mask"
        )
