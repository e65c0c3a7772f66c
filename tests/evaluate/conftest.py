"""A run folder without a training: settings and an export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchmine.backbones.family import build_encoder
from patchmine.config.schema import PretrainConfig
from patchmine.runs.folder import write_export

MODEL_ARGS = {"depth": 5, "embed_dim": 24, "num_heads": 3}


def make_run(folder: Path, **changes) -> Path:
    """A run whose encoder has random weights; ``changes`` to its settings."""
    settings = {
        "model": "vit_tiny_patch16_224",
        "model_args": MODEL_ARGS,
        "image_size": 16,
        "patch_size": 8,
    } | changes
    config = PretrainConfig(data="photos", **settings)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    args = dict(
        image_size=config.image_size, channels=config.channels, patch_size=config.patch_size
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip = (config.clip.frames, config.clip.tubelet)
        encoder = build_encoder(config.model, model_args=config.model_args, clip=clip, **args)
    write_export(config, encoder, folder / "export")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def make_image_run():
    """`make_run`, for tests that want several."""
    return make_run


@pytest.fixture
def resnet_folder(tmp_path: Path) -> Path:
    """The same with a ResNet and a stem for small images."""
    model_args = {"channels": (8, 8, 12, 16), "cifar_stem": True}
    return make_run(tmp_path / "resnet", model="resnet18", model_args=model_args, patch_size=None)


@pytest.fixture
def video_folder(tmp_path: Path) -> Path:
    """The same with an encoder of clips: 4 frames, every second one."""
    clip = {"frames": 4, "stride": 2, "tubelet": 2}
    return make_run(tmp_path / "video", model="video_vit_tiny_patch16", clip=clip)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square that goes left or right: 6 training and 3 test videos of each, folders of 10 frames
    of 20x26 pixels.
    """
    root = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name, step in (("left", -1), ("right", 1)):
            for number in range(count):
                _film(root / part / name / f"{number}", step, generator)
    return root


def _film(folder: Path, step: int, generator: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    ground = generator.integers(0, 90, (20, 26, 3), dtype=np.uint8)
    row, column = generator.integers(2, 10), generator.integers(9, 12)
    for number in range(10):
        frame = ground.copy()
        left = column + step * (number - 5)
        frame[row : row + 8, left : left + 6] = 220
        Image.fromarray(frame).save(folder / f"{number}.png")
