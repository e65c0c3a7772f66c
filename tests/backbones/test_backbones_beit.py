"""BEiT-style encoders: how they start, what they compute beside timm's own forward, where they are
refused.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

from patchmine.backbones.beit import BEIT
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import Encoder, build_encoder, encode
from patchmine.backbones.filling import fill
from patchmine.backbones.tokens import patch_positions
from patchmine.backbones.weights import load_encoder, open_weights
from patchmine.errors import UserError
from patchmine.methods import METHODS, method_class

TINY = dict(embed_dim=96, depth=3, num_heads=3)
ABSOLUTE = dict(use_rel_pos_bias=False, use_abs_pos_emb=True)
SHARED = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)


def beit(**extra: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(
        "beit_base_patch16_224", image_size=(16, 24), patch_size=4, model_args={**TINY, **extra}
    )


def test_starts_as_simmim_does() -> None:
    encoder = beit(**SHARED)
    for depth, block in enumerate(encoder.blocks, start=1):
        assert block.attn.qkv.weight.abs().max() <= 0.02
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.0108, rel=0.03)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(
            0.0108 / math.sqrt(2 * depth), rel=0.03
        )
        assert block.attn.proj.weight.std().item() == pytest.approx(
            0.0108 / math.sqrt(2 * depth), rel=0.03
        )
        assert torch.all(block.gamma_1 == 0.1)
        assert not block.mlp.fc1.bias.any()
    assert encoder.patch_embed.proj.weight.abs().max() <= 0.02
    assert not encoder.patch_embed.proj.bias.any()
    assert not encoder.rel_pos_bias.relative_position_bias_table.any()


@pytest.mark.parametrize("extra", [ABSOLUTE, SHARED, {}], ids=["absolute", "shared", "per block"])
def test_encodes_as_timm_does(extra: dict[str, bool]) -> None:
    encoder = beit(**extra).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        images = torch.randn(2, 3, 16, 24)
        torch.testing.assert_close(
            encode(encoder, images), encoder.forward_features(images), rtol=1e-4, atol=1e-5
        )


def test_knows_where_positions_enter() -> None:
    assert not BEIT.relative_positions(beit(**ABSOLUTE))
    assert BEIT.relative_positions(beit(**SHARED))
    assert BEIT.relative_positions(beit())
    assert patch_positions(beit(**ABSOLUTE)).any()
    assert not patch_positions(beit(**SHARED)).any()


@pytest.mark.parametrize("name", ["mae", "hpm"])
def test_a_method_that_leaves_patches_out_refuses_relative_positions(name: str) -> None:
    settings = METHODS[name]()
    with pytest.raises(UserError, match=r"use_rel_pos_bias=false"):
        method_class(settings)(settings, beit(**SHARED))


@pytest.mark.parametrize("extra", [ABSOLUTE, SHARED, {}], ids=["absolute", "shared", "per block"])
def test_export_opens_in_timm_and_here(extra: dict[str, bool], tmp_path: Path) -> None:
    encoder = beit(**extra).eval()
    folder = export_encoder(encoder, tmp_path / "export", Preprocessing([0.5] * 3, [0.5] * 3))
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        expected = encoder.forward_features(images)
        for opened in (
            timm.create_model(f"local-dir:{folder}", pretrained=True),
            load_encoder(folder),
        ):
            assert torch.equal(opened.eval().forward_features(images), expected)


@pytest.mark.parametrize("extra", [ABSOLUTE, SHARED, {}], ids=["absolute", "shared", "per block"])
def test_weights_of_another_grid_are_resampled(extra: dict[str, bool]) -> None:
    torch.manual_seed(0)
    args = {**TINY, **extra}
    small = build_encoder(
        "beit_base_patch16_224", image_size=(16, 16), patch_size=4, model_args=args
    )
    large = build_encoder(
        "beit_base_patch16_224", image_size=(24, 16), patch_size=4, model_args=args
    )
    for name, parameter in small.named_parameters():
        if name.endswith(("bias_table", "pos_embed")):
            parameter.data = (
                torch.linspace(-1, 1, parameter.shape[0])[:, None].expand_as(parameter).clone()
            )
    report = fill(large, small, "elsewhere")
    assert len(report.resized) == (1 if extra != {} else TINY["depth"])
    tables = {
        name: table for name, table in large.named_parameters() if name.endswith("bias_table")
    }
    assert len(tables) == (0 if extra == ABSOLUTE else 1 if extra == SHARED else TINY["depth"])
    for name, table in tables.items():
        before = small.get_parameter(name)
        assert table.shape == (11 * 7 + 3, 3)
        assert torch.equal(table[-3:], before[-3:])  # the class token's
        middle, centre = table[11 * 7 // 2], before[7 * 7 // 2]  # distance 0 stays distance 0
        torch.testing.assert_close(middle, centre, atol=1e-4, rtol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about timm's own indexing
            expected = resize_rel_pos_bias_table(before, (6, 4), table.shape)  # from a square
        assert torch.equal(table, expected)
    assert encode(large, torch.randn(1, 3, 24, 16)).isfinite().all()


def test_each_block_begins_with_the_table_that_all_shared() -> None:
    shared, own = beit(**SHARED).eval(), beit(use_rel_pos_bias=True).eval()
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    report = fill(own, shared, "elsewhere")
    assert "blocks.*.attn.relative_position_bias_table from the shared table" in report.render()
    assert report.missing + report.unexpected == []
    images = torch.randn(2, 3, 16, 24)
    expected, found = (each.forward_features(images) for each in (shared, own))
    assert torch.equal(found, expected)
    for each in (expected, found):
        each.square().sum().backward()
    gradients = [block.attn.relative_position_bias_table.grad for block in own.blocks]
    assert not torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(
        sum(gradients), shared.rel_pos_bias.relative_position_bias_table.grad, rtol=1e-4, atol=1e-4
    )


def test_a_file_with_one_table_for_all_opens_with_one_a_block(tmp_path: Path) -> None:
    shared = beit(**SHARED).eval()
    torch.nn.init.normal_(shared.rel_pos_bias.relative_position_bias_table)
    save_file(shared.state_dict(), tmp_path / "simmim.safetensors")
    opened, report = open_weights(
        tmp_path / "simmim.safetensors",
        model="beit_base_patch16_224",
        model_args={**TINY, "patch_size": 4, "use_rel_pos_bias": True},
        image_size=(16, 24),
        source_size=(16, 24),
    )
    assert "from the shared table" in report.render()
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(opened.eval().forward_features(images), shared.forward_features(images))


def test_a_convolutional_stem_is_refused() -> None:
    with pytest.raises(UserError, match="convolutional stem"):
        build_encoder("vit_tiny_r_s16_p8_224")
