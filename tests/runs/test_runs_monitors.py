"""Monitors without labels in whole runs: they change nothing, and go on when a run does."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import draw_images
from small_runs import VIT
from torch import Tensor

import patchmine
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.train.checkpoint import load

pytestmark = pytest.mark.bitwise

TINY: dict[str, Any] = VIT | {
    "epochs": 3,
    "blr": 1e-2,
    "warmup_epochs": 0,
    "log_every": 1,
    "crops": {"num_local": 1, "local_size": 8},
    "workers": 0,
    "tensorboard": False,
    "sample_every": 1000,
    "device": "cpu",
}
NARROW = {
    **dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, out_dim=16, head_hidden=16),
    **dict(thead_heads=2, partner_model="resnet18"),
    "partner_args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]},
}
NUMBERS = {"rankme", "feature_std", "neighbours_kept", "held_out_loss"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("trained"), 24)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = draw_images(tmp_path_factory.mktemp("others"), 60)
    for file in sorted(whole.iterdir())[:24]:  # those that are trained on
        file.unlink()
    return whole


def pretrain(data: Path, out: Path, method: str = "mae", **settings: Any) -> patchmine.Run:
    known = {k: v for k, v in NARROW.items() if k in METHODS[method].model_fields}
    given = {**TINY, "method": {"name": method, **known}, "say": lambda _: None, **settings}
    return patchmine.pretrain(data=data, out=out, **given)


def looks(run: patchmine.Run) -> list[dict[str, Any]]:
    lines = [line for line in run.metrics() if "eval" in line]
    assert {line["eval"].pop("name") for line in lines} <= {"monitor"}
    return [{"step": line["step"], **line["eval"]} for line in lines]


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("method", sorted(METHODS))
def test_monitors_of_every_method_are_numbers_and_change_no_weight(
    method: str, images: Path, others: Path, tmp_path: Path
) -> None:
    watched = dict(monitor_data=others, monitor_every=1)
    on = pretrain(images, tmp_path / "on", method, epochs=2, **watched)
    off = pretrain(images, tmp_path / "off", method, epochs=2, monitor_images=0)
    first, second = (load(run.checkpoint_dir / "last") for run in (on, off))
    assert_identical(first.model, second.model)
    assert_identical(first.optimizer, second.optimizer)
    losses = [[line["loss"] for line in run.metrics() if "loss" in line] for run in (on, off)]
    assert losses[0] == losses[1]
    assert looks(off) == []
    assert not off.monitor_start.parent.exists()
    found = looks(on)
    assert [line["step"] for line in found] == [0, 3, 6]
    expected = NUMBERS if on.method().inductive else NUMBERS - {"held_out_loss"}
    for line in found:
        assert line.keys() == expected | {"step"}
        assert all(math.isfinite(value) for value in line.values())
    assert found[0]["neighbours_kept"] == 100
    assert found[0]["rankme"] != found[-1]["rankme"]


def test_without_other_images_some_of_the_data_are_watched(images: Path, tmp_path: Path) -> None:
    run = pretrain(images, tmp_path / "run", monitor_images=10)
    assert [line["step"] for line in looks(run)] == [0, 3, 6, 9]
    assert all(line.keys() == NUMBERS - {"held_out_loss"} | {"step"} for line in looks(run))


def test_a_resumed_run_has_the_numbers_of_the_whole_one(
    images: Path, others: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = dict(monitor_data=others, monitor_every=1, checkpoint_every=3)
    whole = pretrain(images, tmp_path / "whole", **how)
    parts = pretrain(images, tmp_path / "parts", **how)
    expected = looks(whole)
    for path in parts.checkpoints[1:]:
        path.unlink()
    patchmine.resume(parts.path, workers=2, say=lambda _: None)
    assert looks(parts) == expected
    for path in parts.checkpoints:  # killed before its first checkpoint: all over again
        path.unlink()
    parts.monitor_start.unlink()
    patchmine.resume(parts.path, say=lambda _: None)
    assert looks(parts) == expected


@pytest.mark.parametrize("lost", ["removed", "damaged"])
def test_without_its_start_a_run_leaves_only_the_neighbours_out(
    lost: str, images: Path, others: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = dict(monitor_data=others, monitor_every=1, checkpoint_every=3)
    run = pretrain(images, tmp_path / "run", **how)
    for path in run.checkpoints[1:]:
        path.unlink()
    start = run.monitor_start
    start.unlink() if lost == "removed" else start.write_bytes(b"\x00" * 40)
    heard: list[str] = []
    patchmine.resume(run.path, say=heard.append)
    assert [line["step"] for line in looks(run) if "neighbours_kept" not in line] == [6, 9]
    assert all(NUMBERS - {"neighbours_kept"} <= line.keys() for line in looks(run))
    assert not any("failed" in text for text in heard)


def test_the_log_has_the_numbers_and_says_once_that_features_collapsed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchmine.report import label_free

    ranks = iter([20.0, 30.0, *[1.1] * 9])
    monkeypatch.setattr(
        label_free, "label_free", lambda _: {"rankme": next(ranks), "feature_std": 0.1}
    )
    heard: list[str] = []
    pretrain(images, tmp_path / "run", epochs=8, monitor_every=1, say=heard.append)
    assert "step 3: RankMe 30.0, feature std 0.1000, neighbours kept" in "\n".join(heard)
    warnings = [text for text in heard if text.startswith("warning: The features collapsed")]
    assert len(warnings) == 1
    assert heard.index(warnings[0]) == 1 + next(
        place for place, text in enumerate(heard) if text.startswith("step 12: RankMe")
    )


def test_a_monitor_that_fails_costs_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchmine.report import label_free

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label_free, "label_free", full)
    heard: list[str] = []
    pretrain(images, tmp_path / "run", monitor_every=1, say=heard.append)
    (warning,) = (text for text in heard if "warning" in text)
    assert "the monitor without labels after step 0 failed" in warning
    assert "No space left on device" in warning


def test_held_out_images_that_are_none_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor_data=.* holds the images that are trained on"):
        pretrain(images, tmp_path / "same", monitor_data=images)
    with pytest.raises(UserError, match="monitor_data: given 'nowhere'"):
        pretrain(images, tmp_path / "lost", monitor_data="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^monitor_data="):
        pretrain(images, tmp_path / "none", monitor_data=tmp_path / "empty")
    with pytest.raises(UserError, match=r"monitor_every: given 3, but monitor_images=0"):
        pretrain(images, tmp_path / "off", monitor_every=3, monitor_images=0)


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(images: Path, others: Path, tmp_path: Path) -> None:
    how = {**TINY, "method": "mae", "monitor_data": str(others), "monitor_every": 1}
    for name, devices in (("one", 1), ("two", 2)):
        given = {**how, "data": str(images), "out": str(tmp_path / name), "devices": devices}
        words = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in given.items()
        ]
        command = [sys.executable, "-m", "patchmine", "pretrain", *words]
        subprocess.run(command, check=True, capture_output=True, timeout=250)
    one, two = (looks(patchmine.Run(tmp_path / name)) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for first, second in zip(one, two, strict=True):
        assert first["held_out_loss"] == pytest.approx(second["held_out_loss"], rel=1e-3)
        assert first["rankme"] == pytest.approx(second["rankme"], rel=1e-2)
