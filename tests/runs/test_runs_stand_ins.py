"""Stand-ins of every family: a small network comes in, is trained on, leaves for timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from killing import killed
from networks import NARROW, SHORT, WINDOWS
from safetensors.torch import save_file
from small_runs import SMALL
from torch import Tensor, nn

import patchmine

pytestmark = pytest.mark.bitwise

SIZES: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}
MAE: dict[str, Any] = {
    "method": dict(name="mae", decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
}
CROPS: dict[str, Any] = {
    "method": dict(
        **dict(name="scfs", out_dim=32, head_hidden=16, head_bottleneck=8),
        **dict(stage_out_dim=12, stage_hidden=16, stage_bottleneck=8, freeze_last_layer=0),
    ),
    "crops": {"local_size": 32, "num_local": 2},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "ViT": {"model": "vit_tiny_patch16_224"},
    "DINOv2": {"model": "vit_small_patch14_reg4_dinov2", "image_size": 56},
    "SwiGLU": {
        **dict(model="vit_giant_patch14_dinov2", image_size=56),
        "model_args": {**SIZES, "embed_dim": 48},
    },
    "CLIP": {"model": "vit_base_patch16_clip_224"},
    "SigLIP": {"model": "vit_base_patch16_siglip_224"},
    "DINOv3": {"model": "vit_small_patch16_dinov3"},
    "EVA-02": {"model": "eva02_tiny_patch14_224", "image_size": 56},
    "PE": {"model": "vit_pe_core_tiny_patch16_384"},
    "BEiT": {"model": "beit_base_patch16_224", "method": {"name": "simmim", "mask_unit": 16}},
    "ResNet": {"model": "resnet18", "model_args": SHORT, **CROPS},
    "ConvNeXt": {"model": "convnext_atto", "model_args": NARROW, **CROPS},
    "Swin": {
        **dict(model="swin_tiny_patch4_window7_224", **CROPS),
        "model_args": {**WINDOWS, "window_size": 4},
    },
}


def how(family: str) -> dict[str, Any]:
    """The network that a stand-in is of, and a method that trains it."""
    return {"model_args": SIZES, "image_size": 64, **MAE, **FAMILIES[family]}


def stand_in(family: str) -> nn.Module:
    torch.manual_seed(0)
    given = how(family)
    arguments = {"num_classes": 0, **given["model_args"]}
    if family not in ("ResNet", "ConvNeXt"):  # which take any
        arguments["img_size"] = given["image_size"]
    network = timm.create_model(given["model"], **arguments)
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

    whole, broken = train("whole"), tmp_path / "broken"
    killed("after checkpoint 2", "pretrain", data=image_folder, out=broken, **settings)
    once, twice = weights(whole), weights(train("broken"))
    assert all(tensor.equal(twice[name]) for name, tensor in once.items())
    trained = features(whole.encoder(), side)
    exported = timm.create_model(f"local-dir:{whole.export_dir}", pretrained=True)
    torch.testing.assert_close(features(exported, side), trained, rtol=0, atol=1e-6)
    assert not torch.allclose(trained, expected)
