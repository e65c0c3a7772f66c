"""The cross-attention decoder against attention written out head by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.methods.mae import MAE
from patchmine.models.cross_decoder import CrossBlock
from patchmine.models.decoder import Decoder, DecoderInput, all_rows, last_rows
from patchmine.types import Grid, Mask

SIZES = dict(decoder_attention="cross", decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=4)


def slow_block(block: Any, queries: Tensor, context: Tensor, heads: int) -> Tensor:
    """One query of one image at a time, head by head."""
    width = queries.shape[-1]
    each = width // heads
    attention, result = block.attn, queries.clone()
    for image in range(len(queries)):
        keys, values = attention.kv(context[image]).split(width, dim=-1)
        for row in range(queries.shape[1]):
            asked = attention.q(block.norm1(queries[image, row]))
            found = []
            for head in range(heads):
                part = slice(head * each, (head + 1) * each)
                scores = keys[:, part] @ asked[part] / each**0.5
                found.append(F.softmax(scores, dim=0) @ values[:, part])
            own = queries[image, row] + attention.proj(torch.cat(found))
            hidden = F.gelu(block.mlp.fc1(block.norm2(own)))
            result[image, row] = own + block.mlp.fc2(hidden)
    return result


@pytest.mark.parametrize(
    "options",
    [{}, dict(decoder_mlp_ratio=2.5, decoder_norm_eps=1e-3), dict(decoder_qkv_bias=False)],
    ids=str,
)
def test_mask_tokens_read_out_visible_ones(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(MAE.Config(**SIZES, **options), 5)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(2, 7, 16)
    context, expected = tokens[:, :4], tokens[:, 4:]
    for block in decoder.blocks:
        expected = slow_block(block, expected, context, 4)
    found = decoder(tokens, 3)
    torch.testing.assert_close(found, decoder.norm(expected), atol=1e-5, rtol=1e-5)
    assert all(block.norm2.eps == decoder.norm.eps for block in decoder.blocks)


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_a_decoder_can_be_taken_apart_at_any_depth(attention: str) -> None:
    torch.manual_seed(0)
    blocks = Decoder(MAE.Config(**{**SIZES, "decoder_attention": attention}), 5).blocks
    tokens = torch.randn(2, 7, 16)
    whole = last_rows(blocks, tokens, 3)
    for depth in range(4):
        behind = all_rows(blocks[:depth], tokens, 3)
        assert torch.equal(behind[:, :-3], tokens[:, :-3]) == (attention == "cross" or depth == 0)
        torch.testing.assert_close(last_rows(blocks[depth:], behind, 3), whole)


def test_what_is_asked_of_a_whole_image_is_every_place() -> None:
    """Without a mask, mask tokens of all places look at all patches."""
    torch.manual_seed(0)
    grid = Grid((2, 3), (4, 4))
    asking = DecoderInput(8, 16, grid, 1, cross=True)
    nn.init.normal_(asking.mask_token)
    latent = torch.randn(2, 7, 8)
    every = torch.arange(6).expand(2, -1)
    assert torch.equal(asking.all_visible(latent), asking(latent, Mask(every, every, 6)))


def test_only_what_asks_for_it_has_cross_attention() -> None:
    kinds = {
        attention: [type(block) for block in Decoder(MAE.Config(**sizes), 5).blocks]
        for attention in ("self", "cross")
        for sizes in [{**SIZES, "decoder_attention": attention}]
    }
    assert kinds["cross"] == [CrossBlock] * 3
    assert CrossBlock not in kinds["self"]
    assert MAE.Config().decoder_attention == "self"
    assert MAE.Config().predicted_share == 1
