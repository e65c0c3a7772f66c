"""Weights of rotary models under timm's names, their authors' and transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import patchmine
from patchmine.backbones.family import encode
from patchmine.backbones.weights import open_weights
from patchmine.config.resolve import parse
from patchmine.errors import UserError
from patchmine.runs.folder import build_method

SIZES: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}
DINOV3, BIASED, EVA02 = (
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "eva02_tiny_patch14_224",
)
PLUS = "vit_small_plus_patch16_dinov3_qkvb"


def drawn(name: str, **extra: Any) -> nn.Module:
    """A small network of timm's, every weight other than where it started."""
    torch.manual_seed(0)
    how = {"img_size": 56 if name == EVA02 else 64, "num_classes": 0, **SIZES, **extra}
    encoder = timm.create_model(name, **how).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def close(found: nn.Module, expected: Tensor, images: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(encode(found.eval(), images), expected, rtol=0, atol=1e-5)


def features(encoder: Any) -> tuple[Tensor, Tensor]:
    """Images, and what the network makes of them."""
    side = encoder.patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, encoder.forward_features(images)


def started(file: Path, model: str, side: int, **more: Any) -> Any:
    sizes = [f"model_args.{name}={value}" for name, value in (SIZES | more).items()]
    decoder = ["method.decoder_depth=1", "method.decoder_embed_dim=32"]
    words = ["data=x", "method=mae", f"model={model}", f"image_size={side}"]
    return build_method(parse(None, [*words, *sizes, *decoder]), start_from=str(file)).encoder


def official(encoder: Any) -> dict[str, Tensor]:
    """The authors' names."""
    renamed = {
        "reg_token": "storage_tokens",
        ".gamma_1": ".ls1.gamma",
        ".gamma_2": ".ls2.gamma",
        ".mlp.fc1_g.": ".mlp.w1.",
        ".mlp.fc1_x.": ".mlp.w2.",
    }
    if "blocks.0.mlp.fc1_g.weight" in encoder.state_dict():
        renamed[".mlp.fc2."] = ".mlp.w3."
    found: dict[str, Tensor] = {}
    for name, tensor in encoder.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        if not name.endswith((".q_bias", ".v_bias")):
            found[name] = tensor
    width = encoder.embed_dim
    for number, block in enumerate(encoder.blocks):
        before, zeros = f"blocks.{number}.attn.qkv", torch.zeros(width)
        query, value = (block.attn.q_bias, block.attn.v_bias)
        parts = [zeros if each is None else each.detach() for each in (query, value)]
        found[f"{before}.bias"] = torch.cat([parts[0], torch.randn(width), parts[1]])
        found[f"{before}.bias_mask"] = torch.full((3 * width,), torch.nan)
    found["rope_embed.periods"] = torch.ones(width // 2 // 4, dtype=torch.bfloat16)
    found["local_cls_norm.weight"] = torch.ones(width)
    return found | {"mask_token": torch.zeros(1, width)}


@pytest.mark.parametrize("model", [DINOV3, BIASED, PLUS])
def test_the_authors_file_opens(model: str, tmp_path: Path) -> None:
    theirs = drawn(model)
    images, expected = features(theirs)
    torch.save(official(theirs), tmp_path / "a.pth")
    opened = patchmine.load_encoder(tmp_path / "a.pth", num_heads=2, image_size=(64, 64))
    close(opened, expected, images)
    close(started(tmp_path / "a.pth", model, 64), expected, images)
    assert opened.built_from.model.startswith(
        PLUS.removesuffix("_qkvb") if model == PLUS else DINOV3
    )


@pytest.mark.parametrize("pooling", ["avg", "token"])
@pytest.mark.parametrize("model", [DINOV3, EVA02])
def test_timms_file_opens_by_the_models_name(model: str, pooling: str, tmp_path: Path) -> None:
    theirs = drawn(model, global_pool=pooling)
    images, expected = features(theirs)
    file, side = tmp_path / "a.safetensors", images.shape[-1]
    save_file(theirs.state_dict(), file)
    how: dict[str, Any] = {"model": model, "model_args": SIZES, "image_size": (side, side)}
    close(open_weights(file, **how)[0], expected, images)
    begun = started(file, model, side)
    assert torch.equal(begun.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)
    last = theirs.norm if isinstance(theirs.fc_norm, nn.Identity) else theirs.fc_norm
    assert torch.equal(begun.norm.weight, last.weight)


def test_a_perception_encoder_leaves_its_pooling_behind(tmp_path: Path) -> None:
    theirs = drawn("vit_pe_core_tiny_patch16_384", attn_pool_num_heads=2)
    images, expected = features(theirs)
    config = {
        "architecture": "vit_pe_core_tiny_patch16_384",
        "model_args": {**SIZES, "img_size": 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    close(patchmine.load_encoder(tmp_path), expected, images)


@pytest.mark.parametrize("way", ["folder", "file"])
@pytest.mark.parametrize("gated", [False, True])
def test_transformers_dinov3_opens(gated: bool, way: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip("this transformers has no DINOv3")
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=160,
        num_register_tokens=3,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        image_size=64,
    )
    model = transformers.DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).last_hidden_state
    how: dict[str, Any] = {}
    if way == "folder":
        model.save_pretrained(tmp_path)
        file = tmp_path
    else:
        file, how = tmp_path / "a.safetensors", {"num_heads": 2, "image_size": (64, 64)}
        save_file(model.state_dict(), file)
    close(patchmine.load_encoder(file, **how), expected, images)


@pytest.mark.parametrize(
    "model", ["vit_small_patch16_224", "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"]
)
def test_another_model_refuses_the_file(model: str, tmp_path: Path) -> None:
    torch.save(official(drawn(BIASED)), tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"name the one that the file is of, as in model=vit_\w+_dinov3"
    ) as told:
        patchmine.load_encoder(tmp_path / "a.pth", model=model)
    assert "model_args" not in str(told.value)


def test_a_dinov3_without_registers_is_told_to_have_them(tmp_path: Path) -> None:
    torch.save(drawn(BIASED).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"has register tokens.*set model_args\.reg_tokens"):
        started(tmp_path / "a.pth", BIASED, 64, num_reg_tokens=0)
