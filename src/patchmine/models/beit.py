"""What is special about a BEiT-style ViT (timm's `Beit`): how it starts, and whether position leaks into attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn

_STD = 0.02
_TABLE = "relative_position_bias_table"
_ZEROS = ("bias", "q_bias", "v_bias", _TABLE)


@torch.no_grad()
def initialise_beit(encoder: Beit) -> None:
    """SimMIM's initialisation in place (spec simmim.md, section 3.4).

    Weights, class token and positions are normal with deviation 0.02, cut at *one* deviation (0.0108 is left of it);
    biases and relative positions are zero; the last matrix of both branches of block l is divided by sqrt(2 l).
    Layer scale stays as the model's ``init_values`` made it.
    """
    for name, parameter in encoder.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in _ZEROS:
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=_STD, a=-_STD, b=_STD)
        elif kind == "weight":  # of a layer norm
            nn.init.ones_(parameter)
    for depth, block in enumerate(encoder.blocks, start=1):
        block.attn.proj.weight /= math.sqrt(2 * depth)
        block.mlp.fc2.weight /= math.sqrt(2 * depth)


def has_relative_positions(encoder: nn.Module) -> bool:
    """Whether attention is told how far apart two patches are, beside or instead of the additive table."""
    if not isinstance(encoder, Beit):
        return False
    own = any(block.attn.relative_position_bias_table is not None for block in encoder.blocks)
    return own or encoder.rel_pos_bias is not None


def resample_tables(encoder: Beit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the relative positions of another, square grid resampled to the encoder's; the rest as it is.

    Bicubic, distance 0 and the farthest stay in place; the three rows of the class token are kept.  The reference, for
    fine-tuning, spaces distances geometrically instead (spec simmim.md, section 6).
    """
    rows, columns = encoder.patch_embed.grid_size
    fitted = dict(tensors)
    for name, wanted in encoder.state_dict().items():
        table = tensors.get(name)
        if not name.endswith(_TABLE) or table is None or table.shape == wanted.shape or table.ndim != 2:
            continue
        side = math.isqrt(max(0, len(table) - 3))
        if side**2 == len(table) - 3 and table.shape[1] == wanted.shape[1]:
            square = table[:-3].float().T.reshape(1, -1, side, side)  # (1, H, 2 G - 1, 2 G - 1)
            square = F.interpolate(square, (2 * rows - 1, 2 * columns - 1), mode="bicubic", align_corners=True)
            fitted[name] = torch.cat([square.flatten(2)[0].T, table[-3:].float()])
    return fitted
