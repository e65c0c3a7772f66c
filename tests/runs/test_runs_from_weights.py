"""Runs that start from other people's weights: told in a table, exported and resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import patchmine
from fixtures.small_runs import SMALL
from patchmine.evaluate.knn import evaluate_knn
from patchmine.evaluate.settings import KnnSettings
from patchmine.runs.folder import RunFolder

MODEL = "vit_small_patch14_reg4_dinov2"
SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
OF_MODEL: dict[str, Any] = {"model": MODEL, "model_args": SIZES, "image_size": 42}
TRAINING = SMALL | OF_MODEL | {"batch_size": 8, "log_every": 1}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {
        "method.decoder_embed_dim": 16,
        "method.decoder_depth": 1,
        "method.decoder_num_heads": 2,
    },
    "hpm": {
        "method.decoder_embed_dim": 16,
        "method.decoder_depth": 1,
        "method.decoder_num_heads": 2,
    },
    "simmim": {"method.mask_unit": 14},
}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with registers, of 70 pixels, under its authors' names."""
    torch.manual_seed(0)
    encoder = timm.create_model(MODEL, num_classes=0, img_size=70, **SIZES)
    tensors = {name: t + 0.1 * torch.randn_like(t) for name, t in encoder.state_dict().items()}
    first = torch.randn(1, 1, 32)
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["pos_embed"] = torch.cat([first, tensors["pos_embed"]], dim=1)
    tensors["mask_token"] = torch.zeros(1, 32)
    file = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("method", METHODS)
def test_methods_go_on_from_dinov2_and_resume_exactly(
    method: str, dinov2: Path, image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    said: list[str] = []
    given = TRAINING | METHODS[method] | {"method": method, "init": str(dinov2), "say": said.append}
    how = {"steps": 4, "checkpoint_every": 2, **given}
    whole = patchmine.pretrain(data=image_folder, out=tmp_path / "whole", **how)
    (table,) = [each for each in said if "left random" in each]
    assert "pos_embed from 5x5 to 3x3 patches" in table
    assert "reg_token" in table
    stopped = tmp_path / "stopped"
    patchmine.pretrain(data=image_folder, out=stopped, **how)
    newest = max((stopped / "checkpoints").glob("step-*"))
    newest.unlink()  # as if it had stopped at step 2
    (stopped / "checkpoints" / "last").unlink(missing_ok=True)
    patchmine.resume(stopped, say=lambda _: None)
    one, other = weights(whole.path), weights(stopped)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    run = RunFolder(whole.path)
    images = torch.randn(2, 3, 42, 42)
    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True).eval()
    with torch.no_grad():
        expected = run.encoder().forward_features(images)
        assert torch.equal(exported.forward_features(images), expected)
    assert exported.reg_token.shape == (1, 4, 32)


def test_the_table_is_told_wherever_a_file_is_opened(
    dinov2: Path, image_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    told = SMALL | {"say": said.append}
    small = {"num_heads": 2}
    run = patchmine.import_weights(dinov2, tmp_path / "run", say=said.append, **small)
    assert sum("unexpected    0" in each for each in said) == 1
    said.clear()
    patchmine.finetune(
        run.path / "export", data=image_folder, out=tmp_path / "f", steps=1, batch_size=8, **told
    )
    assert sum("unexpected    0" in each for each in said) == 1
    assert any("left random" in each and "head." in each for each in said)
    said.clear()
    file = run.path / "export"
    settings = KnnSettings(target=str(file), data=str(image_folder), device="cpu", workers=0)
    evaluate_knn(settings, say=said.append)
    assert sum("unexpected    0" in each for each in said) == 1
