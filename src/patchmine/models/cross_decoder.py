"""Decoder blocks in which mask tokens look at visible tokens only, and not at each other.

Fu, Lian, Wang, Shi, Wang, Yala, Darrell, Efros, Goldberg, "Rethinking Patch Dependence for Masked
Autoencoders" (CrossMAE), TMLR 2025, arXiv 2401.14391.  What differs: docs/methods/mae.md.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from patchmine.models.settings import CrossDecoderSettings, DecoderSettings, MethodSettings


def is_cross(settings: MethodSettings) -> bool:
    """Whether the blocks of a method's decoder are those of this file."""
    return isinstance(settings, CrossDecoderSettings) and settings.decoder_attention == "cross"


class CrossAttention(nn.Module):
    """Attention whose queries are some tokens and whose keys and values are others."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, M, W) that look at (B, N, W) -> (B, M, W)."""

        def heads(part: Tensor) -> Tensor:
            split = part.reshape(*part.shape[:2], self.num_heads, -1)
            return split.transpose(1, 2)  # (B, heads, rows, W / heads)

        key, value = self.kv(context).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(heads(self.q(queries)), heads(key), heads(value))
        return self.proj(mixed.transpose(1, 2).reshape(queries.shape))


class CrossBlock(nn.Module):
    """Cross-attention and an MLP, both residual: what CrossMAE's decoder is made of."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        width, heads = settings.decoder_embed_dim, settings.decoder_num_heads
        norm = partial(nn.LayerNorm, eps=settings.decoder_norm_eps)
        self.norm1 = norm(width)
        self.attn = CrossAttention(width, heads, settings.decoder_qkv_bias)
        self.norm2 = norm(width)
        self.mlp = Mlp(width, int(width * settings.decoder_mlp_ratio))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, M, W) and what they look at, (B, N, W) -> (B, M, W)."""
        queries = queries + self.attn(self.norm1(queries), context)
        return queries + self.mlp(self.norm2(queries))


def read_out(blocks: nn.ModuleList, tokens: Tensor, num_last: int) -> Tensor:
    """What blocks make of the last tokens by looking at those before: (B, N, W) -> (B, n, W)."""
    context, queries = tokens[:, :-num_last], tokens[:, -num_last:]
    for block in blocks:
        queries = block(queries, context)
    return queries
