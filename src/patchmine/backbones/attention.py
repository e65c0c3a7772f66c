"""Where an encoder's class token looks: one row of the last block's attention, computed without the
others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn

from patchmine.backbones.vit import Encoder, embed_patches, prefix_tokens, transform_until
from patchmine.errors import UserError


def class_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Softmax attention of the class token in the last block, by head: (B, C, H, W) -> (B, heads, P
    + L) float32.

    The last block stops there: one query, and no values, projection or MLP (spec amt.md, section
    3.2).  Raises UserError for an encoder without class token.
    """
    if encoder.cls_token is None:
        raise UserError(
            "attention maps are those of the class token, and the model has none: set model_args.class_token=true"
        )
    tokens = embed_patches(encoder, images)
    tokens = torch.cat([prefix_tokens(encoder, len(tokens)), tokens], dim=1)
    tokens = transform_until(encoder, tokens, len(encoder.blocks) - 1)
    last = encoder.blocks[-1]
    logits = _class_logits(last.attn, last.norm1(tokens))
    if isinstance(encoder, Beit):
        logits = logits + _class_bias(encoder, last.attn)
    return logits.float().softmax(dim=-1)


def _class_logits(attention: Any, normed: Tensor) -> Tensor:
    """(B, N, D), class token first -> (B, heads, N), scaled products of its query with every key."""
    batch, length, width = normed.shape
    weight, bias = attention.qkv.weight, attention.qkv.bias
    if bias is not None:
        query_bias, key_bias = bias[:width], bias[width : 2 * width]
    else:  # a BEiT's keys have none; nor has a ViT with qkv_bias=false anything at all
        query_bias, key_bias = getattr(attention, "q_bias", None), None
    query = F.linear(normed[:, 0], weight[:width], query_bias).reshape(
        batch, attention.num_heads, -1
    )
    key = F.linear(normed, weight[width : 2 * width], key_bias).reshape(
        batch, length, attention.num_heads, -1
    )
    if isinstance(
        getattr(attention, "q_norm", None), nn.Module
    ):  # identities, unless the model normalises both
        query, key = attention.q_norm(query), attention.k_norm(key)
    return torch.einsum("bhd,bnhd->bhn", query, key) * attention.scale


def _class_bias(encoder: Beit, attention: Any) -> Tensor:
    """(heads, N) or 0: what relative positions add to the class token's row."""
    bias = encoder.cls_token.new_zeros(())
    if encoder.rel_pos_bias is not None:
        bias = bias + encoder.rel_pos_bias()[:, 0]
    if attention.relative_position_bias_table is not None:
        bias = bias + attention._get_rel_pos_bias()[0, :, 0]
    return bias
