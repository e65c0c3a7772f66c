"""Stand-ins of ViTs, plain and rotary: a small network comes in, is trained on, leaves for timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from killing import after_a_checkpoint, killed
from safetensors.torch import save_file
from small_runs import SMALL
from torch import Tensor, nn

import patchmine

pytestmark = pytest.mark.bitwise

SIZES: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}
DECODER: dict[str, Any] = {
    "method.decoder_embed_dim": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
}
FAMILIES = {
    "ViT": "vit_tiny_patch16_224",
    "DINOv2": "vit_small_patch14_reg4_dinov2",
    "CLIP": "vit_base_patch16_clip_224",
    "SigLIP": "vit_base_patch16_siglip_224",
    "DINOv3": "vit_small_patch16_dinov3",
    "PE": "vit_pe_core_tiny_patch16_384",
}


def how(family: str) -> dict[str, Any]:
    """The network that a stand-in is of, and a method that trains it."""
    model = FAMILIES[family]
    side = 56 if "patch14" in model else 64
    return {"model": model, "model_args": SIZES, "image_size": side, **DECODER}


def stand_in(family: str) -> nn.Module:
    torch.manual_seed(0)
    given = how(family)
    size = {"img_size": given["image_size"]}
    network = timm.create_model(given["model"], num_classes=0, **size, **given["model_args"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


@torch.no_grad()
def features(encoder: Any, side: int) -> Tensor:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    found: Tensor = encoder.eval().forward_features(images)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stand_in_comes_in_trains_on_and_leaves(
    family: str, image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    theirs, given = stand_in(family), how(family)
    file, side = tmp_path / "theirs.safetensors", given["image_size"]
    save_file(theirs.state_dict(), file)
    named = {name: given[name] for name in ("model", "model_args", "image_size")}
    imported = patchmine.import_weights(file, tmp_path / "in", say=lambda _: None, **named)
    left = timm.create_model(f"local-dir:{imported.export_dir}", pretrained=True)
    expected = features(theirs, side)
    torch.testing.assert_close(features(left, side), expected, rtol=0, atol=1e-5)

    settings = SMALL | given | {"init": str(file), "steps": 4, "batch_size": 4}
    settings |= {"checkpoint_every": 2, "blr": 1e-2, "resume": "auto"}

    def train(out: str) -> patchmine.Run:
        return patchmine.pretrain(data=image_folder, out=tmp_path / out, **settings)

    whole = train("whole")
    killed(lambda: train("broken"), lambda: after_a_checkpoint(2))
    once, twice = weights(whole), weights(train("broken"))
    assert all(tensor.equal(twice[name]) for name, tensor in once.items())
    trained = features(whole.encoder(), side)
    exported = timm.create_model(f"local-dir:{whole.export_dir}", pretrained=True)
    torch.testing.assert_close(features(exported, side), trained, rtol=0, atol=1e-6)
    assert not torch.allclose(trained, expected)
