"""AMT in whole runs: maps that survive a resume, shares of several processes, data that maps do not
belong to.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

import patchmine
from fixtures.small_runs import assert_resumes
from patchmine.cli.app import app
from patchmine.config.schema import PretrainConfig
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.methods.amt import probe
from patchmine.runs.folder import RunFolder
from patchmine.training.whole import PlainData
from patchmine.types import Batch, Progress

pytestmark = [pytest.mark.bitwise, pytest.mark.slow]

# Epochs of 4 steps; maps are renewed before the epochs 1, 2 and 3.
TINY = {
    "method": "amt",
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 16,
    "patch_size": 4,
    "batch_size": 8,
    "steps": 16,
    "blr": 1e-2,
    "warmup_epochs": 0,
    "method.decoder_embed_dim": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
    "workers": 0,
    "sample_every": 1000,
    "tensorboard": False,
    "device": "cpu",
}
ON_SIMMIM = {"method.host": "simmim", "method.mask_unit": 4}


def pretrain(data: Any, out: Path, **settings: Any) -> RunFolder:
    return patchmine.pretrain(data=data, out=out, say=lambda _: None, **(TINY | settings))


@pytest.mark.parametrize(
    ("step", "options"),
    [(6, {}), (8, {}), (10, {"method.maps": "online"}), (6, ON_SIMMIM)],
    ids=["within an epoch", "between epochs", "online", "on SimMIM"],
)
def test_resumed_is_as_if_never_stopped(
    step: int, options: dict[str, Any], image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    """A checkpoint between two epochs is from before the refresh, one within an epoch holds the
    epoch's maps.
    """
    run = pretrain(
        image_folder, tmp_path / "run", checkpoint_every=2, keep_checkpoints=20, **options
    )
    whole = weights(run)
    if not options:
        assert whole["model.maps.values"].shape == (36, 16)
        assert whole["model.maps.values"].float().std() > 5
    assert_resumes(run, step, weights)
    assert run.method()(*last_item())["loss"].isfinite()


def last_item() -> tuple[Batch, Progress]:
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    batch = Batch([torch.randn(1, 3, 16, 16)], torch.tensor([35]), box, torch.tensor([True]))
    return batch, Progress(15, 16, 4)


def test_maps_decide_what_is_trained(image_folder: Path, tmp_path: Path) -> None:
    """The first epoch is random for both, from the second on the right alignment and the released
    one part.
    """
    area, released = (
        pretrain(image_folder, tmp_path / how, log_every=1, **{"method.alignment": how}).metrics()
        for how in ("area", "released")
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (area, released)]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4:] != losses[1][4:]


def config_for(data: Path) -> PretrainConfig:
    from patchmine.config.resolve import from_settings

    return from_settings(data=str(data), mean=[0.5] * 3, std=[0.5] * 3, **TINY)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_shares_are_the_whole_set_once(processes: int, image_folder: Path) -> None:
    images = open_source(image_folder)
    seen: list[int] = []
    for rank in range(processes):
        engine: Any = SimpleNamespace(
            local_size=1, rank=rank, world_size=processes, device=torch.device("cpu")
        )
        data = PlainData(config_for(image_folder), images, engine, lambda _: None)
        share = [number for batch in data for number in batch.index.tolist()]
        assert share == [
            number for batch in data for number in batch.index.tolist()
        ]  # as often as one likes
        assert 36 // processes <= len(share) <= 36 // processes + 1
        seen += share
    assert seen == list(range(36))


def test_two_processes_and_a_broken_image_give_the_maps_of_one(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    """35 images, the last broken; rates so small that weights stay what they are at the start."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    paths = sorted(folder.rglob("*.*"))
    paths[0].unlink()
    paths[-1].write_bytes(b"broken")
    settings = dict(batch_size=16, steps=3, blr=1e-12, max_bad_share=0.5)
    alone = pretrain(folder, tmp_path / "one", **settings)
    words = [
        f"{k}={json.dumps(v)}"
        for k, v in (TINY | settings | dict(devices=2, data=str(folder))).items()
    ]
    command = [
        sys.executable,
        "-m",
        "patchmine.cli.app",
        "pretrain",
        *words,
        f"out={tmp_path / 'two'}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    one, two = (weights(run)["model.maps.values"] for run in (alone, RunFolder(tmp_path / "two")))
    assert one.shape == (34, 16)  # the last image has none
    assert one.float().std() > 5
    assert (one.int() - two.int()).abs().max() <= 1  # batches of other sizes round otherwise

    view = torch.stack([torch.from_numpy(squashed(path)) for path in paths[1:-1]])
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (alone.config.mean, alone.config.std)
    )
    expected = probe(alone.encoder(), (view / 255 - mean) / std)
    torch.testing.assert_close(one.float() / 255, expected, atol=0.03, rtol=0)


def squashed(path: Path) -> Any:
    """The whole image at 16 x 16 pixels, resized bilinearly by Pillow."""
    import numpy as np

    return np.asarray(
        Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR), np.float32
    ).transpose(2, 0, 1)


def test_maps_of_other_images_are_refused(image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    run = pretrain(folder, tmp_path / "run", steps=6)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    next(folder.rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"other data \(fingerprint .* start a new run"):
        patchmine.resume(run.path, say=lambda _: None)
    done = CliRunner().invoke(app, ["resume", str(run.path)])
    assert done.exit_code == 2
    assert "other data" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["method.mask_ratio=0.6"],
            ["method.mask_ratio=0.6", "method.throw_ratio=0.4", "lower one of them"],
        ),
        (["method.throw_ratio=1"], ["method.throw_ratio", "below 1"]),
        (
            ["method.host=simmim", "method.mask_unit=6"],
            ["method.mask_unit=6", "method.mask_unit=8"],
        ),
        (["method.alignment=exact"], ["method.alignment", "area"]),
    ],
    ids=str,
)
def test_settings_that_cannot_be(
    words: list[str], expected: list[str], image_folder: Path, tmp_path: Path
) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    done = CliRunner().invoke(
        app, ["pretrain", *settings, f"data={image_folder}", f"out={tmp_path / 'run'}", *words]
    )
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


class Stream(IterableDataset[Tensor]):
    """Has a length, and yet no numbered items."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.zeros(20, 3, 16, 16, dtype=torch.uint8)

    def __len__(self) -> int:
        return 20


def test_iterable_datasets_have_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data=Stream: .* must have a length .* into shards"):
        pretrain(Stream(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_long_pass_says_how_far_it_is(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchmine.training.whole.PASS_SECONDS", -1.0)
    engine: Any = SimpleNamespace(local_size=1, rank=0, world_size=2, device=torch.device("cpu"))
    said: list[str] = []
    list(PlainData(config_for(image_folder), open_source(image_folder), engine, said.append))
    assert said == ["Looking at all training images before the epoch: 18 of this process's 18."]
