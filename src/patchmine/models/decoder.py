"""The light transformer that looks at encoded visible patches and says something about the masked
ones.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchmine.backbones.positions import fixed_table
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError
from patchmine.types import Grid, Mask


class DecoderInput(nn.Module):
    """From encoder tokens to decoder tokens: narrow, put a mask token wherever a patch is missing,
    add positions.

    The order is [prefix | visible | masked], each part in raster order.  Gathering the position
    table instead of un-shuffling the tokens gives MAE's result and leaves the masked patches in one
    contiguous slice (spec mae.md, section 8, item 9).

    For clips, a ``grid`` of three axes, it is VideoMAE's: the linear layer has no bias and the
    positions are its one-dimensional table.
    """

    pos_embed: Tensor

    def __init__(self, encoder_width: int, width: int, grid: Grid, num_prefix: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.of_clips = len(grid.size) == 3
        self.embed = nn.Linear(encoder_width, width, bias=not self.of_clips)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", fixed_table(width, grid.size), persistent=False)  # (L, W)

    def draw_weights(self) -> None:
        """Fresh weights: `initialise`; for clips VideoMAE's, whose linear layer stays as torch
        draws it.

        Its mask token is normal with deviation 0.02, cut off at one deviation
        (modeling_pretrain.py, trunc_normal_).
        """
        if not self.of_clips:
            initialise(self)
            return
        self.embed.reset_parameters()
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def undecayed(self, prefix: str) -> list[str]:
        """Names of parameters without weight decay: for clips the mask token (VideoMAE,
        ``no_weight_decay``).
        """
        return [f"{prefix}mask_token"] if self.of_clips else []

    def forward(self, latent: Tensor, mask: Mask) -> Tensor:
        """(B, P + V, D) and a mask -> (B, P + V + M, W)."""
        prefix, seen = self.embed(latent).split([self.num_prefix, mask.visible.shape[1]], dim=1)
        missing = self.mask_token + self.pos_embed[mask.masked]  # (B, M, W)
        return torch.cat([prefix, seen + self.pos_embed[mask.visible], missing], dim=1)

    def all_visible(self, latent: Tensor) -> Tensor:
        """(B, P + L, D), nothing masked -> (B, P + L, W)."""
        tokens = self.embed(latent)
        return torch.cat(
            [tokens[:, : self.num_prefix], tokens[:, self.num_prefix :] + self.pos_embed], dim=1
        )


class Decoder(nn.Module):
    """Transformer blocks, a norm, and a linear head that the method applies to the rows it wants.

    timm's `Block`; the defaults are MAE's (models_mae.py).
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        out_width: int,
        *,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if int(width * mlp_ratio) == 0:
            raise UserError(
                f"method.decoder_mlp_ratio={mlp_ratio} leaves no hidden unit in a decoder of "
                f"method.decoder_embed_dim={width}: set it to 1 or more"
            )
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm)
            for _ in range(depth)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, out_width)

    def forward(self, tokens: Tensor, num_last: int) -> Tensor:
        """Normalised features of the last ``num_last`` tokens: (B, N, W) -> (B, num_last, W).

        The last block works out queries, projection and MLP for those rows only; nobody reads the
        others.
        """
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        return self.norm(_block_on_last(self.blocks[-1], tokens, num_last))


def check_decoder(
    width: int, num_heads: int, num_visible: int, mask_ratio: float, num_patches: int | None = None
) -> None:
    """UserError for settings of a masked autoencoder that no network can be built from.

    ``num_visible`` of ``num_patches`` are left; None where some are always hidden.
    """
    if width % num_heads or width % 4:
        raise UserError(
            f"method.decoder_embed_dim={width} must be a multiple of 4 and of method.decoder_num_heads={num_heads}: "
            f"try method.decoder_embed_dim={-(-width // (4 * num_heads)) * 4 * num_heads}"
        )
    if num_visible == 0:
        raise UserError(
            f"method.mask_ratio={mask_ratio} leaves no patch visible: lower it, or use smaller patches"
        )
    if num_visible == num_patches:
        raise UserError(
            f"method.mask_ratio={mask_ratio} hides none of {num_patches} patches: raise it"
        )


def _block_on_last(block: Block, tokens: Tensor, num_last: int) -> Tensor:
    """`block(tokens)[:, -num_last:]` without the work for the other rows."""
    attention = block.attn
    batch, _, width = tokens.shape
    normed = block.norm1(tokens)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query_bias, key_value_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(normed[:, -num_last:], weight[:width], query_bias)
    key_value = F.linear(normed, weight[width:], key_value_bias)

    def heads(part: Tensor) -> Tensor:
        return part.reshape(batch, part.shape[1], attention.num_heads, -1).transpose(
            1, 2
        )  # (B, heads, N, W / heads)

    key, value = key_value.chunk(2, dim=-1)
    mixed = F.scaled_dot_product_attention(
        heads(query), heads(key), heads(value)
    )  # (B, heads, num_last, W / heads)
    last = tokens[:, -num_last:] + attention.proj(
        mixed.transpose(1, 2).reshape(batch, num_last, width)
    )
    return last + block.mlp(block.norm2(last))
