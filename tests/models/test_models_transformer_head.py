"""MOKD's T-Head against a slow twin whose attention is written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.backbones.positions import resize_positions
from patchmine.models.transformer_head import TransformerHead, draw_dino_weights

IMAGES, QUERIES = 2, 3


def head(*, project: bool) -> TransformerHead:
    torch.manual_seed(0)
    made = TransformerHead(
        10 if project else 12, 12, (4, 4), 7, depth=2, num_heads=3, project=project
    )
    with torch.no_grad():  # first weights are so small that attention is even
        for block in made.blocks:
            block.attn.qkv.weight *= 30
    return made


def inputs(*, project: bool) -> tuple[Tensor, Tensor]:
    """Maps (N, C, 3, 4), of another size than the positions, and queries (J * N, D)."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(IMAGES, 10 if project else 12, 3, 4, generator=generator)
    return maps, torch.randn(QUERIES * IMAGES, 12, generator=generator)


def slow(
    module: TransformerHead, maps: Tensor, queries: Tensor, *, heeded: bool = True
) -> tuple[Tensor, Tensor]:
    """Row by row, every query with its own copy of the map; ``heeded=False``: tokens cannot attend
    to it.

    Logits (J * N, K) and the attention of the tokens to the query (J * N, n).
    """
    outputs, shares = [], []
    for row, query in enumerate(queries):
        one = maps[row % IMAGES][None]
        if module.patch_embed is not None:
            one = F.conv2d(one, module.patch_embed.weight, module.patch_embed.bias)
        tokens = one.flatten(2).transpose(1, 2) + resize_positions(
            module.pos_embed[0], (4, 4), (3, 4)
        )
        tokens = torch.cat([query[None, None], tokens], dim=1)
        seen = []
        for block in module.blocks:
            parts = block.attn.qkv(block.norm1(tokens)).reshape(13, 3, 3, 4).permute(1, 2, 0, 3)
            logits = parts[0] @ parts[1].transpose(1, 2) / 2.0  # heads of 4
            if not heeded:
                logits[:, 1:, 0] = -torch.inf
            weights = logits.softmax(dim=-1)
            seen.append(weights[:, 1:, 0].mean(dim=0))
            mixed = (weights @ parts[2]).transpose(0, 1).reshape(1, 13, 12)
            tokens = tokens + block.attn.proj(mixed)
            tokens = tokens + block.mlp(block.norm2(tokens))
        outputs.append(module.last_layer(module.norm(tokens)[:, 1:].mean(dim=1))[0])
        shares.append(torch.stack(seen).mean(dim=0))
    return torch.stack(outputs), torch.stack(shares)


@pytest.mark.parametrize("project", [True, False])
def test_every_query_with_its_own_image(project: bool) -> None:
    module, (maps, queries) = head(project=project), inputs(project=project)
    expected, shares = slow(module, maps, queries)
    torch.testing.assert_close(module(maps, queries), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        module.attention_to_query(maps, queries), shares, atol=1e-6, rtol=1e-5
    )
    assert shares.std() > 1e-3  # or the comparison says nothing


def test_a_query_acts_through_attention_and_nothing_else() -> None:
    module, (maps, queries) = head(project=True), inputs(project=True)
    unheeded, _ = slow(module, maps, queries, heeded=False)
    torch.testing.assert_close(unheeded, module(maps).repeat(QUERIES, 1), atol=1e-5, rtol=1e-5)
    asked = module(maps, queries)
    assert (asked - unheeded).abs().max() > 1e-3
    assert (module(maps, queries.flip(0)) - asked).abs().max() > 1e-3


def test_a_query_is_the_mean_of_the_projected_map() -> None:
    module, (maps, _) = head(project=True), inputs(project=True)
    assert module.patch_embed is not None
    torch.testing.assert_close(
        module.query(maps.mean(dim=(2, 3))), module.patch_embed(maps).mean(dim=(2, 3))
    )
    pooled = torch.randn(2, 12)
    assert head(project=False).query(pooled) is pooled


def test_images_do_not_meet() -> None:
    module, (maps, queries) = head(project=True), inputs(project=True)
    order = torch.tensor([1, 0])
    moved = module(maps[order], queries.unflatten(0, (QUERIES, IMAGES))[:, order].flatten(0, 1))
    expected = module(maps, queries).unflatten(0, (QUERIES, IMAGES))[:, order].flatten(0, 1)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_logits_are_exact_under_autocast() -> None:
    module, (maps, _) = head(project=True), inputs(project=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(maps)
    assert logits.dtype == torch.float32
    assert (logits.bfloat16().float() != logits).any()


def test_a_vit_starts_as_dinos() -> None:
    args = dict(embed_dim=48, depth=2, num_heads=2)
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=4, model_args=args
    )
    torch.manual_seed(0)
    draw_dino_weights(encoder)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            assert torch.equal(
                parameter, torch.ones_like(parameter) if name.endswith("weight") else 0 * parameter
            ), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
        elif parameter.numel() > 1000 and "patch_embed" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert encoder.patch_embed.proj.weight.abs().max() <= 1 / 48**0.5  # torch's bound for 48 inputs
