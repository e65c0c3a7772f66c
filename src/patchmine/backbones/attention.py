"""Where a class token looks: its row of the last block's attention, without the other rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from patchmine.backbones.family import block_outputs, family_of
from patchmine.backbones.record import Encoder
from patchmine.backbones.tokens import embed_patches, prefix_tokens
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
    last = encoder.blocks[-1]
    logits = _class_logits(last.attn, last.norm1(tokens)) + family_of(encoder).class_bias(encoder)
    return logits.float().softmax(dim=-1)


def _class_logits(attention: Any, normed: Tensor) -> Tensor:
    """(B, N, D), class token first -> (B, heads, N), its query times every key, scaled."""
    batch, length, width = normed.shape
    heads, weight, bias = attention.num_heads, attention.qkv.weight, attention.qkv.bias
    if bias is not None:
        query_bias, key_bias = bias[:width], bias[width : 2 * width]
    else:  # a BEiT's keys have none; nor has a ViT with qkv_bias=false anything at all
        query_bias, key_bias = getattr(attention, "q_bias", None), None
    query = F.linear(normed[:, 0], weight[:width], query_bias).reshape(batch, heads, -1)
    keys = F.linear(normed, weight[width : 2 * width], key_bias).reshape(batch, length, heads, -1)
    if isinstance(getattr(attention, "q_norm", None), nn.Module):  # identities in most models
        query, keys = attention.q_norm(query), attention.k_norm(keys)
    return torch.einsum("bhd,bnhd->bhn", query, keys) * attention.scale
