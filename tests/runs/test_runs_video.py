"""Whole runs on videos: the same folder, exact resume, repeats, damaged files, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import patchmine
from patchmine.errors import UserError
from patchmine.runs.folder import RunFolder

pytestmark = [pytest.mark.bitwise, pytest.mark.slow]

TINY = {
    "model": "video_vit_tiny_patch16",
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 16,
    "patch_size": 8,
    "clip": {"frames": 4, "stride": 1, "tubelet": 2, "repeats": 2},
    "batch_size": 8,
    "warmup_epochs": 0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "method.decoder_embed_dim": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
    "workers": 0,
    "tensorboard": False,
    "sample_every": 1000,
    "device": "cpu",
}


class Clips(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """Twelve clips of 7 frames in memory."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        generator = np.random.default_rng(index)
        return generator.integers(0, 255, (7, 20, 24, 3), dtype=np.uint8), index % 2


def pretrain(data: Any, out: Path, say: Any = lambda _: None, **settings: Any) -> RunFolder:
    return patchmine.pretrain(data=data, out=out, say=say, **(TINY | settings))


@pytest.mark.parametrize("method", ["mae", "hpm"])
def test_a_run_on_clips_that_was_interrupted_goes_on_exactly(
    method: str, tmp_path: Path, weights: Any
) -> None:
    said: list[str] = []
    whole = pretrain(
        Clips(), tmp_path / "whole", said.append, method=method, epochs=2, checkpoint_every=2
    )
    # Twelve videos give 24 clips: three steps of 8 make an epoch.
    assert [line["step"] for line in whole.metrics() if "loss" in line][-1] == 6
    assert "Frames are read as they are: no video to decode." in said
    assert any("12 videos of Clips" in line and "4 frames of 16x16" in line for line in said)
    assert sorted(whole.sample_dir.glob("*.png"))
    expected = weights(whole)
    for newer in whole.checkpoints[1:]:
        newer.unlink()
    again = patchmine.resume(whole.path, data=Clips(), say=lambda _: None)
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, expected[name]), name
    clip = torch.zeros(1, 3, 4, 16, 16)
    assert patchmine.load_encoder(whole.export_dir)(clip).shape == (1, 32)


def test_damaged_and_short_videos_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "clips").mkdir()
    for number in range(8):
        first, *rest = (
            Image.new("RGB", (24, 20), (9 * number, 20 * time, 0))
            for time in range(3 if number == 5 else 6)
        )
        first.save(tmp_path / "clips" / f"{number}.gif", save_all=True, append_images=rest)
    (tmp_path / "clips" / "3.gif").write_bytes(b"")
    said: list[str] = []
    clip = TINY["clip"] | {"short": "refuse"}
    run = pretrain(
        tmp_path / "clips", tmp_path / "run", said.append, clip=clip, epochs=1, max_bad_share=0.5
    )
    listed = dict(line.split("\t") for line in run.bad_files.read_text().splitlines())
    assert (
        listed[str(tmp_path / "clips" / "3.gif")]
        == "is empty (0 bytes); fetch it again or remove it"
    )
    assert listed[str(tmp_path / "clips" / "5.gif")].startswith(
        "has 3 frames where a clip of 4, 1 apart, needs 4"
    )
    assert any(line.startswith("Videos are decoded by ") for line in said)
    assert "2 broken videos were left out" in said[-1]


def test_statistics_of_grey_clips_come_from_the_data(tmp_path: Path) -> None:
    run = pretrain(Clips(), tmp_path / "run", channels=1, mean=None, std=None, epochs=1)
    assert run.config.mean == pytest.approx([0.5], abs=0.03)


def test_clips_that_tubelets_do_not_fill_are_refused_with_what_fits(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"clip\.frames: given 5; must be a multiple of clip\.tubelet=2: try clip\.fra",
    ):
        pretrain(Clips(), tmp_path / "run", clip={"frames": 5, "tubelet": 2})
    with pytest.raises(
        UserError, match=r"clip\.repeats: given 3; .*must be a multiple of 3: try batch_size=9"
    ):
        pretrain(Clips(), tmp_path / "run", clip={"repeats": 3})
    with pytest.raises(
        UserError, match=r"batch_size=32 is more than the 24 videos of .*clip\.repeats=2 times 12"
    ):
        pretrain(Clips(), tmp_path / "run", batch_size=32)


def test_two_processes_equal_one_on_clips(tmp_path: Path, weights: Any) -> None:
    folder = tmp_path / "frames"
    generator = np.random.default_rng(0)
    for number in range(8):
        (folder / f"{number}").mkdir(parents=True)
        for time in range(5):
            Image.fromarray(generator.integers(0, 255, (18, 20, 3), dtype=np.uint8)).save(
                folder / f"{number}/{time}.png"
            )
    one = pretrain(folder, tmp_path / "one", method="hpm", epochs=1)
    settings = TINY | dict(
        method="hpm", epochs=1, devices=2, data=str(folder), out=str(tmp_path / "two")
    )
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    start = [sys.executable, "-m", "patchmine.cli.app", "pretrain", *words]
    subprocess.run(start, check=True, capture_output=True, timeout=250)
    two = weights(RunFolder(tmp_path / "two"))
    for name, value in weights(one).items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=1e-3)
