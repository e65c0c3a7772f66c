"""A run folder without a training: settings and an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchmine.config import RunConfig
from patchmine.models.vit import build_encoder
from patchmine.models.weights import export_encoder

MODEL_ARGS = {"depth": 5, "embed_dim": 24, "num_heads": 3}


def make_run(folder: Path, **changes) -> Path:
    """A run whose encoder has random weights; ``changes`` to its settings."""
    settings = {"model": "vit_tiny_patch16_224", "model_args": MODEL_ARGS, "image_size": 16, "patch_size": 8} | changes
    config = RunConfig(data="photos", **settings)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    size = dict(image_size=config.image_size, channels=config.channels)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = build_encoder(config.model, patch_size=config.patch_size, model_args=config.model_args, **size)
    args = dict(model=config.model, model_args=config.model_args, mean=config.mean, std=config.std)
    export_encoder(encoder, folder / "export", **args, **size)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def resnet_folder(tmp_path: Path) -> Path:
    """The same with a ResNet and a stem for small images."""
    model_args = {"channels": (8, 8, 12, 16), "cifar_stem": True}
    return make_run(tmp_path / "resnet", model="resnet18", model_args=model_args, patch_size=None)
