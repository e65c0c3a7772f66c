"""Features of ResNets and ViTs: against the networks' own forwards, at any size, and the rule for
positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from patchmine.backbones.family import build_encoder, encode, stage_features, stage_widths
from patchmine.backbones.positions import resize_positions
from patchmine.backbones.resnet import RESNET
from patchmine.backbones.vit import VIT
from patchmine.errors import UserError

NARROW: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 2}


def vit(model: str = "vit_tiny_patch16_224", **model_args: Any) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(
        model, image_size=(32, 48), patch_size=8, model_args={**NARROW, **model_args}
    )
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return encoder.eval()


def resnet() -> Any:
    torch.manual_seed(0)
    return build_encoder(
        "resnet18", image_size=(32, 32), model_args={"channels": (8, 8, 12, 16)}
    ).eval()


def test_stages_of_a_resnet_are_its_own_intermediates() -> None:
    encoder, images = resnet(), torch.randn(2, 3, 64, 96)
    found = stage_features(encoder, images, ["layer4", "layer2", "layer1"])
    theirs = encoder.forward_intermediates(images, intermediates_only=True)
    for mine, number in zip(found.maps, (4, 2, 1), strict=True):
        assert torch.equal(mine, theirs[number])
    torch.testing.assert_close(found.pooled, encoder(images))
    assert stage_widths(encoder, ["layer4", "layer2", "layer1"]) == [m.shape[1] for m in found.maps]


@pytest.mark.parametrize(
    ("model", "model_args"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"class_token": False}),
        ("vit_tiny_patch16_224", {"pre_norm": True}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": True}),
    ],
)
def test_blocks_of_a_vit_are_its_own_intermediates(model: str, model_args: dict[str, Any]) -> None:
    encoder, images = vit(model, **model_args), torch.randn(2, 3, 32, 48)
    found = stage_features(encoder, images, ["blocks.2", "blocks.0"])
    last, first = (
        encoder.forward_intermediates(
            images, indices=[number], norm=number == 2, intermediates_only=True
        )[0]
        for number in (2, 0)
    )
    torch.testing.assert_close(found.maps[0], last)
    torch.testing.assert_close(found.maps[1], first)
    tokens = encode(encoder, images)
    torch.testing.assert_close(
        found.pooled, tokens.mean(1) if encoder.cls_token is None else tokens[:, 0]
    )
    assert stage_widths(encoder, ["blocks.2", "blocks.0"]) == [32, 32]


def test_another_size_is_the_same_network_with_resized_positions() -> None:
    encoder, images = vit(), torch.randn(2, 3, 24, 16)
    found = stage_features(encoder, images, ["blocks.2"])
    positions = encoder.pos_embed.detach()
    twin = vit()
    twin.set_input_size((24, 16))
    rows = resize_positions(positions[0, 1:], (4, 6), (3, 2))
    twin.pos_embed.data = torch.cat([positions[:, :1], rows[None]], dim=1)
    torch.testing.assert_close(found.pooled, encode(twin, images)[:, 0])
    assert found.maps[0].shape == (2, 32, 3, 2)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, as torch's bicubic."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_weights(old: int, new: int) -> torch.Tensor:
    """(new, old): sample k lies at (k + 0.5) * old / (new + 0.1) - 0.5, borders repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for k in range(new):
        place = (k + 0.5) * old / (new + 0.1) - 0.5
        for neighbour in range(int(place // 1) - 1, int(place // 1) + 3):
            weights[k, min(max(neighbour, 0), old - 1)] += cubic(place - neighbour)
    return weights


@pytest.mark.parametrize("wanted", [(3, 3), (9, 5), (1, 2)])
def test_positions_are_sampled_at_the_scale_with_a_tenth(wanted: tuple[int, int]) -> None:
    table = torch.randn(7 * 4, 5, generator=torch.Generator().manual_seed(0))
    rows, columns = (slow_weights(old, new) for old, new in zip((7, 4), wanted, strict=True))
    expected = torch.einsum("yr,xc,rcd->yxd", rows, columns, table.view(7, 4, 5).double()).flatten(
        0, 1
    )
    found = resize_positions(table, (7, 4), wanted)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    by_size = F.interpolate(table.T.view(1, 5, 7, 4), wanted, mode="bicubic").flatten(2)[0].T
    assert (found - by_size).abs().max() > 1e-3


def test_positions_of_the_own_grid_stay_as_they_are() -> None:
    table = torch.randn(12, 5)
    assert resize_positions(table, (3, 4), (3, 4)) is table


def test_learned_positions_get_a_gradient_from_small_crops() -> None:
    encoder = vit()
    encoder.pos_embed.requires_grad_(True)
    stage_features(encoder, torch.randn(2, 3, 16, 16)).pooled.sum().backward()
    assert encoder.pos_embed.grad.abs().sum() > 0


def test_what_there_is_not_is_told() -> None:
    assert list(RESNET.stages(resnet())) == ["layer1", "layer2", "layer3", "layer4"]
    assert list(VIT.stages(vit())) == ["blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(
        UserError, match=r"method.stages=layer5, but .* layer1, layer2, layer3, layer4"
    ):
        stage_widths(resnet(), ["layer2", "layer5"])
    with pytest.raises(UserError, match="images of 36x32 pixels are not filled by patches of 8x8"):
        stage_features(vit(), torch.randn(1, 3, 36, 32))
    with pytest.raises(UserError, match="relative positions takes images of one size only"):
        stage_features(
            vit("beit_base_patch16_224", use_rel_pos_bias=True), torch.randn(1, 3, 16, 16)
        )
