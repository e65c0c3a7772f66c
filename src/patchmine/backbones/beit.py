"""What is special about a BEiT-style ViT (timm's `Beit`): how it starts, and whether position leaks
into attention.
"""

from __future__ import annotations

import math

import torch
from timm.models.beit import Beit
from torch import nn

from patchmine.backbones.positions import RELATIVE

_STD = 0.02
_ZEROS = ("bias", "q_bias", "v_bias", RELATIVE)


@torch.no_grad()
def initialise_beit(encoder: Beit) -> None:
    """SimMIM's initialisation in place (spec simmim.md, section 3.4).

    Weights, class token and positions are normal with deviation 0.02, cut at *one* deviation
    (0.0108 is left of it); biases and relative positions are zero; the last matrix of both branches
    of block l is divided by sqrt(2 l). Layer scale stays as the model's ``init_values`` made it.
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
    """Whether attention is told how far apart two patches are, beside or instead of the additive
    table.
    """
    if not isinstance(encoder, Beit):
        return False
    own = any(block.attn.relative_position_bias_table is not None for block in encoder.blocks)
    return own or encoder.rel_pos_bias is not None
