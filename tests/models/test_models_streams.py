"""The stock block under a causal mask, and the block of queries, against what they are written out
from.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from patchmine.models.streams import QueryBlock, content_block, without_learning


@pytest.mark.parametrize(
    "options",
    [{}, dict(init_values=0.3), dict(qk_norm=True), dict(qkv_bias=False), dict(mlp_ratio=2)],
    ids=str,
)
def test_a_stock_block_without_limits_is_itself(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=4, **options
    )
    block = vit.blocks[0].eval()
    tokens = torch.randn(2, 7, 32)
    everyone = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    torch.testing.assert_close(content_block(block, tokens, everyone), block(tokens))


def test_causal_without_a_mask_is_the_lower_triangle() -> None:
    torch.manual_seed(0)
    block = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=4
    ).blocks[0]
    tokens = torch.randn(2, 7, 32)
    lower = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(content_block(block, tokens), content_block(block, tokens, lower))
    # Each row is what the whole block makes of the rows until then.
    for row in range(7):
        torch.testing.assert_close(
            content_block(block, tokens)[:, row], block(tokens[:, : row + 1])[:, row]
        )


def slow_query_block(block: QueryBlock, queries: Tensor, content: Tensor) -> Tensor:
    """One query, one head, one image at a time."""
    width = queries.shape[-1]
    per_head = width // block.num_heads
    out = torch.zeros_like(queries)
    for image in range(len(queries)):
        seen = block.norm1(content[image])
        for row in range(queries.shape[1]):
            query = block.query(block.norm1(queries[image, row]))
            keys, values = block.key_value(seen[: row + 1]).split(width, dim=1)
            parts = []
            for head in range(block.num_heads):
                of_head = slice(head * per_head, (head + 1) * per_head)
                weights = (keys[:, of_head] @ query[of_head] / per_head**0.5).softmax(dim=0)
                parts.append(weights @ values[:, of_head])
            answer = queries[image, row] + block.proj(torch.cat(parts))
            out[image, row] = answer + block.mlp(block.norm2(answer))
    return out


def test_query_block_against_loops() -> None:
    torch.manual_seed(0)
    block = QueryBlock(16, 2, 64)
    block.initialise()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
    queries, content = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(block(queries, content), slow_query_block(block, queries, content))


def test_looking_leaves_an_encoder_as_it_was() -> None:
    encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).train()
    with without_learning(encoder, torch.device("cpu")):
        assert not encoder[0].training
        assert not encoder(torch.ones(1, 4)).requires_grad
    assert encoder[0].training
    with pytest.raises(ZeroDivisionError), without_learning(encoder, torch.device("cpu")):
        raise ZeroDivisionError
    assert encoder.training


def test_looking_under_autocast_casts_like_the_step_and_keeps_no_weights() -> None:
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with without_learning(layer, torch.device("cpu")):
            assert layer(torch.ones(1, 4)).dtype == torch.bfloat16
        layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.is_autocast_cache_enabled()
