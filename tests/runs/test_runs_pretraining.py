"""Whole runs, as users make them: what a run folder holds, exact resume, shards, several processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import patchmine
from patchmine.data.sharding import write_shards
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.runs.folder import RunFolder

pytestmark = pytest.mark.bitwise

# The smallest run that still has epochs (of 4 steps), masks to mine and checkpoints in the middle
# of an epoch.
TINY = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 16,
    "patch_size": 4,
    "batch_size": 8,
    "blr": 1e-2,
    "warmup_epochs": 0,
    "method.decoder_embed_dim": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
    "method.out_dim": 16,
    "method.head_hidden": 16,
    "method.thead_heads": 2,
    "method.partner_model": "resnet18",
    "method.partner_args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]},
    "crops.num_local": 2,
    "crops.local_size": 8,
    "workers": 0,
    "tensorboard": False,
    "device": "cpu",
}


def tiny(method: str) -> dict[str, Any]:
    """The settings of TINY that the method has."""
    fields = METHODS[method].model_fields
    return {
        k: v
        for k, v in TINY.items()
        if not k.startswith("method.") or k.removeprefix("method.") in fields
    }


def pretrain(data: Any, out: Path, **settings: Any) -> RunFolder:
    known = tiny(settings.get("method", "mae"))
    given = {"say": lambda _: None, **known, **settings}
    return patchmine.pretrain(data=data, out=out, **given)


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def words(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "patchmine.cli.app", *arguments]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_folder_holds_what_is_promised(
    method: str, image_folder: Path, tmp_path: Path
) -> None:
    evaluation = dict(eval_every=1, eval_data=str(image_folder), crop_pct=1.0)
    heard: list[str] = []
    run = pretrain(
        image_folder,
        tmp_path / "run",
        method=method,
        epochs=2,
        log_every=2,
        tensorboard=True,
        say=heard.append,
        **evaluation,
    )
    lines = run.metrics()
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8]
    assert training[-1]["samples"] == 64
    assert training[-1]["epoch"] == 2
    for line in training:
        assert {"lr", "images_per_second", "data_wait"} <= line.keys()
        assert 0 <= line["data_wait"] <= 1
    evaluated = [(line["step"], line["eval"]["name"]) for line in lines if "eval" in line]
    each_epoch = [(step, name) for step in (4, 8) for name in ("monitor", "knn")]
    assert evaluated == [(0, "monitor"), *each_epoch]
    for scores in (line["eval"] for line in lines if line.get("eval", {}).get("name") == "knn"):
        low, high = scores["top1_interval"]
        assert low <= scores["top1"] <= high
        assert any(f"top-1 {scores['top1']:.1f} % (95 % interval {low:.1f}" in s for s in heard)
    assert list(run.path.glob("events.out.tfevents*"))
    assert (run.path / "samples" / "step-00000008.png").is_file()
    assert run.config.method.name == method
    assert not run.bad_files.exists()

    export = run.path / "export"
    assert (export / "model.safetensors").stat().st_mode == (
        export / "config.json"
    ).stat().st_mode  # not the owner's alone

    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exported = timm.create_model(f"local-dir:{run.path / 'export'}", pretrained=True).eval()
    with torch.no_grad():
        expected = run.encoder().forward_features(images)
        assert torch.equal(exported.forward_features(images), expected)
        assert torch.equal(patchmine.load_encoder(run.path).forward_features(images), expected)
        assert torch.equal(run.method().encoder.forward_features(images), expected)


def test_one_seed_one_result_whatever_the_workers(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    first = pretrain(image_folder, tmp_path / "a", method="hpm", steps=6)
    assert_identical(
        weights(first),
        weights(pretrain(image_folder, tmp_path / "b", method="hpm", steps=6, workers=2)),
    )
    other = pretrain(image_folder, tmp_path / "c", method="hpm", steps=6, seed=1)
    assert not torch.equal(
        weights(first)["model.encoder.cls_token"], weights(other)["model.encoder.cls_token"]
    )


@pytest.mark.slow
def test_killed_anywhere_and_resumed_is_as_if_nothing_had_happened(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    """kill -9 at a random step, also within an epoch; going on with other workers arrives at the
    same bits.
    """
    steps = 60
    whole = pretrain(image_folder, tmp_path / "whole", method="hpm", steps=steps)
    killed = tmp_path / "killed"
    settings = tiny("hpm") | dict(method="hpm", steps=steps, checkpoint_every=3, log_every=1)
    start = command("pretrain", *words(settings | dict(data=str(image_folder), out=str(killed))))
    kill_at_step(start, killed, random.randint(1, 30))
    patchmine.resume(killed, workers=2, say=lambda _: None)
    assert_identical(weights(whole), weights(killed))
    steps_logged = [line["step"] for line in RunFolder(killed).metrics() if "loss" in line]
    assert steps_logged == list(range(1, steps + 1))


def kill_at_step(start: list[str], folder: Path, step: int) -> None:
    """Run a command until its log has reached a step, then kill it without warning."""
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            break
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", ["run\udce9", "run\n2", "run\x1b[31m"])
def test_a_run_folder_whose_checkpoints_could_not_be_opened_is_refused(
    image_folder: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(
        UserError, match=r"name the run's folder by letters that can be printed"
    ) as told:
        pretrain(image_folder, tmp_path / name, steps=1)
    str(told.value).encode()
    assert list(tmp_path.iterdir()) == []


def test_a_resume_says_that_images_were_replaced_under_equal_names(
    image_folder: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    whole = pretrain(data, tmp_path / "out", steps=2)
    for moved in (
        data,
        shutil.copytree(data, tmp_path / "moved"),
    ):  # other inodes and times, the same images
        heard: list[str] = []
        patchmine.resume(whole.path, data=moved, say=heard.append)
        assert not any("other contents" in line for line in heard)
    for file in data.rglob("*.*"):
        Image.new("RGB", (40, 48), (len(file.name), 7, 9)).save(file)
    heard = []
    patchmine.resume(whole.path, data=data, say=heard.append)
    (line,) = (line for line in heard if "other contents" in line)
    assert line.startswith(
        f"Beware: 36 of the 36 items looked at in {data} have other contents than when "
    )


def test_resume_before_the_first_checkpoint_starts_again(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    whole = pretrain(image_folder, tmp_path / "whole", steps=4)
    again = pretrain(image_folder, tmp_path / "again", steps=4)
    for file in (again.path / "checkpoints").iterdir():
        file.unlink()
    patchmine.resume(again.path, say=lambda _: None)
    assert_identical(weights(whole), weights(again))


def test_a_damaged_newest_checkpoint_falls_back(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    whole = pretrain(image_folder, tmp_path / "whole", steps=6, checkpoint_every=2)
    newest = whole.checkpoints[-1]
    before = weights(whole)
    os.truncate(newest, newest.stat().st_size // 2)
    heard: list[str] = []
    patchmine.resume(whole.path, say=heard.append)
    (warning,) = [text for text in heard if "step-00000006" in text and "step-00000004" in text]
    assert "step-00000006" in warning
    assert_identical(weights(whole), before)


def test_shards_give_the_same_weights_as_the_folder(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    write_shards(
        open_source(image_folder), tmp_path / "shards", shard_size=20_000, say=lambda _: None
    )
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    folder = pretrain(image_folder, tmp_path / "folder", method="hpm", steps=6)
    shards = pretrain(tmp_path / "shards", tmp_path / "tar", method="hpm", steps=6)
    assert_identical(weights(folder), weights(shards))


def test_a_torch_dataset_from_python(tmp_path: Path, weights: Any) -> None:
    images = torch.randint(
        0, 255, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = torch.utils.data.TensorDataset(images, torch.arange(20))
    whole = pretrain(data, tmp_path / "whole", steps=4, checkpoint_every=2)
    before = weights(whole)
    (whole.path / "checkpoints" / "step-00000004.safetensors").unlink()
    with pytest.raises(UserError, match=r"patchmine\.resume\(path, data=dataset\)"):
        patchmine.resume(whole.path)
    patchmine.resume(whole.path, data=data, say=lambda _: None)
    assert_identical(weights(whole), before)


def test_starting_from_given_weights(image_folder: Path, tmp_path: Path) -> None:
    first = pretrain(image_folder, tmp_path / "first", steps=4)
    second = pretrain(
        image_folder, tmp_path / "second", method="hpm", steps=1, blr=1e-12, init=str(first.path)
    )
    for name, value in first.encoder().state_dict().items():
        torch.testing.assert_close(second.encoder().state_dict()[name], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            second.encoder("teacher").state_dict()[name], value, atol=1e-6, rtol=0
        )


def test_statistics_of_other_channels_come_from_the_data(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "stacks").mkdir()
    for number in range(10):
        np.save(
            tmp_path / "stacks" / f"{number}.npy",
            generator.integers(0, 60_000, (5, 24, 24), dtype=np.uint16),
        )
    run = pretrain(tmp_path / "stacks", tmp_path / "run", steps=2, channels=5)
    assert len(run.config.mean) == len(run.config.std) == 5
    assert run.config.mean[0] == pytest.approx(30_000 / 65_535, abs=0.02)
    assert run.encoder().patch_embed.proj.in_channels == 5


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    whole = pretrain(image_folder, tmp_path / "one", method="hpm", steps=5)
    settings = tiny("hpm") | dict(
        method="hpm", steps=5, devices=2, data=str(image_folder), out=str(tmp_path / "two")
    )
    subprocess.run(
        command("pretrain", *words(settings)), check=True, capture_output=True, timeout=250
    )
    two = weights(tmp_path / "two")
    for name, value in weights(whole).items():
        torch.testing.assert_close(
            two[name], value, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    lines = RunFolder(tmp_path / "two").metrics()
    assert [line["step"] for line in lines if "loss" in line] == [5]
