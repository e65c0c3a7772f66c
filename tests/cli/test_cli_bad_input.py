"""Mistakes, one after the other, as a user meets them on the command line.

Each gets a sentence that names setting or file and remedy, and exit code 2; what was there before
is left alone.
"""

from __future__ import annotations

import errno
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from patchmine.data.sharding import write_shards
from patchmine.data.sources.source import open_source
from patchmine.methods.mae import MAE
from patchmine.runs.folder import RunFolder
from patchmine.train import checkpoint
from spoken import call

SMALL = [
    *(
        "model=vit_tiny_patch16_224",
        "model_args={depth: 1, embed_dim: 32, num_heads: 2}",
        "image_size=16",
        "patch_size=4",
    ),
    *("method.decoder_embed_dim=16", "method.decoder_depth=1", "method.decoder_num_heads=2"),
    *("batch_size=4", "steps=2", "warmup_epochs=0", "workers=0", "tensorboard=false", "device=cpu"),
]


def refused(*words: str) -> str:
    """What a command that ends with exit code 2 says; one paragraph, no traceback."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def pretrain(data: Path | str, out: Path, *words: str) -> list[str]:
    return ["pretrain", f"data={data}", f"out={out}", *SMALL, *words]


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """An own copy of a few images, to be spoiled."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(sorted(image_folder.rglob("*.*"))[:12]):
        shutil.copy(path, folder / f"{number:02d}{path.suffix}")
    return folder


def made(path: Path) -> dict[str, bytes]:
    """Everything in a folder, to see that it stays as it is."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_a_folder_that_is_missing(tmp_path: Path, out: Path) -> None:
    assert "nowhere" in refused(*pretrain(tmp_path / "nowhere", out))
    assert not out.exists()


def test_a_folder_that_is_empty(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(*pretrain(tmp_path / "empty", out))
    assert "empty" in message
    assert ".jpg" in message
    assert not out.exists()


def spoil_text(folder: Path) -> Path:
    path = folder / "07.jpg"
    path.unlink(missing_ok=True)
    path.write_text("this is no image")
    return path


def spoil_truncated(folder: Path) -> Path:
    path = folder / "08.jpg"
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        content, "JPEG"
    )
    path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    return path


def spoil_small(folder: Path) -> Path:
    path = folder / "09.png"
    Image.new("RGB", (3, 30)).save(path)
    return path


@pytest.mark.parametrize("spoil", [spoil_text, spoil_truncated, spoil_small])
def test_one_image_that_is_broken_is_skipped_and_listed(
    spoil: Any, images: Path, out: Path
) -> None:
    broken = spoil(images)
    result = call(*pretrain(images, out, "max_bad_share=0.2", "steps=6"))
    assert result.exit_code == 0, result.output
    (line,) = (out / "bad_files.txt").read_text().splitlines()
    assert line.startswith(str(broken))
    assert "bad_files.txt" in result.stderr


def test_too_many_broken_images_stop_the_run(images: Path, out: Path) -> None:
    for path in sorted(images.iterdir())[:6]:
        path.write_bytes(b"broken")
    message = refused(*pretrain(images, out, "max_bad_share=0.2", "steps=30"))
    assert "max_bad_share" in message
    assert "bad_files.txt" in message
    assert len((out / "bad_files.txt").read_text().splitlines()) >= 3


def test_only_images_smaller_than_a_patch(tmp_path: Path, out: Path) -> None:
    for number in range(6):
        (tmp_path / "small").mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "small" / f"{number}.png")
    message = refused(*pretrain(tmp_path / "small", out))
    assert "2" in message
    assert "small" in message


def test_a_shard_that_is_cut_in_the_middle(images: Path, tmp_path: Path, out: Path) -> None:
    write_shards(open_source(images), tmp_path / "shards", say=lambda _: None)
    (shard,) = (tmp_path / "shards").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 2 // 3])
    result = call(*pretrain(tmp_path / "shards", out))
    assert result.exit_code == 0, result.output  # the whole images before the cut are used
    assert shard.name in result.stderr
    shard.write_bytes(shard.read_bytes()[:700])
    assert shard.name in refused(*pretrain(tmp_path / "shards", tmp_path / "other"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=vit_smal_patch16_224"], ["model", "vit_small_patch16_224"]),
        (["model=resnet18"], ["patch_size=4", "model=resnet18 has no patches"]),
        (["model=resnet18", "patch_size=null"], ["model='resnet18'", "check model_args"]),
        (
            ["model=resnet18", "patch_size=null", "model_args={}"],
            ["method=mae", "model=vit_small_patch16_224"],
        ),
        (["method.mask_ratio=1.2"], ["method.mask_ratio", "1.2", "below 1"]),
        (["method.mask_ration=0.5"], ["method.mask_ration", "mask_ratio"]),
        (["metod=hpm"], ["metod", "method"]),
        (["method=hmp"], ["hmp", "hpm"]),
        (["image_size=18"], ["image_size", "18", "16"]),
        (["batch_size=400"], ["batch_size=400", "12 images", "batch_size=12"]),
        (["device=cuda"], ["device=cuda", "device=cpu"]),
        (["method=hpm", "method.target=dino"], ["method.target_file", "method.target=dino"]),
        (["method=emae", "method.parts=3"], ["method.parts=3", "16 patches", "method.parts=4"]),
        (
            ["method=droppos", "model=vit_relpos_small_patch16_224"],
            ["relative positions", "vit_small_patch16_224"],
        ),
        (
            ["method=droppos", "model=vit_small_patch16_rope_224"],
            ["rotary positions", "vit_small_patch16_224"],
        ),
        (["method=droppos", "model=vit_tiny_r_s16_p8_224", "patch_size=1"], ["convolutional stem"]),
        (
            ["method=droppos", "model=beit_base_patch16_224"],
            ["relative positions", "use_rel_pos_bias=false"],
        ),
    ],
)
def test_settings_that_cannot_be(
    words: list[str], expected: list[str], images: Path, out: Path
) -> None:
    if words == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    message = refused(*pretrain(images, out, *words))
    for part in expected:
        assert part in message, message
    assert not out.exists()


@pytest.fixture
def finished(images: Path, out: Path) -> Path:
    assert call(*pretrain(images, out)).exit_code == 0
    return out


@pytest.mark.parametrize("change", ["blr=1", "method.mask_ratio=0.5", "batch_size=6", "seed=3"])
def test_resuming_with_settings_that_decide_results(change: str, finished: Path) -> None:
    before = made(finished)
    message = refused("resume", str(finished), change)
    assert change.split("=")[0] in message
    assert made(finished) == before


def test_resuming_on_other_images(finished: Path, images: Path) -> None:
    moved = images.parent / "moved"
    shutil.copytree(images, moved)
    shutil.copy(images / "00.jpg", images / "another.jpg")
    before = made(finished)
    assert "other data" in refused("resume", str(finished))
    assert "other data" in refused("resume", str(finished), f"data={images}")
    assert made(finished) == before
    assert (
        call("resume", str(finished), f"data={moved}").exit_code == 0
    )  # the same images elsewhere are the same
    assert RunFolder(finished).config.data == str(moved)


def test_an_output_folder_that_holds_a_run(finished: Path, images: Path) -> None:
    before = made(finished)
    message = refused(*pretrain(images, finished))
    assert f"out={finished}" in message
    assert f"patchmine resume {finished}" in message
    assert made(finished) == before


def test_a_full_disk_while_a_checkpoint_is_written(
    images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_file
    calls = []

    def fills_up(tensors: Any, path: Any, **more: Any) -> None:
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **more)

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    message = refused(*pretrain(images, out, "checkpoint_every=1"))
    assert str(out) in message
    assert "No space left on device" in message
    monkeypatch.undo()
    (kept,) = RunFolder(out).checkpoints
    assert kept.name == "step-00000001.safetensors"
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["last", kept.name]
    assert call("resume", str(out)).exit_code == 0
    assert RunFolder(out).checkpoints[-1].name == "step-00000002.safetensors"


def test_a_loss_that_is_not_a_number(
    images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MAE.forward

    def sometimes(self: MAE, batch: Any, progress: Any) -> Any:
        losses = original(self, batch, progress)
        return {"loss": losses["loss"] * float("nan")} if progress.step >= 3 else losses

    monkeypatch.setattr(MAE, "forward", sometimes)
    message = refused(*pretrain(images, out, "steps=40", "log_every=1", "checkpoint_every=2"))
    assert "10 steps in a row" in message
    assert "blr" in message
    skipped = [line["skipped"] for line in RunFolder(out).metrics() if "loss" in line]
    assert skipped[:3] == [0, 0, 0]
    assert sum(skipped) == 10
    assert all(
        value.isfinite().all() for value in load_file(RunFolder(out).checkpoints[-1]).values()
    )
