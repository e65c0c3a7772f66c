"""Heads for segmentation: what they read, how fine they are, that they learn, leave and are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.networks import assert_leaves
from fixtures.stages import encoder_of
from patchmine.backbones.family import build_encoder, stage_features
from patchmine.errors import UserError
from patchmine.models.adapt import rate_groups
from patchmine.models.dense import HEADS, SegmentHead, build_head
from patchmine.models.dpt import DptHead
from patchmine.models.segment_head import Stages

SIZE = (64, 96)
SHORT = {"channels": (8, 8, 12, 16), "layers": (1, 1, 1, 1)}


def vit(size: tuple[int, int] = SIZE, patch: int = 16, channels: int = 3, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 4, "num_heads": 2, **more}
    return build_encoder(
        "vit_small_patch16_224",
        image_size=size,
        patch_size=patch,
        channels=channels,
        model_args=sizes,
    )


def head_of(name: str, encoder: Any, size: tuple[int, int] = SIZE, width: int = 8) -> SegmentHead:
    if name == "upernet":
        pytest.importorskip("segmentation_models_pytorch", reason="the extra `seg` is missing")
    torch.manual_seed(1)
    return build_head(name, encoder, 5, size, None if name == "linear" else width)


class Segmenter(nn.Module):
    """An encoder and a head, as a task puts them together."""

    def __init__(self, encoder: Any, head: SegmentHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def maps(self, images: Tensor) -> list[Tensor]:
        return stage_features(self.encoder, images, self.head.stages).maps

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images), (images.shape[2], images.shape[3]))


@pytest.mark.parametrize(
    ("name", "depth", "blocks"),
    [
        ("upernet", 12, [3, 5, 7, 11]),  # mmsegmentation's out_indices for MAE
        ("upernet", 24, [7, 11, 15, 23]),
        ("upernet", 4, [0, 1, 2, 3]),
        ("upernet", 1, [0, 0, 0, 0]),
        ("dpt", 12, [2, 5, 8, 11]),
        ("dpt", 4, [0, 1, 2, 3]),
        ("linear", 12, [11]),
    ],
)
def test_heads_read_the_published_blocks(name: str, depth: int, blocks: list[int]) -> None:
    head = head_of(name, vit((32, 32), depth=depth), (32, 32))
    assert head.stages == [f"blocks.{number}" for number in blocks]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("size", "patch", "channels"),
    [(SIZE, 16, 3), ((32, 32), 16, 1), ((32, 40), 8, 3), ((48, 112), 16, 5), ((32, 16), 4, 3)],
)
def test_heads_take_any_shape(name: str, size: tuple[int, int], patch: int, channels: int) -> None:
    encoder = vit(size, patch, channels)
    model = Segmenter(encoder, head_of(name, encoder, size))
    images = torch.randn(2, channels, *size)
    finer = {"linear": 1, "upernet": 4, "dpt": 8}[name]
    sides = tuple(min(side // patch * finer, side) for side in size)
    logits = model(images)
    assert logits.shape == (2, 5, *sides)
    auxiliary = model.head.auxiliary(model.maps(images))
    if auxiliary is not None:
        assert auxiliary.shape == (2, 5, size[0] // patch, size[1] // patch)
        logits = logits.mean() + auxiliary.mean()
    logits.square().mean().backward()
    dead = {n for n, p in model.head.named_parameters() if p.grad is None}
    assert not dead
    assert all(p.grad is not None for n, p in encoder.named_parameters() if n != "pos_embed")


@pytest.mark.parametrize("name", HEADS)
def test_a_resnets_stages_are_levels_already(name: str) -> None:
    encoder = build_encoder("resnet18", image_size=SIZE, model_args=SHORT)
    model = Segmenter(encoder, head_of(name, encoder))
    layers = ["layer1", "layer2", "layer3", "layer4"]
    assert model.head.stages == (layers[3:] if name == "linear" else layers)
    sides = {"linear": (2, 3), "upernet": (16, 24), "dpt": (32, 48)}[name]
    assert model(torch.randn(2, 3, *SIZE)).shape == (2, 5, *sides)
    assert not any(isinstance(part, nn.ConvTranspose2d) for part in model.head.modules())


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_stages_are_levels_already(kind: str, name: str) -> None:
    encoder = encoder_of(kind, image_size=SIZE)
    model = Segmenter(encoder, head_of(name, encoder))
    sides = {"linear": (2, 3), "upernet": (16, 24), "dpt": (32, 48)}[name]
    scores = model(torch.randn(2, 3, *SIZE))
    assert scores.shape == (2, 5, *sides)
    scores.square().mean().backward()
    unused = ("head.", "norm.") if kind == "convnext" else ()  # its norm is for pooled features
    dead = {n for n, p in encoder.named_parameters() if p.grad is None}
    assert all(n.startswith(unused) for n in dead) if unused else not dead
    with pytest.raises(UserError, match=r"head=eomt puts queries.*no tokens"):
        build_head("eomt", encoder, 5, SIZE)


def test_a_beit_has_the_same_heads_at_its_own_size() -> None:
    encoder = build_encoder(
        "beit_base_patch16_224",
        image_size=SIZE,
        model_args={"embed_dim": 16, "depth": 4, "num_heads": 2},
    )
    model = Segmenter(encoder, head_of("linear", encoder))
    assert model(torch.randn(2, 3, *SIZE)).shape == (2, 5, 4, 6)
    with pytest.raises(UserError, match=r"image_size=32x32.*relative positions for 64x96 pixels"):
        build_head("linear", encoder, 5, (32, 32))


@pytest.mark.parametrize(
    ("widths", "width"),
    [
        ([768] * 4, 768),
        ([1024] * 4, 1024),
        ([256, 512, 1024, 2048], 512),
        ([64, 128, 256, 512], 128),
    ],
)
def test_upernet_is_as_wide_as_published(widths: list[int], width: int) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `seg` is missing")
    with torch.device("meta"):
        head = HEADS["upernet"](Stages(["a", "b", "c", "d"], widths, shrinking=True), 5)
    assert head.classifier.in_channels == width


def test_the_linear_head_is_a_norm_and_a_matrix() -> None:
    encoder = vit()
    model = Segmenter(encoder, head_of("linear", encoder)).eval()
    images = torch.randn(2, 3, *SIZE)
    tokens = encoder.forward_features(images)[:, 1:]  # timm's own, normed
    matrix = model.head.classifier.weight[:, :, 0, 0]
    expected = (tokens / (1 + model.head.norm.eps) ** 0.5) @ matrix.T
    torch.testing.assert_close(
        model(images).flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5
    )


def test_dpt_makes_a_vit_bs_maps_as_wide_as_published() -> None:
    with torch.device("meta"):
        head = DptHead(Stages(["a", "b", "c", "d"], [768] * 4, shrinking=False), 5)
    assert [level.project.out_channels for level in head.levels] == [96, 192, 384, 768]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_at_the_full_rate_behind_decayed_layers(name: str) -> None:
    encoder = vit()
    encoder.pos_embed.requires_grad_(True)
    head = head_of(name, encoder)
    groups = rate_groups(encoder, head, 0.5)
    scales = {full: group.scale for group in groups for full, _ in group.params}
    assert {full.removeprefix("head.") for full in scales if full.startswith("head.")} == {
        own for own, _ in head.named_parameters()
    }
    assert {scale for full, scale in scales.items() if full.startswith("head.")} == {1.0}
    assert scales["encoder.pos_embed"] == 0.5**5


@pytest.mark.parametrize("name", HEADS)
def test_a_whole_model_leaves_by_export_and_onnx(name: str, tmp_path: Path) -> None:
    encoder = vit(depth=4)
    assert_leaves(Segmenter(encoder, head_of(name, encoder)), (3, *SIZE), tmp_path)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vit()
    with pytest.raises(UserError, match="head=unet is none of the heads: choose among linear"):
        build_head("unet", encoder, 5, SIZE)
    with pytest.raises(UserError, match="image_size=60x96 is not a multiple of the patch size 16"):
        build_head("dpt", encoder, 5, (60, 96))
    with pytest.raises(UserError, match="width=8 is not for head=linear"):
        build_head("linear", encoder, 5, SIZE, width=8)
    head = head_of("upernet", encoder)
    with pytest.raises(UserError, match="set batch_size=2 or more"):
        Segmenter(encoder, head)(torch.randn(1, 3, *SIZE))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'pip install "patchmine\[seg\]"'):
        build_head("upernet", encoder, 5, SIZE)


def test_an_encoder_of_videos_is_refused() -> None:
    video = build_encoder(
        "video_vit_tiny_patch16",
        image_size=(32, 32),
        clip=(4, 2),
        model_args={"embed_dim": 16, "depth": 1, "num_heads": 2},
    )
    with pytest.raises(UserError, match="reads videos, and a map of classes is of one image"):
        build_head("linear", video, 5, (32, 32))
