"""BEiT-style vision transformers of timm's: layer scale, and positions inside of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from patchmine.backbones import vit
from patchmine.backbones.positions import RELATIVE
from patchmine.backbones.record import Encoder, Family, StageFeatures
from patchmine.backbones.tokens import token_features
from patchmine.errors import UserError

_STD = 0.02
_ZEROS = ("bias", "q_bias", "v_bias", RELATIVE)


@torch.no_grad()
def initialise_beit(encoder: Encoder) -> None:
    """SimMIM's first weights, in place (docs/methods/simmim.md).

    Weights, class token and positions are normal with deviation 0.02, cut at *one* deviation
    (0.0108 is left of it); biases and relative positions are zero; the last matrix of both branches
    of block l is divided by sqrt(2 l).  Layer scale stays as the model's ``init_values`` made it.
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


def has_relative_positions(encoder: Encoder) -> bool:
    """Whether attention is told how far apart two patches are, in one table or one a block."""
    own = any(block.attn.relative_position_bias_table is not None for block in encoder.blocks)
    return own or encoder.rel_pos_bias is not None


def enter_blocks(encoder: Encoder, tokens: Tensor, *_: Any) -> tuple[Tensor, dict[str, Any]]:
    """The tokens, and the bias (H, N, N) that all blocks share, where they do."""
    shared = None if encoder.rel_pos_bias is None else encoder.rel_pos_bias()
    return tokens, {"shared_rel_pos_bias": shared}


def features(encoder: Encoder, images: Tensor, stages: Sequence[str]) -> StageFeatures:
    """`token_features`; UserError for images of another size where positions are relative."""
    if tuple(images.shape[2:]) != vit.image_size(encoder) and has_relative_positions(encoder):
        raise UserError(
            "an encoder with relative positions takes images of one size only, not global and local"
            " crops: set model_args.use_rel_pos_bias=false model_args.use_abs_pos_emb=true, or "
            "choose vit_small_patch16_224"
        )
    return token_features(encoder, images, stages, enter_blocks)


def class_bias(encoder: Encoder) -> Tensor:
    """(H, N) or 0: what relative positions add to the class token's row in the last block."""
    bias: Tensor = encoder.cls_token.new_zeros(())
    attention = encoder.blocks[-1].attn
    if encoder.rel_pos_bias is not None:
        bias = bias + encoder.rel_pos_bias()[:, 0]
    if attention.relative_position_bias_table is not None:
        bias = bias + attention._get_rel_pos_bias()[0, :, 0]
    return bias


def file_arguments(tensors: Mapping[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a pooling that goes with the file's norms: timm's normalises after it."""
    return arguments if "fc_norm.weight" in tensors else {"global_pool": "token"} | arguments


BEIT: Family = replace(
    vit.VIT,
    name="beit",
    module=Beit,
    timm_modules=frozenset({"beit"}),
    build=partial(vit.build, module=Beit),
    initialise=initialise_beit,
    features=features,
    enter_blocks=enter_blocks,
    mask_keyword="shared_rel_pos_bias",
    export_arguments=lambda encoder: {**vit.sizes(encoder), "global_pool": encoder.global_pool},
    relative_positions=has_relative_positions,
    class_bias=class_bias,
    file_arguments=file_arguments,
    infer=None,  # relative positions look alike in many networks
)
