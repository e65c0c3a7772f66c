"""The light transformer that reads encoded visible patches and predicts the masked ones."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchmine.backbones.blocks import run_parts
from patchmine.backbones.family import Encoder
from patchmine.backbones.positions import fixed_table
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError
from patchmine.models.cross_decoder import CrossBlock, is_cross, read_out
from patchmine.models.noise import Noise
from patchmine.models.settings import CrossDecoderSettings, DecoderSettings
from patchmine.ops.masks import keep_masked
from patchmine.types import Grid, Mask


class DecoderInput(nn.Module):
    """From encoder tokens to decoder tokens: narrowed, with mask tokens and positions."""

    # The order is [prefix | visible | masked], each part in raster order (docs/methods/mae.md).
    # Of clips it is VideoMAE's: no bias and a one-dimensional table of positions.

    pos_embed: Tensor

    def __init__(
        self, encoder_width: int, width: int, grid: Grid, num_prefix: int, *, cross: bool = False
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.cross = cross
        self.of_clips = len(grid.size) == 3
        self.embed = nn.Linear(encoder_width, width, bias=not self.of_clips)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", fixed_table(width, grid.size), persistent=False)  # (L, W)

    def draw_weights(self) -> None:
        """Fresh weights in place: MAE's for images, VideoMAE's for clips."""
        if not self.of_clips:
            initialise(self)
            return
        self.embed.reset_parameters()
        # Cut off at one deviation: modeling_pretrain.py, trunc_normal_.
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def undecayed(self, prefix: str) -> list[str]:
        """Names of parameters without weight decay: VideoMAE's mask token (``no_weight_decay``)."""
        return [f"{prefix}mask_token"] if self.of_clips else []

    def forward(self, latent: Tensor, mask: Mask) -> Tensor:
        """(B, P + V, D) and a mask -> (B, P + V + M, W)."""
        prefix, visible = self.embed(latent).split([self.num_prefix, mask.visible.shape[1]], dim=1)
        missing = self.mask_token + self.pos_embed[mask.masked]  # (B, M, W)
        return torch.cat([prefix, visible + self.pos_embed[mask.visible], missing], dim=1)

    def all_visible(self, latent: Tensor) -> Tensor:
        """(B, P + L, D), nothing masked -> (B, P + L, W), and for cross-attention (B, P + 2L, W).

        The last L rows stand for the patches: as they are, or mask tokens that look at them.
        """
        tokens = self.embed(latent)
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        parts = [prefix, patches + self.pos_embed]
        if self.cross:
            parts.append((self.mask_token + self.pos_embed).expand_as(patches))
        return torch.cat(parts, dim=1)


class Decoder(nn.Module):
    """Blocks of timm's, a norm, and a linear head that the method applies to the rows it wants.

    Where the settings ask for it, the blocks are those of `cross_decoder`.  ``depth``: how many, in
    place of the settings' number; with 0 it is a norm and a head on what others have made.
    """

    def __init__(self, settings: DecoderSettings, out_width: int, depth: int | None = None) -> None:
        super().__init__()
        width, ratio = settings.decoder_embed_dim, settings.decoder_mlp_ratio
        if int(width * ratio) == 0:
            given = f"method.decoder_mlp_ratio={ratio} with method.decoder_embed_dim={width}"
            raise UserError(f"{given} leaves no hidden unit in the decoder: set it to 1 or more")
        norm = partial(nn.LayerNorm, eps=settings.decoder_norm_eps)
        sizes = dict(mlp_ratio=ratio, qkv_bias=settings.decoder_qkv_bias, norm_layer=norm)
        self.blocks = nn.ModuleList(
            CrossBlock(settings)
            if is_cross(settings)
            else Block(width, settings.decoder_num_heads, **sizes)
            for _ in range(settings.decoder_depth if depth is None else depth)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, out_width)

    def forward(self, tokens: Tensor, num_last: int) -> Tensor:
        """Normalised features of the last ``num_last`` tokens: (B, N, W) -> (B, num_last, W)."""
        return self.norm(last_rows(self.blocks, tokens, num_last))


def all_rows(blocks: nn.ModuleList, tokens: Tensor, num_last: int) -> Tensor:
    """What blocks make of all tokens, of which the last ``num_last`` are to be predicted."""
    if len(blocks) and isinstance(blocks[0], CrossBlock):
        return torch.cat([tokens[:, :-num_last], read_out(blocks, tokens, num_last)], dim=1)
    for block in blocks:
        tokens = block(tokens)
    return tokens


def last_rows(blocks: nn.ModuleList, tokens: Tensor, num_last: int) -> Tensor:
    """What blocks, or none, make of the last ``num_last`` tokens: (B, N, W) -> (B, num_last, W)."""
    if not len(blocks):
        return tokens[:, -num_last:]
    if isinstance(blocks[0], CrossBlock):
        return read_out(blocks, tokens, num_last)
    for block in blocks[:-1]:
        tokens = block(tokens)
    # The last block computes queries, projection and MLP of those rows only.
    return run_parts(blocks[-1], _block_on_last, tokens, num_last)


def masked_decoder(
    encoder: Encoder, grid: Grid, settings: DecoderSettings, out_width: int
) -> tuple[DecoderInput, Decoder]:
    """A decoder of masked patches and what stands before it, freshly drawn."""
    width, prefix = settings.decoder_embed_dim, encoder.num_prefix_tokens
    cross = is_cross(settings)
    decoder_input = DecoderInput(encoder.embed_dim, width, grid, prefix, cross=cross)
    decoder = Decoder(settings, out_width)
    decoder_input.draw_weights()
    initialise(decoder)
    return decoder_input, decoder


def count_predicted(settings: CrossDecoderSettings, num_masked: int, at_least: int = 1) -> int:
    """How many of the masked patches the decoder predicts in a step.

    Raises:
        UserError: fewer than ``at_least``, where there are so many.
    """
    count = round(settings.predicted_share * num_masked)
    if count < min(at_least, num_masked):
        given = f"method.predicted_share={settings.predicted_share}"
        wrong = f"predicts {count} of {num_masked} masked patches, and {at_least} are needed"
        raise UserError(f"{given} {wrong}: raise it")
    return count


def predicted_part(mask: Mask, noise: Noise, count: int) -> Mask:
    """The mask with ``count`` of its masked patches, all as likely; nothing is drawn for all."""
    batch, masked = mask.masked.shape
    if count == masked:
        return mask
    drawn = noise.uniform(batch, masked, device=mask.masked.device)
    return keep_masked(mask, drawn, count)


def check_decoder(
    settings: DecoderSettings, num_visible: int, mask_ratio: float, num_patches: int | None = None
) -> None:
    """UserError for unbuildable settings; ``num_patches`` is None where some are always masked."""
    width, heads = settings.decoder_embed_dim, settings.decoder_num_heads
    if width % heads or width % 4:
        wrong = f"={width} must be a multiple of 4 and of method.decoder_num_heads={heads}"
        remedy = f"try method.decoder_embed_dim={-(-width // (4 * heads)) * 4 * heads}"
        raise UserError(f"method.decoder_embed_dim{wrong}: {remedy}")
    given = f"method.mask_ratio={mask_ratio}"
    if num_visible == 0:
        raise UserError(f"{given} leaves no patch visible: lower it, or use smaller patches")
    if num_visible == num_patches:
        raise UserError(f"{given} hides none of {num_patches} patches: raise it")


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
        split = part.reshape(batch, part.shape[1], attention.num_heads, -1)
        return split.transpose(1, 2)  # (B, heads, N, W / heads)

    key, value = key_value.chunk(2, dim=-1)
    mixed = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
    mixed = mixed.transpose(1, 2).reshape(batch, num_last, width)
    last = tokens[:, -num_last:] + attention.proj(mixed)
    return last + block.mlp(block.norm2(last))
