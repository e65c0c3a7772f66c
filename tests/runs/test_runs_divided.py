"""Runs of every kind whose weights two processes divide among them, by the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from drawn import draw_images

import patchmine
from fixtures.boxes import write_boxes
from fixtures.detector import TEACH as DETECT
from fixtures.label_maps import write_label_maps
from fixtures.small_runs import DECODER, SMALL, assert_near, made_by_two

BACKBONE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    "image_size": 32,
    "patch_size": 8,
    "batch_size": 8,
    "steps": 2,
    **SMALL,
    **DECODER,
}
TUNE: dict[str, Any] = dict(SMALL, batch_size=8, steps=6, blr=1e-2, log_every=1, checkpoint_every=2)
KINDS: dict[str, dict[str, Any]] = {
    "finetune": dict(
        TUNE, val_share=0.2, mixup=0.8, drop_path=0.2, ema_decay=0.5, layer_decay=0.7, clip_grad=0.1
    ),
    "segment": dict(TUNE, batch_size=4, head="upernet", head_width=16, dice=0.5, image_size=24),
    "detect": {
        **DETECT,
        **TUNE,
        "batch_size": 4,
        "masks": True,
        "drop_path": 0.2,
        "image_size": 64,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Labelled images for every kind."""
    top = tmp_path_factory.mktemp("data")
    return {
        "finetune": draw_images(top / "images", 40, ("cat", "dog")),
        "segment": write_label_maps(top / "maps", {"train": 12, "val": 2, "test": 3}),
        "detect": write_boxes(top / "boxes", {"train": 12, "val": 3, "test": 4}),
    }


@pytest.fixture(scope="module")
def backbone(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "mae"
    return patchmine.pretrain(data=data["finetune"], out=out, **BACKBONE).path


def resumed(run: patchmine.Run, *words: str) -> patchmine.Run:
    """Taken back to its first checkpoint, a run is made to its end again."""
    assert len(run.checkpoints) > 1
    for path in sorted(run.checkpoints)[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    program = [sys.executable, "-m", "patchmine", "resume", str(run.path), *words]
    subprocess.run(program, check=True, capture_output=True, timeout=250)
    return patchmine.Run(run.path)


def evaluations(run: patchmine.Run) -> list[tuple[int, float]]:
    found = {line["step"]: line["eval"] for line in run.metrics() if "eval" in line}
    return [
        (step, score.get("top1", score.get("miou", score.get("map"))))
        for step, score in found.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_divided_weights_learn_labels_as_one_process_does(
    kind: str, backbone: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    make, near = getattr(patchmine, kind), dict(rtol=1e-3, atol=5e-5)
    one = make(backbone, data=data[kind], out=tmp_path / "one", **KINDS[kind])
    given = KINDS[kind] | {"sharding": "fsdp"}
    two = made_by_two(kind, backbone, data[kind], tmp_path / "two", given)
    assert_near(one, two, **near)
    assert all(path.is_dir() for path in two.checkpoints)
    assert len(evaluations(two)) > 1
    for (step, score), (wanted_step, wanted) in zip(
        evaluations(two), evaluations(one), strict=True
    ):
        assert step == wanted_step
        assert score == pytest.approx(wanted, abs=0.2)
    files = [path.name for path in two.export_dir.glob("*.safetensors")]
    assert files == ["model.safetensors"]
    exported = timm.create_model(f"local-dir:{two.export_dir}", pretrained=True)
    assert torch.equal(exported.blocks[0].attn.qkv.weight, two.encoder().blocks[0].attn.qkv.weight)
    assert_near(one, resumed(two, "devices=1", "sharding=ddp"), **near)
    assert_near(one, resumed(two, "devices=2", "sharding=fsdp"), **near)


@pytest.mark.slow
def test_a_budget_and_a_plan_time_divided_weights(data: dict[str, Path], tmp_path: Path) -> None:
    given = {**BACKBONE, "data": data["finetune"], "devices": 2, "sharding": "fsdp"}
    given |= {"method": "hpm", "remat": "blocks", "accumulate": 2}
    words = [f"{name}={value}" for name, value in given.items() if name not in ("say", "steps")]
    for command in ("plan", "pretrain"):
        own = [f"out={tmp_path / 'run'}", "budget=40s"]
        program = [sys.executable, "-m", "patchmine", command, *words, *own]
        done = subprocess.run(program, capture_output=True, timeout=280, text=True, check=False)
        assert done.returncode == 0, done.stderr
    run = patchmine.Run(tmp_path / "run")
    assert run.config.steps is not None
    assert run.config.budget is None
    assert run.metrics()[-1]["step"] == run.config.steps
    assert not [path for path in run.path.iterdir() if path.name.startswith(".") and path.is_dir()]
