"""One way to ask any encoder for its pooled feature and for the maps of some stages, at any image
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.models.beit import Beit
from timm.models.resnet import ResNet
from torch import Tensor

from patchmine.backbones.beit import has_relative_positions
from patchmine.backbones.positions import resize_positions
from patchmine.backbones.resnet import STAGES
from patchmine.backbones.vit import (
    Encoder,
    encoder_grid,
    patch_positions,
    prefix_tokens,
    project_patches,
)
from patchmine.errors import UserError


class Features(NamedTuple):
    """``pooled`` (N, C), and ``maps``, one (N, C_i, h_i, w_i) for each stage that was asked for, in
    that order.
    """

    pooled: Tensor
    maps: list[Tensor]


def stage_names(encoder: Encoder) -> list[str]:
    """``layer1`` to ``layer4`` of a ResNet, ``blocks.0`` and so on of a ViT: the parts whose output
    is a map.
    """
    if isinstance(encoder, ResNet):
        return list(STAGES)
    return [f"blocks.{number}" for number in range(len(encoder.blocks))]


def stage_widths(encoder: Encoder, stages: Sequence[str]) -> list[int]:
    """Channels of each stage's map.  Raises UserError, naming ``method.stages``, for a stage that
    there is not.
    """
    names = stage_names(encoder)
    for stage in stages:
        if stage not in names:
            known = ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"
            raise UserError(
                f"method.stages={stage}, but the backbone's stages are {known}: choose among these"
            )
    if isinstance(encoder, ResNet):
        widths = {info["module"]: int(info["num_chs"]) for info in encoder.feature_info}
        return [widths[stage] for stage in stages]
    return [int(encoder.embed_dim)] * len(stages)


def image_size_of(encoder: Encoder) -> tuple[int, int]:
    """(height, width) in pixels of the images that the encoder was built for."""
    if isinstance(encoder, ResNet):
        height, width = encoder.pretrained_cfg["input_size"][1:]
        return int(height), int(width)
    grid = encoder_grid(encoder)
    return grid.size[0] * grid.patch[0], grid.size[1] * grid.patch[1]


def map_size(encoder: Encoder) -> tuple[int, int]:
    """(rows, columns) of the last stage's map of such an image."""
    if isinstance(encoder, ResNet):
        step = int(encoder.feature_info[-1]["reduction"])
        height, width = image_size_of(encoder)
        return -(-height // step), -(-width // step)
    rows, columns = encoder_grid(encoder).size
    return rows, columns


def extract(encoder: Encoder, images: Tensor, stages: Sequence[str] = ()) -> Features:
    """The features of ``images`` (N, C, H, W), which may have another size than the encoder was
    built for.

    ResNet: maps are the stages' outputs, ``pooled`` is the mean of layer4's.  ViT: maps are patch
    tokens after the named blocks, with the final norm after the last block and no other; ``pooled``
    is the normed class token, or the mean of the normed patch tokens where there is none; positions
    are resized by `resize_positions`.  Raises UserError for images that patches do not fill, and
    for another size where positions are relative.
    """
    return (
        _of_resnet(encoder, images, stages)
        if isinstance(encoder, ResNet)
        else _of_vit(encoder, images, stages)
    )


def _of_resnet(encoder: ResNet, images: Tensor, stages: Sequence[str]) -> Features:
    x = encoder.maxpool(encoder.act1(encoder.bn1(encoder.conv1(images))))
    maps: dict[str, Tensor] = {}
    for stage in STAGES:
        x = maps[stage] = getattr(encoder, stage)(x)
    return Features(x.mean(dim=(2, 3)), [maps[stage] for stage in stages])


def _of_vit(encoder: Encoder, images: Tensor, stages: Sequence[str]) -> Features:
    rows, columns = size = _grid_of(encoder, images)
    positions = resize_positions(patch_positions(encoder), encoder_grid(encoder).size, size)
    patches = project_patches(encoder, images) + positions
    prefix = prefix_tokens(encoder, len(images))
    first = prefix.shape[1]
    tokens = torch.cat([prefix, patches], dim=1)  # (N, P + L, D)
    shared = {}
    if isinstance(encoder, Beit):
        shared = {
            "shared_rel_pos_bias": None if encoder.rel_pos_bias is None else encoder.rel_pos_bias()
        }
    else:
        tokens = encoder.norm_pre(tokens)
    wanted = {int(stage.removeprefix("blocks.")) for stage in stages}
    maps: dict[int, Tensor] = {}
    for number, block in enumerate(encoder.blocks):
        tokens = block(tokens, **shared)
        if number + 1 == len(encoder.blocks):
            tokens = encoder.norm(tokens)
        if number in wanted:
            maps[number] = tokens[:, first:].transpose(1, 2).unflatten(2, (rows, columns))
    pooled = tokens[:, first:].mean(dim=1) if encoder.cls_token is None else tokens[:, 0]
    return Features(pooled, [maps[int(stage.removeprefix("blocks."))] for stage in stages])


def _grid_of(encoder: Encoder, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that ``images`` are cut into."""
    own = encoder_grid(encoder)
    height, width = images.shape[-2:]
    if height % own.patch[0] or width % own.patch[1]:
        raise UserError(
            f"images of {height}x{width} pixels are not filled by patches of {own.patch[0]}x{own.patch[1]}: "
            "choose image_size and crops.local_size among the multiples of the patch"
        )
    size = height // own.patch[0], width // own.patch[1]
    if size != own.size and has_relative_positions(encoder):
        raise UserError(
            "an encoder with relative positions takes images of one size only, not global and local crops: set "
            "model_args.use_rel_pos_bias=false model_args.use_abs_pos_emb=true, or choose vit_small_patch16_224"
        )
    return size
