"""Vision transformers with rotary positions: what is encoded of some patches, at other sizes and in
windows, beside timm's own forward, and which models are refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from patchmine.backbones.classifier import Classifier, Head, read_head
from patchmine.backbones.eva import EVA
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import (
    Encoder,
    build_encoder,
    encode,
    initialise_encoder,
    stage_features,
)
from patchmine.backbones.filling import resize_encoder
from patchmine.backbones.weights import load_encoder
from patchmine.errors import UserError
from patchmine.models.windows import windowed_map

TINY = dict(embed_dim=32, depth=3, num_heads=2)
DINOV3, EVA02 = "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"
MODELS: list[tuple[str, dict[str, Any]]] = [
    (DINOV3, {}),  # registers, no table
    ("vit_small_patch16_dinov3_qkvb", {}),
    (EVA02, {}),  # a table too
    ("eva02_base_patch16_clip_224", {}),  # matrices for queries, keys and values; norms inside
    ("vit_pe_core_tiny_patch16_384", {}),  # a norm before the blocks
    ("vit_medium_patch16_rope_reg1_gap_256", {"num_reg_tokens": 0}),  # nothing before its patches
]


def eva(model: str, size: tuple[int, int] = (16, 24), **extra: Any) -> Encoder:
    """One whose weights are none of the first ones."""
    torch.manual_seed(0)
    arguments = {**TINY, **extra}
    encoder = build_encoder(model, image_size=size, patch_size=4, model_args=arguments).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("model", "extra"), MODELS, ids=str)
def test_encodes_as_timm_does(model: str, extra: dict[str, Any], images: Tensor) -> None:
    encoder = eva(model, **extra)
    close(encode(encoder, images), encoder.forward_features(images))
    # What was computed for an extraction of features serves training, too.
    with torch.inference_mode():
        encode(encoder, images)
    with torch.enable_grad():
        encode(encoder.train(), images).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize(("model", "extra"), MODELS, ids=str)
def test_visible_patches_are_what_a_mask_over_all_leaves(
    model: str, extra: dict[str, Any], images: Tensor
) -> None:
    encoder = eva(model, **extra)
    first, count = encoder.num_prefix_tokens, 24
    visible = torch.stack([torch.randperm(count)[:9] for _ in images])  # in no order
    hidden = torch.ones(len(images), count, dtype=torch.bool).scatter(1, visible, False)
    everyone = torch.zeros(len(images), first, dtype=torch.bool)
    mask = torch.zeros(len(images), 1, 1, first + count)
    mask.masked_fill_(torch.cat([everyone, hidden], dim=1)[:, None, None], -torch.inf)
    slow = encoder.forward_features(images, attn_mask=mask)
    rows = visible[:, :, None].expand(-1, -1, slow.shape[-1])
    wanted = torch.cat([slow[:, :first], slow[:, first:].gather(1, rows)], dim=1)
    close(encode(encoder, images, visible), wanted)


@torch.no_grad()
@pytest.mark.parametrize("model", [DINOV3, "vit_small_patch16_rope_224"])
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (32, 24)], ids=str)
def test_images_of_other_sizes_have_angles_of_their_own(model: str, size: tuple[int, int]) -> None:
    encoder = eva(model)
    images = torch.randn(2, 3, *size)
    built = copy.deepcopy(encoder)
    resize_encoder(built, size)
    if built.dynamic_img_size:
        close(built.forward_features(images), encoder.forward_features(images))
    found = stage_features(encoder, images, ["blocks.2"])
    tokens = built.forward_features(images)[:, encoder.num_prefix_tokens :]
    close(found.maps[0].flatten(2).transpose(1, 2), tokens)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (12, 20)], ids=str)
def test_a_moved_encoder_with_a_table_is_timms(size: tuple[int, int]) -> None:
    encoder, images = eva(EVA02), torch.randn(2, 3, *size)
    other = copy.deepcopy(encoder)
    resize_encoder(encoder, size)
    other.set_input_size(size)
    close(encode(encoder, images), other.forward_features(images))


@torch.no_grad()
@pytest.mark.parametrize("model", [DINOV3, EVA02])
def test_windows_keep_the_angles_of_their_patches(model: str, images: Tensor) -> None:
    """Beside the whole sequence under a mask, one copy of the prefix for each window."""
    encoder = eva(model, **({"num_reg_tokens": 0} if model == DINOV3 else {}))
    close(windowed_map(encoder, images, 99, []), windowed_map(encoder, images, None, []))
    encoder.blocks = encoder.blocks[:1]
    window = windowed_map(encoder, images, 3, [])  # a grid of 4 x 6: smaller ones at the bottom
    rows, columns = torch.meshgrid(torch.arange(4) // 3, torch.arange(6) // 3, indexing="ij")
    place = (rows * 2 + columns).flatten()
    same = torch.cat([torch.ones(24, 1, dtype=torch.bool), place[:, None] == place], dim=1)
    same = torch.cat([torch.ones(1, 25, dtype=torch.bool), same])
    slow = encoder.forward_features(images, attn_mask=same[None, None])
    close(window.flatten(2).transpose(1, 2), slow[:, 1:])


def test_starts_as_mae_does_and_layer_scale_as_the_model_says() -> None:
    encoder = eva(EVA02, init_values=0.25)
    initialise_encoder(encoder)
    for block in encoder.blocks:
        assert torch.all(block.gamma_1 == 0.25)
        assert torch.all(block.gamma_2 == 0.25)
        assert not block.attn.q_bias.any()
        assert torch.all(block.norm1.weight == 1)
        bound = (6 / sum(block.attn.qkv.weight.shape)) ** 0.5  # of a uniform distribution
        assert 0.9 * bound < block.attn.qkv.weight.abs().max() <= bound
    assert not encoder.pos_embed.requires_grad
    assert encoder.pos_embed[0, 1:].any()
    assert torch.all(eva(DINOV3).blocks[0].gamma_1.round(decimals=1) != 1)


@pytest.mark.parametrize(
    ("model", "extra", "words"),
    [
        ("vit_small_patch16_rope_mixed_224", {}, "anew in every block"),
        ("eva02_enormous_patch14_clip_224", {}, "use_post_norm"),
        (EVA02, dict(use_abs_pos_emb=False, use_rot_pos_emb=False), "neither rotary nor absolute"),
        (DINOV3, dict(rope_rescale_coords=2.0), "rope_rescale_coords .* cannot repeat"),
    ],
)
def test_refused_by_name(model: str, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        eva(model, **extra)


def test_no_step_draws_angles_by_itself(images: Tensor) -> None:
    """A described network may ask for timm's random angles, which training then does without."""
    encoder = EVA.create(DINOV3, dict(TINY, img_size=(16, 24), patch_size=4, num_classes=0))
    told = dict(TINY, img_size=(16, 24), patch_size=4, rope_jitter_coords=2.0, num_classes=0)
    other = EVA.create(DINOV3, told)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(encode(other.train(), images), encode(encoder.eval(), images))


@torch.no_grad()
@pytest.mark.parametrize(("model", "extra"), MODELS, ids=str)
def test_leaves_for_timm_and_comes_back(
    model: str, extra: dict[str, Any], images: Tensor, tmp_path: Path
) -> None:
    encoder = eva(model, **extra)
    folder = export_encoder(encoder, tmp_path / "out", Preprocessing((0.5,) * 3, (0.5,) * 3))
    wanted = encode(encoder, images)
    timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    close(timms.forward_features(images), wanted)
    close(encode(load_encoder(folder).eval(), images), wanted)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("model", [DINOV3, EVA02])
def test_a_classifier_on_it_is_timms(model: str, pool: str, images: Tensor, tmp_path: Path) -> None:
    encoder = eva(model)
    head = Head(nn.Linear(32, 2), pool, ["cat", "dog"])
    how = Preprocessing((0.5,) * 3, (0.5,) * 3)
    folder = export_encoder(encoder, tmp_path / "out", how, head)
    timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wanted = Classifier(encoder, head.layer, pool).eval()(images)
    close(timms(images), wanted)
    opened = Classifier(load_encoder(folder), read_head(folder).layer, pool).eval()
    close(opened(images), wanted)
