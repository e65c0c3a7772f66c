"""MOKD's T-Head: a small transformer over an encoder's map, which another network may query."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from patchmine.backbones.blocks import run_parts
from patchmine.backbones.positions import resize_positions
from patchmine.models.heads import WeightNormLinear

# DINO's vision_transformer.py; its bounds are absolute and far away, so that nothing is cut
_STD = 0.02


class TransformerHead(nn.Module):
    """Blocks over a map's tokens, mean, product with prototypes (docs/methods/mokd.md)."""

    # A query, the pooled feature of another network's view, may stand before the tokens.  It has no
    # position and is left out of the mean: it acts through the attention that tokens pay to it.

    patch_embed: nn.Conv2d | None

    def __init__(
        self,
        in_width: int,
        width: int,
        size: tuple[int, int],  # rows and columns of the position table
        out_features: int,
        *,
        depth: int = 3,
        num_heads: int = 6,
        project: bool,  # a 1x1 convolution to ``width``, which a ResNet's map needs
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.size = size
        self.patch_embed = nn.Conv2d(in_width, width, 1) if project else None
        self.pos_embed = nn.Parameter(torch.empty(1, size[0] * size[1], width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        nn.init.trunc_normal_(self.pos_embed, std=_STD)
        _draw_linear(self.blocks)
        self.last_layer = WeightNormLinear(width, out_features, trainable_gain=True)

    def forward(self, maps: Tensor, queries: Tensor | None = None) -> Tensor:
        """Logits (N, K), float32, of maps (N, C, h, w); (J * N, K) for queries, crop-major."""
        # The map is projected and gets its positions once, however many ask.
        tokens = self.tokens(maps)
        if queries is not None:
            tokens = asked(tokens, queries)
        for block in self.blocks:
            tokens = block(tokens)
        mean = self.norm(tokens if queries is None else tokens[:, 1:]).mean(dim=1)  # (N, D)
        # These logits have no bound: 16 has steps of 1/8 in bfloat16, which a temperature of 0.04
        # makes steps of 3.
        with torch.autocast(mean.device.type, enabled=False):
            return self.last_layer(mean.float())

    def query(self, pooled: Tensor) -> Tensor:
        """A query of the other network's head: pooled features (N, C) -> (N, D), as for maps."""
        # It is the mean of the projected map, because a 1x1 convolution commutes with a mean.
        if self.patch_embed is None:
            return pooled
        return F.linear(pooled, self.patch_embed.weight.flatten(1), self.patch_embed.bias)

    def tokens(self, maps: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, h * w, D), projected, with positions."""
        if self.patch_embed is not None:
            maps = self.patch_embed(maps)
        rows, columns = maps.shape[-2:]
        positions = resize_positions(self.pos_embed[0], self.size, (rows, columns))
        return maps.flatten(2).transpose(1, 2) + positions

    def attention_to_query(self, maps: Tensor, queries: Tensor) -> Tensor:
        """Attention of tokens to their query, mean of blocks and heads: (J * N, h * w) float32."""
        tokens, shares = asked(self.tokens(maps), queries), []
        for block in self.blocks:
            shares.append(run_parts(block, _share_of_first, tokens))
            tokens = block(tokens)
        return torch.stack(shares).mean(dim=0)


def asked(tokens: Tensor, queries: Tensor) -> Tensor:
    """Each query before the tokens of its image: (N, n, D), (J * N, D) -> (J * N, 1 + n, D)."""
    queries = queries.to(tokens.dtype)
    queries = queries.reshape(-1, len(tokens), 1, queries.shape[-1])  # (J, N, 1, D)
    tiled = tokens.expand(len(queries), *tokens.shape)  # (J, N, n, D), a view
    return torch.cat([queries, tiled], dim=2).flatten(0, 1)


def _share_of_first(block: Block, tokens: Tensor) -> Tensor:
    """Attention of all other tokens to the first, mean over heads: (N, 1 + n, D) -> (N, n)."""
    attention = block.attn
    query, key, _ = attention.qkv(block.norm1(tokens)).chunk(3, dim=-1)
    shape = (*query.shape[:2], attention.num_heads, -1)
    query, key = (part.reshape(shape).transpose(1, 2) for part in (query, key))
    scores = query[:, :, 1:] @ key.transpose(2, 3) * attention.scale  # (N, heads, n, 1 + n)
    return scores.float().softmax(dim=-1)[..., 0].mean(dim=1)


def draw_dino_weights(encoder: VisionTransformer | Beit) -> None:
    """DINO's first weights of a ViT, in place: normal with deviation 0.02, biases 0."""
    # Norms are as they are made, the patches' convolution keeps torch's default.
    _draw_linear(encoder)
    encoder.patch_embed.proj.reset_parameters()
    for table in (encoder.cls_token, getattr(encoder, "reg_token", None), encoder.pos_embed):
        if table is not None:
            nn.init.trunc_normal_(table, std=_STD)


def _draw_linear(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
