"""Weights of every family under the names of their authors give the features of their networks.

Each file is made from a small network of timm's or transformers', its tensors renamed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import patchmine
from patchmine.backbones.weights import open_weights
from patchmine.config.resolve import parse
from patchmine.errors import UserError
from patchmine.runs.folder import build_method
from patchmine.runs.transfer import import_file

DINOV2 = "vit_small_patch14_dinov2"
REGISTERS = "vit_small_patch14_reg4_dinov2"
GIANT = "vit_giant_patch14_dinov2"
SIZES: dict[str, Any] = {"embed_dim": 192, "depth": 2, "num_heads": 3}
PIXELS = {14: 70, 16: 64, 32: 64}


def drawn(name: str, **extra: Any) -> nn.Module:
    """A small network of timm's, every weight other than where it started."""
    torch.manual_seed(0)
    patch = int(re.search(r"patch(\d+)", name)[1])  # type: ignore[index]
    how = {"img_size": PIXELS[patch], "num_classes": 0, **SIZES, **extra}
    encoder = timm.create_model(name, **how).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def features(encoder: nn.Module, size: tuple[int, int]) -> Tensor:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return encoder.eval().forward_features(images)  # type: ignore[operator]


def official(encoder: nn.Module) -> dict[str, Tensor]:
    """DINOv2's names of a network of timm's."""
    tensors = dict(encoder.state_dict())
    packed = (
        tensors["blocks.0.mlp.fc1.weight"].shape[0]
        == 2 * tensors["blocks.0.mlp.fc2.weight"].shape[1]
    )
    names = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."} if packed else {}
    for part, theirs in names.items():
        tensors = {name.replace(part, theirs): tensor for name, tensor in tensors.items()}
    if "reg_token" in tensors:  # their class token is added to the first row of the table
        first = torch.randn(1, 1, tensors["cls_token"].shape[-1])
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = torch.cat([first, tensors["pos_embed"]], dim=1)
        tensors["cls_token"] = tensors["cls_token"] - first
    return tensors | {"mask_token": torch.zeros(1, tensors["cls_token"].shape[-1])}


def chunked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One block in every chunk, numbered on, as DINOv2 trains in chunks."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): t for name, t in tensors.items()}


def settings(model: str, image_size: str = "70", *more: str) -> Any:
    sizes = [f"model_args.{name}={value}" for name, value in SIZES.items()]
    decoder = ["method.decoder_depth=1", "method.decoder_embed_dim=32"]
    words = ["data=x", "method=mae", f"model={model}", f"image_size={image_size}"]
    return parse(None, [*words, *sizes, *decoder, *more])


def started(file: Path, config: Any) -> tuple[nn.Module, str]:
    said: list[str] = []
    method = build_method(config, start_from=str(file), say=said.append)
    assert len(said) == 1
    return method.encoder, said[0]  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["timm", "official", "chunked", "teacher"])
@pytest.mark.parametrize("model", [DINOV2, REGISTERS, GIANT])
def test_dinov2_opens_everywhere(model: str, layout: str, tmp_path: Path) -> None:
    theirs = drawn(model)
    tensors = dict(theirs.state_dict()) if layout == "timm" else official(theirs)
    content: dict[str, Any] = chunked(tensors) if layout == "chunked" else tensors
    if layout == "teacher":
        heads = {"dino_head.last_layer.weight": torch.ones(2, 2)}
        content = {"teacher": {f"backbone.{name}": t for name, t in tensors.items()} | heads}
    torch.save(content, tmp_path / "a.pth")
    expected = features(theirs, (70, 70))
    run = import_file(str(tmp_path / "a.pth"), str(tmp_path / "run"))
    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True)
    begun, table = started(tmp_path / "a.pth", settings(model))
    opened = patchmine.load_encoder(tmp_path / "a.pth")
    for encoder in (opened, run.encoder(), exported, begun):
        torch.testing.assert_close(features(encoder, (70, 70)), expected, rtol=0, atol=1e-5)
    assert re.search(r"unexpected +0", table)
    assert bool(re.search(r"dropped +\d+ .*mask_token", table)) == (layout != "timm")


def test_the_model_of_a_run_says_what_its_file_is(tmp_path: Path) -> None:
    """A rectangle's count of patches may be that of a square and a class token."""
    theirs = drawn(DINOV2, img_size=(28, 56))  # 2 x 4 patches and a class token: nine rows
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    begun, table = started(tmp_path / "a.safetensors", settings(DINOV2, "[28,56]"))
    expected = features(theirs, (28, 56))
    torch.testing.assert_close(features(begun, (28, 56)), expected, rtol=0, atol=1e-5)
    assert "2x4 patches" in table
    sizes: dict[str, Any] = {"model": DINOV2, "model_args": SIZES, "source_size": (28, 56)}
    run = import_file(str(tmp_path / "a.safetensors"), str(tmp_path / "run"), **sizes)
    assert run.config.model == DINOV2
    torch.testing.assert_close(features(run.encoder(), (28, 56)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [DINOV2, REGISTERS])
@pytest.mark.parametrize("size", [(42, 42), (28, 84)])
def test_positions_of_dinov2_are_moved_to_the_run(
    model: str, size: tuple[int, int], tmp_path: Path
) -> None:
    theirs = drawn(model, dynamic_img_size=True)
    save_file(official(theirs), tmp_path / "a.safetensors")
    text = f"[{size[0]},{size[1]}]"
    begun, table = started(tmp_path / "a.safetensors", settings(model, text))
    expected = features(theirs, size)
    torch.testing.assert_close(features(begun, size), expected, rtol=0, atol=1e-5)
    assert f"pos_embed from 5x5 to {size[0] // 14}x{size[1] // 14} patches" in table


REFUSED = {
    "LayerScale": (
        DINOV2,
        "vit_small_patch16_224",
        r"has LayerScale.*model_args\.init_values=1\.0",
    ),
    "registers": (
        REGISTERS,
        DINOV2,
        r"has register tokens.*model_args\.reg_tokens=4 model_args\.no_embed_class=true",
    ),
    "SwiGLU": (GIANT, DINOV2, r"has SwiGLU in its MLPs.*model=vit_giant_patch14_dinov2"),
    "none": ("vit_small_patch16_224", DINOV2, r"lacks LayerScale.*model_args\.init_values=null"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_parts_that_the_model_lacks_are_refused_with_their_setting(
    kind: str, tmp_path: Path
) -> None:
    model, other, message = REFUSED[kind]
    patch = [] if kind == "registers" or kind == "SwiGLU" else ["patch_size=14"]
    theirs = drawn(model, **({"patch_size": 14, "img_size": 70} if kind == "none" else {}))
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        started(tmp_path / "a.safetensors", settings(other, "70", *patch))
    assert "\n" not in str(refused.value)
    how: dict[str, Any] = {"model": other, "model_args": {**SIZES, "patch_size": 14}}
    for allow in ([], ["*"]):
        with pytest.raises(UserError, match=message):
            import_file(str(tmp_path / "a.safetensors"), str(tmp_path / "run"), allow=allow, **how)
    assert not (tmp_path / "run").exists()


def test_the_named_setting_is_the_way_out(tmp_path: Path) -> None:
    theirs = drawn("vit_small_patch16_224", qk_norm=True, init_values=1.0, reg_tokens=2)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="norms of queries and keys, which") as refused:
        started(tmp_path / "a.safetensors", settings("vit_small_patch16_224", "64"))
    words = re.findall(r"model_args\.\w+=\S+", str(refused.value).replace(",", " "))
    assert len(words) == 4
    begun, _ = started(tmp_path / "a.safetensors", settings("vit_small_patch16_224", "64", *words))
    expected = features(theirs, (64, 64))
    torch.testing.assert_close(features(begun, (64, 64)), expected, rtol=0, atol=1e-5)


def test_positions_without_prefix_are_refused_with_their_setting(tmp_path: Path) -> None:
    theirs = drawn("vit_small_patch16_224", no_embed_class=True)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    opened = patchmine.load_encoder(tmp_path / "a.safetensors")
    expected = features(theirs, (64, 64))
    torch.testing.assert_close(features(opened, (64, 64)), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"patches only: set model_args\.no_embed_class=true"):
        started(tmp_path / "a.safetensors", settings("vit_small_patch16_224", "64"))
    more = "model_args.no_embed_class=true"
    begun, _ = started(tmp_path / "a.safetensors", settings("vit_small_patch16_224", "64", more))
    torch.testing.assert_close(features(begun, (64, 64)), expected, rtol=0, atol=1e-5)


def test_split_queries_keys_and_values(tmp_path: Path) -> None:
    theirs = drawn("vit_small_patch16_224")
    split: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        if ".qkv." in name:
            for part, each in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{part}_proj.")] = each.clone()
        else:
            split[name] = tensor
    save_file(split, tmp_path / "a.safetensors")
    opened = patchmine.load_encoder(tmp_path / "a.safetensors")
    expected = features(theirs, (64, 64))
    torch.testing.assert_close(features(opened, (64, 64)), expected, rtol=0, atol=1e-5)


POOLED = ["vit_base_patch16_siglip_224", "vit_base_patch16_clip_224"]


@pytest.mark.parametrize("way", ["told", "named", "folder"])
@pytest.mark.parametrize("model", POOLED)
def test_clip_and_siglip_under_timms_names(model: str, way: str, tmp_path: Path) -> None:
    theirs = drawn(model)
    tensors = theirs.state_dict() | {"head.weight": torch.ones(4, 192)}
    save_file(tensors, tmp_path / "model.safetensors")
    how: dict[str, Any] = {}
    if way == "named":
        how = {"model": model, "model_args": SIZES, "image_size": (64, 64)}
    if way == "folder":
        import json

        config = {"architecture": model, "model_args": {**SIZES, "img_size": 64}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    opened, report = open_weights(tmp_path / "model.safetensors", **how)
    expected = features(theirs, (64, 64))
    torch.testing.assert_close(features(opened, (64, 64)), expected, rtol=0, atol=1e-5)
    assert {"head.weight", *(n for n in tensors if n.startswith("attn_pool."))} <= {*report.dropped}
    assert any("activation" in each for each in report.assumed) == (
        way == "told" and "norm_pre.weight" in tensors
    )


def test_ijepa_has_no_class_token(tmp_path: Path) -> None:
    theirs = drawn("vit_huge_patch14_gap_224")
    tensors = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    predictor = {"module.predictor_embed.weight": torch.ones(2, 2)}
    content = {"encoder": other, "target_encoder": tensors, "predictor": predictor, "epoch": 3}
    torch.save(content, tmp_path / "ijepa.pth.tar")
    opened, report = open_weights(tmp_path / "ijepa.pth.tar", weights="ema")
    expected = features(theirs, (70, 70))
    torch.testing.assert_close(features(opened, (70, 70)), expected, rtol=0, atol=1e-5)
    assert "predictor.module.predictor_embed.weight" in report.dropped
    run = import_file(str(tmp_path / "ijepa.pth.tar"), str(tmp_path / "run"), weights="ema")
    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True)
    torch.testing.assert_close(features(exported, (70, 70)), expected, rtol=0, atol=1e-5)


def test_ibots_mask_token_is_dropped(tmp_path: Path) -> None:
    theirs = drawn("vit_small_patch16_224")
    tensors = {**theirs.state_dict(), "masked_embed": torch.ones(1, 192)}
    torch.save({"state_dict": tensors}, tmp_path / "checkpoint_teacher.pth")
    opened, report = open_weights(tmp_path / "checkpoint_teacher.pth")
    torch.testing.assert_close(features(opened, (64, 64)), features(theirs, (64, 64)))
    assert report.dropped == ["masked_embed"]


def test_a_classifiers_norm_becomes_the_last_one(tmp_path: Path) -> None:
    theirs = drawn("vit_small_patch16_224", global_pool="avg", num_classes=5)
    assert "fc_norm.weight" in theirs.state_dict()
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    begun, table = started(tmp_path / "a.safetensors", settings("vit_small_patch16_224", "64"))
    assert torch.equal(begun.norm.weight, theirs.fc_norm.weight)  # type: ignore[union-attr, arg-type]
    assert "fc_norm) is taken as the last norm" in table
    assert re.search(r"dropped +2  head", table)
