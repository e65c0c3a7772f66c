"""Where a class token looks: its row of the last block's attention, without the other rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from patchmine.backbones.blocks import run_parts
from patchmine.backbones.family import block_outputs, family_of
from patchmine.backbones.record import Encoder
from patchmine.backbones.tokens import embed_patches, image_grid, prefix_tokens, turned
from patchmine.errors import UserError


def class_attention(
    encoder: Encoder, images: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B heads N"]:
    """Softmax attention of the class token in the last block to all N = P + L tokens, float32.

    The last block stops there: one query, and no values, projection or MLP (arXiv 2212.05922).
    Raises UserError for an encoder without class token.
    """
    if encoder.cls_token is None:
        raise UserError(
            "attention maps are those of the class token, and the model has none: "
            "set model_args.class_token=true"
        )
    tokens = embed_patches(encoder, images)
    tokens = torch.cat([prefix_tokens(encoder, len(tokens)), tokens], dim=1)  # (B, P + L, D)
    ((_, tokens),) = block_outputs(encoder, tokens, [len(encoder.blocks) - 1])
    family = family_of(encoder)
    angles = family.angles(encoder, image_grid(encoder, images))

    def logits_of(last: Any, tokens: Tensor) -> Tensor:
        return _class_logits(last.attn, last.norm1(tokens), angles) + family.class_bias(encoder)

    return run_parts(encoder.blocks[-1], logits_of, tokens).float().softmax(dim=-1)


def _class_logits(attention: Any, normed: Tensor, angles: Tensor | None) -> Tensor:
    """(B, N, D), class token first -> (B, heads, N), its query times every key, scaled."""
    batch, length, _ = normed.shape
    heads = attention.num_heads
    query, keys = _query_and_keys(attention, normed)
    query, keys = query.reshape(batch, heads, -1), keys.reshape(batch, length, heads, -1)
    if isinstance(getattr(attention, "q_norm", None), nn.Module):  # identities in most models
        query, keys = attention.q_norm(query), attention.k_norm(keys)
    keys = keys.transpose(1, 2)  # (B, heads, N, d)
    if angles is not None:  # the class token and its like are not turned
        first = attention.num_prefix_tokens
        half = getattr(attention, "rotate_half", False)
        keys = torch.cat([keys[:, :, :first], turned(keys[:, :, first:], angles, half)], dim=2)
    return torch.einsum("bhd,bhnd->bhn", query, keys) * attention.scale


def _query_and_keys(attention: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's query (B, D) and all keys (B, N, D), before norms of their own."""
    if attention.qkv is None:  # a matrix for each
        return attention.q_proj(normed[:, 0]), attention.k_proj(normed)
    if type(attention.qkv) is not nn.Linear:  # one with LoRA, which its weight alone does not tell
        query, keys, _ = attention.qkv(normed).chunk(3, dim=-1)
        query_bias = getattr(attention, "q_bias", None)
        return query[:, 0] if query_bias is None else query[:, 0] + query_bias, keys
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width = len(weight) // 3
    if bias is not None:
        query_bias, key_bias = bias[:width], bias[width : 2 * width]
    else:  # a BEiT's keys have none; nor has a ViT with qkv_bias=false anything at all
        query_bias, key_bias = getattr(attention, "q_bias", None), None
    query = F.linear(normed[:, 0], weight[:width], query_bias)
    return query, F.linear(normed, weight[width : 2 * width], key_bias)
