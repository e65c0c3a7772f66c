"""Backbones of detection models, and windowed attention against full attention and a slow loop."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from fixtures.stages import encoder_of as staged
from patchmine.backbones.family import build_encoder, stage_features
from patchmine.errors import UserError
from patchmine.models.adapt import rate_groups
from patchmine.models.droppath import add_drop_paths, draw_drop_paths
from patchmine.models.noise import Noise
from patchmine.models.pyramid import build_pyramid
from patchmine.models.windows import last_of_quarters, run_in_windows, windowed_map

SIZE = (64, 96)
GRID = (8, 12)
SHORT = {"channels": (8, 8, 12, 16), "layers": (1, 1, 1, 1)}
TINY = {"embed_dim": 16, "depth": 4, "num_heads": 2}


def encoder_of(model: str = "vit_small_patch16_224", patch: int = 8, **more: Any) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(
        model, image_size=SIZE, patch_size=patch, model_args={**TINY, **more}
    ).eval()
    with torch.no_grad():  # positions of the class token, biases and layer scales do something
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def images(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *(size or SIZE), generator=generator)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (4, [0, 1, 2, 3]), (6, [1, 2, 4, 5]), (1, [0])],
)
def test_global_blocks_end_the_quarters(depth: int, blocks: list[int]) -> None:
    assert last_of_quarters(depth) == blocks


@pytest.mark.parametrize("window", [12, 14])
@pytest.mark.parametrize("more", [{}, {"reg_tokens": 2}, {"class_token": False}])
def test_one_window_is_full_attention(window: int, more: dict[str, Any]) -> None:
    encoder = encoder_of(**more)
    with torch.no_grad():
        found = windowed_map(encoder, images(), window, ())
        (expected,) = stage_features(encoder, images(), ["blocks.3"]).maps
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        windowed = windowed_map(encoder, images(), 5, ())
    assert (windowed - expected).abs().max() > 1e-3


def slow_windows(block: nn.Module, tokens: Tensor, window: int, num_prefix: int) -> Tensor:
    """One window and one image at a time."""
    result = tokens.clone()
    for one in range(len(tokens)):
        copies = []
        for top in range(0, GRID[0], window):
            for left in range(0, GRID[1], window):
                places = [
                    num_prefix + row * GRID[1] + column
                    for row in range(top, min(top + window, GRID[0]))
                    for column in range(left, min(left + window, GRID[1]))
                ]
                seen = [*range(num_prefix), *places]
                done = block(tokens[one, seen][None])[0]
                copies.append(done[:num_prefix])
                result[one, places] = done[num_prefix:]
        result[one, :num_prefix] = torch.stack(copies).mean(dim=0)
    return result


@pytest.mark.parametrize("window", [1, 3, 4, 5, 8, 9])
def test_windows_are_what_a_slow_loop_makes(window: int) -> None:
    encoder = encoder_of(reg_tokens=2)
    tokens = torch.randn(2, 3 + GRID[0] * GRID[1], 16)
    with torch.no_grad():
        found = run_in_windows(encoder.blocks[0], tokens, GRID, window, 3, {})
        expected = slow_windows(encoder.blocks[0], tokens, window, 3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_patches_see_their_window_and_global_blocks_see_all() -> None:
    encoder = encoder_of(class_token=False, global_pool="avg")
    for blocks, seen in (((), 4 * 4), ((2,), GRID[0] * GRID[1])):
        taken = images().requires_grad_()
        one = windowed_map(encoder, taken, 4, blocks)[0, :, 5, 6]
        (gradient,) = torch.autograd.grad(one.square().sum(), taken)
        touched = gradient[0].abs().sum(dim=0).unflatten(1, (12, 8)).unflatten(0, (8, 8))
        assert int((touched.sum(dim=(1, 3)) > 0).sum()) == seen


@pytest.mark.parametrize("more", [{}, {"no_embed_class": True}, {"reg_tokens": 2}])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 128), (128, 128)])
def test_positions_at_any_size_are_timms(size: tuple[int, int], more: dict[str, Any]) -> None:
    encoder = encoder_of(**more)
    own = timm.create_model(
        "vit_small_patch16_224",
        img_size=SIZE,
        patch_size=8,
        num_classes=0,
        dynamic_img_size=True,
        **TINY,
        **more,
    ).eval()
    own.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        (expected,) = own.forward_intermediates(
            images(*size), indices=1, norm=True, intermediates_only=True
        )
        found = windowed_map(encoder, images(*size), None, ())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_maps_of_a_transformer_halve_from_a_quarter_of_a_patch(patch: int) -> None:
    encoder = encoder_of(patch=patch)
    before = set(encoder.state_dict())
    backbone = build_pyramid(encoder, window=3, global_blocks=[3], width=6)
    maps = backbone(images())
    strides = [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert backbone.out_channels == 6
    for one, stride in zip(maps.values(), strides, strict=True):
        assert one.shape == (2, 6, -(-SIZE[0] // stride), -(-SIZE[1] // stride))
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])
    torch.stack([one.square().mean() for one in maps.values()]).sum().backward()
    learning = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert not {name for name, p in learning.items() if p.grad is None}
    assert set(encoder.state_dict()) == before


def test_layers_of_a_pyramid_are_those_of_vitdet() -> None:
    neck = build_pyramid(encoder_of()).neck
    kinds = [[type(part).__name__ for part in level[0].layers] for level in neck.levels]
    assert kinds == [
        ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d"],
        ["ConvTranspose2d"],
        [],
        ["MaxPool2d"],
    ]
    assert [level[1].in_channels for level in neck.levels] == [4, 8, 16, 16]
    assert [level[3].out_channels for level in neck.levels] == [256] * 4


def test_a_resnet_gets_torchvisions_pyramid() -> None:
    encoder = build_encoder("resnet18", image_size=SIZE, model_args=SHORT)
    backbone = build_pyramid(encoder, width=6)
    maps = backbone(images())
    assert {name: tuple(one.shape[2:]) for name, one in maps.items()} == {
        "0": (16, 24),
        "1": (8, 12),
        "2": (4, 6),
        "3": (2, 3),
        "pool": (1, 2),
    }
    assert {one.shape[1] for one in maps.values()} == {backbone.out_channels}
    with pytest.raises(UserError, match="window=7, but a ResNet has no attention"):
        build_pyramid(encoder, window=7)


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_stages_are_normed_before_their_pyramid(kind: str) -> None:
    encoder = staged(kind, image_size=(64, 64))
    backbone = build_pyramid(encoder, width=6)
    maps = backbone(images(64, 96))
    assert [tuple(one.shape) for one in maps.values()] == [
        (2, 6, 64 // step, 96 // step) for step in (4, 8, 16, 32)
    ] + [(2, 6, 1, 2)]
    assert backbone.strides == [4, 8, 16, 32, 64]
    found = stage_features(encoder, images(64, 96), backbone.stages).maps
    normed = [
        functional.layer_norm(one.movedim(1, 3), one.shape[1:2], eps=1e-6).movedim(3, 1)
        for one in found
    ]
    expected = backbone.neck.pyramid(dict(zip("0123", normed, strict=True)))
    torch.testing.assert_close(maps["0"], expected["0"])
    with pytest.raises(UserError, match=r"window=7, but a (ConvNeXt|Swin).* other than its own"):
        build_pyramid(encoder, window=7)
    with pytest.raises(UserError, match=r"strides of 3 pixels.*patch_size=4"):
        build_pyramid(staged(kind, image_size=(96, 96), patch_size=3))


def test_a_detector_of_torchvision_learns_on_it() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    backbone = build_pyramid(encoder_of(), window=3, global_blocks=[3], width=8)
    detector = detection.FasterRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5),
    )
    target = {"boxes": torch.tensor([[8.0, 8, 40, 56]]), "labels": torch.tensor([1])}
    losses = detector([images()[0]], [target])
    sum(losses.values()).backward()
    assert torch.isfinite(torch.stack(list(losses.values()))).all()
    assert backbone.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_neck_learns_at_the_full_rate_behind_decayed_layers(name: str) -> None:
    encoder = encoder_of() if name == "vit" else build_encoder("resnet18", model_args=SHORT)
    backbone = build_pyramid(encoder, width=6)
    groups = rate_groups(backbone.encoder, backbone.neck, 0.5)
    found = [parameter for group in groups for _, parameter in group.params]
    assert {id(p) for p in found} == {id(p) for p in backbone.parameters() if p.requires_grad}
    assert len(found) == len({id(p) for p in found})
    scales = {full: group.scale for group in groups for full, _ in group.params}
    assert {scale for full, scale in scales.items() if full.startswith("head.")} == {1.0}
    assert min(scales.values()) == 0.5**5


def test_a_pyramid_leaves_by_export() -> None:
    backbone = build_pyramid(encoder_of(), window=5, global_blocks=[3], width=6).eval()
    with torch.no_grad():
        expected = backbone(images())
        found = torch.export.export(backbone, (images(),)).module()(images())
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-4, rtol=0)


BEIT = "beit_base_patch16_224"


def test_relative_positions_see_all_patches_at_one_size() -> None:
    encoder = encoder_of(BEIT)
    with pytest.raises(UserError, match=r"window=7, but the encoder's relative positions.*null"):
        build_pyramid(encoder, window=7, global_blocks=[3])
    with torch.no_grad():
        found = windowed_map(encoder, images(), None, ())
        (expected,) = stage_features(encoder, images(), ["blocks.3"]).maps
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="images of 96x64 pixels do not fit an encoder with rel"):
        build_pyramid(encoder)(images(96, 64))
    absolute = encoder_of(BEIT, use_rel_pos_bias=False, use_abs_pos_emb=True)
    assert build_pyramid(absolute, window=3, global_blocks=[3], width=6)(images(96, 64))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="window=0 holds no patch"):
        build_pyramid(encoder_of(), window=0)
    with pytest.raises(UserError, match="global_blocks=4, but the model has blocks 0 to 3"):
        build_pyramid(encoder_of(), window=3, global_blocks=[1, 4])
    with pytest.raises(UserError, match="images of 60x96 pixels are not filled by patches of 8x8"):
        build_pyramid(encoder_of())(images(60, 96))
    odd = build_encoder(
        "vit_small_patch16_224", image_size=(28, 28), patch_size=14, model_args=TINY
    )
    with pytest.raises(UserError, match=r"patches of 14x14 pixels.*powers of two"):
        build_pyramid(odd)
    video = build_encoder(
        "video_vit_tiny_patch16", image_size=(32, 32), clip=(4, 2), model_args=TINY
    )
    with pytest.raises(UserError, match="reads videos, and boxes are of one image"):
        build_pyramid(video)


def test_windows_of_an_image_are_dropped_together() -> None:
    encoder = encoder_of(reg_tokens=2).train()
    paths = add_drop_paths(encoder, 0.6)
    torch.manual_seed(0)
    taken = torch.randn(6, 3, *SIZE)
    noise = Noise(seed=3)

    def look(first: int, last: int, blocks: tuple[int, ...] = (3,)) -> Tensor:
        noise.begin(5, first, 6)
        draw_drop_paths(paths, noise, taken[first:last])
        with torch.no_grad():
            return windowed_map(encoder, taken[first:last], 5, blocks)

    whole = look(0, 6)
    torch.testing.assert_close(torch.cat([look(0, 4), look(4, 6)]), whole, atol=1e-5, rtol=0)
    for path in paths:
        path.noise = torch.ones(6)  # nothing is dropped
    branch = paths[-1](torch.ones(24, 2, 3))
    assert torch.equal(branch, torch.full((24, 2, 3), 1 / (1 - paths[-1].rate)))
    paths[-1].noise = torch.tensor([0.0, 1, 0, 1, 1, 0])
    kept = paths[-1](torch.ones(24, 2, 3))[:, 0, 0] > 0
    assert kept.tolist() == [n for n in (False, True, False, True, True, False) for _ in range(4)]
