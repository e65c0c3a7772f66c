"""Official checkpoint layouts, with tensors made here: what is in a file, and what each tensor is
called.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fixtures.official_files import read_official
from patchmine.backbones.description import Description
from patchmine.backbones.naming import encoder_of, find_network
from patchmine.backbones.official import check_decoder_positions, take_apart
from patchmine.backbones.positions import sincos_table
from patchmine.backbones.reading import ReadFile
from patchmine.backbones.reference import from_reference_names, to_reference_names
from patchmine.backbones.weights import load_encoder
from patchmine.errors import UserError

PUBLISHED = {  # name: width, blocks, heads, patch
    "vit_base_patch16_224": (768, 12, 12, 16),
    "vit_large_patch16_224": (1024, 24, 16, 16),
    "vit_huge_patch14_224": (1280, 32, 16, 14),
}


def blocks(prefix: str, width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformer blocks in the official files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {
                f"{prefix}.{i}.{name}.weight": (out, into),
                f"{prefix}.{i}.{name}.bias": (out,),
            }
        for norm in ("norm1", "norm2"):
            shapes |= {f"{prefix}.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes


def encoder_shapes(width: int, depth: int, patch: int, grid: int) -> dict[str, tuple[int, ...]]:
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **blocks("blocks", width, depth),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def decoder_shapes(
    width: int, decoder: int, depth: int, values: int, grid: int
) -> dict[str, tuple[int, ...]]:
    return {
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, 1 + grid * grid, decoder),
        "decoder_embed.weight": (decoder, width),
        "decoder_embed.bias": (decoder,),
        **blocks("decoder_blocks", decoder, depth),
        "decoder_norm.weight": (decoder,),
        "decoder_norm.bias": (decoder,),
        "decoder_pred.weight": (values, decoder),
        "decoder_pred.bias": (values,),
    }


def predictor_shapes(decoder: int, depth: int, values: int) -> dict[str, tuple[int, ...]]:
    return {
        **blocks("decoder_blocks_losspred", decoder, depth),
        "decoder_norm_losspred.weight": (decoder,),
        "decoder_norm_losspred.bias": (decoder,),
        "decoder_pred_losspred.weight": (values, decoder),
        "decoder_pred_losspred.bias": (values,),
    }


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def small(method: str = "mae", seed: int = 0, values: int = 192) -> dict[str, Tensor]:
    """A file's tensors for 192 x 2, patches of 8 in 32x32, a decoder of 512 x 1."""
    shapes = encoder_shapes(192, 2, 8, 4) | decoder_shapes(192, 512, 1, values, 4)
    if method == "hpm":
        shapes |= predictor_shapes(512, 1, 192)
    tensors = drawn(shapes, seed)
    tensors["decoder_pos_embed"] = torch.cat([torch.zeros(1, 512), sincos_table(512, (4, 4))])[None]
    return tensors


def save_hpm(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student, teacher = small("hpm", 1), small("hpm", 2)
    content = {
        "epoch": 200,
        "state_dict": {f"module.{name}": tensor for name, tensor in student.items()},
        "ema_state_dict": teacher,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "loss_scaler": {"scale": 65536.0},
        "model": "mae_vit_base_patch16_dec512d8b",
    }
    torch.save(content, path)
    return student, teacher


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_recognised(name: str) -> None:
    width, depth, heads, patch = PUBLISHED[name]
    shapes = encoder_shapes(width, depth, patch, 224 // patch)
    tensors = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}  # no memory
    network = find_network({"model": tensors}, "mae.pth")
    found = take_apart(ReadFile("mae.pth", network, Description(), None))
    assert found.architecture.model == name
    assert found.architecture.num_heads == heads
    assert found.architecture.image_size == (224, 224)
    assert found.decoder is None
    empty = timm.create_model(name, num_classes=0, device="meta", **found.architecture.model_args)
    assert {key: tuple(t.shape) for key, t in empty.state_dict().items()} == shapes


def test_a_full_mae_file_tells_its_decoder_and_its_settings(tmp_path: Path) -> None:
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.6, model="mae_vit_base_patch16")
    content = {"model": small(), "optimizer": {}, "epoch": 3, "scaler": {}, "args": args}
    torch.save(content, tmp_path / "checkpoint-3.pth")
    found = read_official(tmp_path / "checkpoint-3.pth")
    assert found.method == "mae"
    assert found.settings["mask_ratio"] == 0.6
    assert found.decoder is not None
    assert list(found.decoder.values())[:3] == [512, 1, 16]
    assert found.architecture.model_args["depth"] == 2
    assert found.architecture.patch_size == 8
    assert "MAE, ViT 192 wide, 2 blocks, 3 heads, patch 8, 32x32x3" in found.summary()


def test_hpm_files_hold_a_student_and_a_teacher(tmp_path: Path) -> None:
    student, teacher = save_hpm(tmp_path / "hpm.pth")
    for weights, expected in (("student", student), ("teacher", teacher)):
        found = read_official(tmp_path / "hpm.pth", weights=weights)  # type: ignore[arg-type]
        assert found.method == "hpm"
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())
        assert found.teacher is not None
        assert torch.equal(found.teacher["cls_token"], teacher["cls_token"])
        dropped = found.unused()
        assert "decoder_pos_embed" in dropped
        assert "ema_state_dict.decoder_pred.weight" in dropped
        assert not [name for name in dropped if "losspred" in name or "mask_token" in name]


def test_teacher_weights_are_refused_where_there_are_none(tmp_path: Path) -> None:
    torch.save({"model": small()}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match=r"no ema_state_dict.*weights=student"):
        read_official(tmp_path / "mae.pth", weights="teacher")


@pytest.mark.parametrize("method", ["mae", "hpm"])
def test_names_go_there_and_back(method: str) -> None:
    reference = small(method)
    ours = from_reference_names(reference)
    rooms = {"encoder", "decoder_input", "decoder"} | ({"predictor"} if method == "hpm" else set())
    assert {name.split(".")[0] for name in ours} == rooms
    back = to_reference_names(ours)
    assert back.keys() == reference.keys() - {"decoder_pos_embed"}
    assert all(back[name] is reference[name] for name in back)


def test_the_teacher_has_no_pixel_decoder() -> None:
    ours = from_reference_names(small("hpm"), teacher=True)
    assert {name.split(".")[1] for name in ours} == {"encoder", "decoder_input", "predictor"}
    back = to_reference_names(ours, teacher=True)
    assert "decoder_pred_losspred.weight" in back
    assert "decoder_pred.weight" not in back
    assert to_reference_names(ours) == {}


def test_a_fine_tuned_classifier_gives_its_encoder(tmp_path: Path) -> None:
    tensors = drawn(encoder_shapes(192, 2, 8, 4))
    for part in ("weight", "bias"):
        tensors[f"fc_norm.{part}"] = tensors.pop(f"norm.{part}")
    tensors |= {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    torch.save({"model": tensors}, tmp_path / "finetuned.pth")
    found = read_official(tmp_path / "finetuned.pth")
    assert found.unused() == ["head.weight", "head.bias"]
    encoder = load_encoder(tmp_path / "finetuned.pth").eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = encoder.forward_features(images)
    expected = torch.nn.functional.layer_norm(
        tokens[:, 1:].mean(1), (192,), tensors["fc_norm.weight"], tensors["fc_norm.bias"], 1e-6
    )
    torch.testing.assert_close(encoder(images), expected)


def test_another_image_size_resamples_student_and_teacher(tmp_path: Path) -> None:
    save_hpm(tmp_path / "hpm.pth")
    found = read_official(tmp_path / "hpm.pth", image_size=(48, 32))
    assert found.architecture.grid == (6, 4)
    assert found.teacher is not None
    assert found.tensors["pos_embed"].shape == found.teacher["pos_embed"].shape == (1, 25, 192)
    assert found.resized[0] == "pos_embed from 4x4 to 6x4 patches"
    with pytest.raises(UserError, match="image_size=30x30 is not a multiple of the patch size 8"):
        read_official(tmp_path / "hpm.pth", image_size=(30, 30))


def test_a_rectangle_needs_the_size_that_it_was_trained_at(tmp_path: Path) -> None:
    tensors = drawn(encoder_shapes(192, 1, 8, 4))
    tensors["pos_embed"] = torch.zeros(1, 13, 192)
    torch.save({"model": tensors}, tmp_path / "rectangle.pth")
    with pytest.raises(UserError, match="12 patches form no square grid: give the image_size"):
        read_official(tmp_path / "rectangle.pth")
    found = read_official(tmp_path / "rectangle.pth", image_size=(24, 32))
    assert found.architecture.grid == (3, 4)
    assert found.resized == []


def test_unusual_widths_need_their_heads(tmp_path: Path) -> None:
    tensors = drawn(encoder_shapes(48, 1, 8, 4) | decoder_shapes(48, 32, 1, 192, 4))
    torch.save({"model": tensors}, tmp_path / "odd.pth")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "model of width 48: give num_heads"),
        ({"num_heads": 3}, "model of width 32: give decoder_num_heads"),
        ({"num_heads": 5}, "num_heads=5 does not divide the width 48"),
        (
            {"num_heads": 3, "decoder_num_heads": 3},
            "decoder_num_heads=3 does not divide the width 32",
        ),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            read_official(tmp_path / "odd.pth", **given)
    assert read_official(tmp_path / "odd.pth", num_heads=3, with_decoder=False).decoder is None
    found = read_official(tmp_path / "odd.pth", num_heads=3, decoder_num_heads=2)
    assert found.architecture.model_args == {"embed_dim": 48, "depth": 1, "num_heads": 3}


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    torch.save(
        {"model": {"layer1.0.conv1.weight": torch.ones(2, 2, 3, 3)}}, tmp_path / "resnet.pth"
    )
    with pytest.raises(UserError, match="holds no plain vision transformer"):
        read_official(tmp_path / "resnet.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no tensors under a known name"):
        read_official(tmp_path / "empty.pth")
    part = small()
    del part["mask_token"]
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"a part of a decoder only \(no mask_token\)"):
        read_official(tmp_path / "part.pth")


def test_learned_decoder_positions_are_refused() -> None:
    tensors = small()
    check_decoder_positions(tensors, (4, 4), "file")
    with pytest.raises(UserError, match="not that of 4x6 patches"):
        check_decoder_positions(tensors, (4, 6), "file")
    with pytest.raises(UserError, match="differs"):  # as many patches, other places
        check_decoder_positions(tensors, (2, 8), "file")
    tensors["decoder_pos_embed"] = tensors["decoder_pos_embed"] + 0.01
    with pytest.raises(
        UserError,
        match=r"decoder_pos_embed differs from the fixed sine-cosine table by up to 0\.01",
    ):
        check_decoder_positions(tensors, (4, 4), "file")
    transposed = sincos_table(512, (4, 4)).reshape(4, 4, 512).transpose(0, 1).reshape(16, 512)
    tensors["decoder_pos_embed"] = torch.cat([torch.zeros(1, 512), transposed])[None]
    with pytest.raises(UserError, match="differs"):
        check_decoder_positions(tensors, (4, 4), "file")


def test_only_the_encoder_is_taken_from_any_layout(tmp_path: Path) -> None:
    save_hpm(tmp_path / "hpm.pth")
    content = torch.load(tmp_path / "hpm.pth", weights_only=True)
    expected = encoder_shapes(192, 2, 8, 4).keys()
    layouts = [
        content,
        {"model": small()},
        small(),
        {"state_dict": {"module." + k: t for k, t in small().items()}},
    ]
    for layout in layouts:
        assert encoder_of(find_network(layout, "file").tensors).keys() == expected


def test_every_tensor_of_a_file_is_accounted_for(tmp_path: Path) -> None:
    save_hpm(tmp_path / "hpm.pth")
    both = read_official(tmp_path / "hpm.pth")
    assert both.dropped == []
    alone = read_official(tmp_path / "hpm.pth", with_decoder=False)
    assert len(alone.dropped) == len(small("hpm"))
    assert all(name.startswith("ema_state_dict.") for name in alone.dropped)
