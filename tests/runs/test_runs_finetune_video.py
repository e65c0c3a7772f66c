"""Fine-tuning a run on videos: labelled clips, the test of several clips, export, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import draw_clips
from safetensors.torch import load_file

import patchmine
from patchmine.data.items import CLIP
from patchmine.data.views.clips import TestClips
from patchmine.errors import UserError
from patchmine.train.checkpoint import load
from patchmine.training.labels import open_labelled_parts

COMMON: dict[str, Any] = {
    "batch_size": 8,
    "warmup_epochs": 0,
    "blr": 1e-2,
    "workers": 0,
    "tensorboard": False,
    "sample_every": 1000,
    "device": "cpu",
    "say": lambda _: None,
}
TUNE: dict[str, Any] = COMMON | {
    "epochs": 2,
    "clip.repeats": 2,
    "mixup": 0.8,
    "cutmix": 1,
    "erase_prob": 0.5,
    "auto_augment": "rand-m7-n4-mstd0.5-inc1",
    "crop_scale": (0.08, 1),
    "checkpoint_every": 3,
    "keep_checkpoints": 9,
    "test_segments": 2,
    "test_crops": 3,
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 5 frames in two classes; their numbers tell them apart."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("jump", "run"):
        draw_clips(folder / "videos" / name, 10)
    return folder / "videos"


@pytest.fixture(scope="module")
def backbone(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return patchmine.pretrain(
        data=labelled,
        out=tmp_path_factory.mktemp("backbone") / "mae",
        method={"name": "mae", **decoder},
        model="video_vit_tiny_patch16",
        model_args={"embed_dim": 32, "depth": 2, "num_heads": 2},
        image_size=16,
        patch_size=8,
        clip={"frames": 4, "stride": 1, "tubelet": 2},
        steps=2,
        **COMMON,
    )


@pytest.fixture(scope="module")
def tuned(
    backbone: patchmine.Run, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> patchmine.Run:
    out = tmp_path_factory.mktemp("tuned") / "run"
    return patchmine.finetune(backbone.path, data=labelled, out=out, **TUNE)


def test_clips_are_learnt_and_videos_tested_by_the_mean_over_their_views(
    tuned: patchmine.Run,
) -> None:
    assert tuned.metrics()[-1]["samples"] == 64  # 16 videos, 2 clips of each, 2 epochs
    result = json.loads((tuned.eval_dir / "test.json").read_text())
    assert result["classes"] == ["jump", "run"]
    assert (result["images"]["segments"], result["images"]["crops"]) == (2, 3)

    config, network = tuned.config, tuned.classifier()
    test = open_labelled_parts(config, CLIP, lambda _: None).test
    view, right, log_loss = TestClips(config, 2, 3), 0, 0.0
    mean, std = (torch.tensor(each)[:, None, None, None] for each in (config.mean, config.std))
    for number, target in enumerate(test.targets):
        raw = test.source.read(int(test.indices[number]))
        (views,) = view(raw, np.random.default_rng(0)).views  # (6, C, T, H, W)
        with torch.no_grad():
            mixed = network((views / 255 - mean) / std).softmax(1).mean(0)
        right += int(mixed.argmax() == target)
        log_loss -= float(mixed[target].log()) / len(test)
    assert result["top1"] == pytest.approx(100 * right / len(test))
    assert result["loss"] == pytest.approx(log_loss, rel=1e-4)


def test_videos_are_predicted_as_they_were_tested(tuned: patchmine.Run, labelled: Path) -> None:
    said: list[str] = []
    quiet: dict[str, Any] = {"all": True, "workers": 0, "device": "cpu"}
    rows = tuned.predict(labelled, say=said.append, **quiet)
    assert any("segments=2 crops=3" in line for line in said)
    probabilities = dict(
        zip(rows["file"], zip(rows["jump"], rows["run"], strict=True), strict=True)
    )
    test = open_labelled_parts(tuned.config, CLIP, lambda _: None).test
    files = [test.source.key(int(place)) for place in test.indices]
    found = torch.tensor([probabilities[file] for file in files])
    targets = torch.from_numpy(np.asarray(test.targets))
    result = json.loads((tuned.eval_dir / "test.json").read_text())
    assert result["loss"] == pytest.approx(F.nll_loss(found.log(), targets).item(), rel=1e-4)
    assert result["top1"] == pytest.approx(100 * (found.argmax(1) == targets).float().mean().item())
    quiet |= {"say": lambda _: None}
    assert tuned.predict(labelled, segments=2, crops=3, **quiet) == rows
    middle = tuned.predict(labelled, segments=1, crops=1, **quiet)
    assert middle["jump"] != rows["jump"]
    one_crop = tuned.predict(labelled, crops=1, **quiet)  # of both clips
    assert one_crop["jump"] not in (middle["jump"], rows["jump"])


def test_the_export_holds_what_the_classifier_computes(tuned: patchmine.Run) -> None:
    clip, classifier = torch.randn(2, 3, 4, 16, 16), tuned.classifier()
    head = load_file(tuned.export_dir / "model.safetensors")
    with torch.no_grad():
        pooled = patchmine.load_encoder(tuned.export_dir)(clip)
        scores = F.linear(pooled, head["head.weight"], head["head.bias"])
        torch.testing.assert_close(scores, classifier(clip))
    assert json.loads((tuned.export_dir / "config.json").read_text())["global_pool"] == "avg"


@pytest.mark.bitwise
def test_a_run_on_labelled_clips_resumes_to_the_same_bits(tuned: patchmine.Run) -> None:
    last = tuned.checkpoints[-1]
    weights, result = load_file(last), (tuned.eval_dir / "test.json").read_text()
    for newer in tuned.checkpoints:
        if load(newer).step > 3:
            newer.unlink()
    patchmine.resume(tuned.path, say=lambda _: None)
    again = load_file(last)
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []
    assert (tuned.eval_dir / "test.json").read_text() == result


def test_images_have_no_clips_to_be_averaged(labelled: Path) -> None:
    given: dict[str, Any] = {**TUNE, "model": "vit_tiny_patch16_224", "clip.repeats": 1}
    with pytest.raises(UserError, match=r"test_segments: given 2, .*reads images"):
        patchmine.finetune("vit_tiny_patch16_224", data=labelled, out="x", **given)


@pytest.mark.parametrize("loss", ["ce", "bce", "mse"])
def test_views_are_averaged_as_probabilities(loss: str, tuned: patchmine.Run) -> None:
    task = tuned.classify()
    task.config = task.config.model_copy(update={"loss": loss})
    scores = 9 * torch.randn(5, 6, 2)
    found = task.averaged(scores)
    turned = {"ce": lambda x: x.softmax(-1), "bce": torch.sigmoid, "mse": lambda x: x}[loss]
    torch.testing.assert_close(turned(found), turned(scores).mean(1))
