"""Plain vision transformers of timm's: how they are built, drawn and entered."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchmine.backbones.architecture import infer_architecture
from patchmine.backbones.positions import sincos_table
from patchmine.backbones.record import Blueprint, Encoder, Family
from patchmine.backbones.shapes import OnlyShapes
from patchmine.backbones.tokens import (
    embedded_prefix,
    encoder_grid,
    refuse_unfilled,
    token_features,
)
from patchmine.data.items import IMAGE
from patchmine.errors import UserError, foreign_parser, shown_name

_USUAL = "vit_small_patch16_224"
# Arguments of timm's create_model that a description, which may be a stranger's, must not give.
_READING = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("checkpoint_path", "cache_dir"),
)


def create(architecture: str, arguments: Mapping[str, Any]) -> Encoder:
    """timm's network without stored weights; every layer norm gets ``norm_eps``, where it is given.

    Raises ValueError with what timm says of arguments that do not fit, and for those that would
    make it read or download files.
    """
    arguments = dict(arguments)
    norm_eps = arguments.pop("norm_eps", None)  # timm has no argument for it
    if reading := [name for name in _READING if name in arguments]:
        raise ValueError(f"{', '.join(reading)} would make timm read or download other weights")
    with foreign_parser(ValueError), OnlyShapes():
        encoder = timm.create_model(architecture, pretrained=False, **arguments)
    if norm_eps is not None:
        for norm in encoder.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.eps = norm_eps
    return encoder


def build(blueprint: Blueprint, module: type[nn.Module] = VisionTransformer) -> Encoder:
    """A network of exactly this ``module`` of timm's, without classifier, its weights not drawn."""
    model = shown_name(blueprint.model)
    if not timm.is_model(blueprint.architecture):
        near = difflib.get_close_matches(blueprint.architecture, timm.list_models(), n=4)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UserError(
            f"model='{model}' is no architecture of timm {timm.__version__}{hint} "
            "(`patchmine list models` lists them)"
        )
    # Stored class count and pooling are settled here once: no head, the final norm on all tokens.
    arguments: dict[str, Any] = {"num_classes": 0, "global_pool": ""}
    if not is_model_in_modules(blueprint.architecture, {"beit", "eva"}):
        arguments["fc_norm"] = False
    encoder = create(blueprint.architecture, arguments | blueprint.arguments())
    _check(encoder, module, model)
    refuse_unfilled(blueprint.image_size, encoder.patch_embed.patch_size, f"model={model}")
    encoder.reset_classifier(0, "avg" if encoder.cls_token is None else "token")
    return encoder


def _check(encoder: Encoder, module: type[nn.Module], model: str) -> None:
    """Refuse what hides nothing by leaving patches out: other positions, overlapping patches."""
    absolute = module is not VisionTransformer or getattr(encoder, "pos_embed", None) is not None
    if type(encoder) is not module or not absolute:
        rotary = getattr(encoder, "rope", None) is not None
        told = ""
        if rotary or any("rel_pos" in name for name, _ in encoder.named_modules()):
            told = (
                f" ({'rotary' if rotary else 'relative'} positions tell its attention where each "
                "patch is, so that no position can be withheld)"
            )
        raise UserError(
            f"model='{model}' is a {type(encoder).__name__}, not a plain vision transformer with "
            f"absolute positions{told}: choose one such as {_USUAL} or vit_base_patch16_224"
        )
    if not isinstance(encoder.patch_embed, PatchEmbed):
        raise UserError(
            f"model='{model}' looks at its images through a convolutional stem, so that patches "
            f"are not cut apart: choose one such as {_USUAL}, whose patches do not overlap"
        )


def initialise(module: nn.Module) -> None:
    """MAE's first weights of every part, in place: the only place where weights are drawn."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):  # as a matrix; the bias keeps the convolution's default
            nn.init.xavier_uniform_(part.weight.view(part.out_channels, -1))
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] in ("cls_token", "reg_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def initialise_vit(encoder: Encoder) -> None:
    """MAE's first weights, and its sine-cosine positions, which take no gradient."""
    initialise(encoder)
    if encoder.pos_embed is None:
        return
    table = sincos_table(encoder.embed_dim, encoder.patch_embed.grid_size)
    encoder.pos_embed.zero_()  # prefix tokens have no place
    encoder.pos_embed[0, embedded_prefix(encoder) :] = table
    encoder.pos_embed.requires_grad_(False)


def enter_blocks(encoder: Encoder, tokens: Tensor, *_: Any) -> tuple[Tensor, dict[str, Any]]:
    """What the first block takes: some ViTs have a norm before it."""
    return encoder.norm_pre(tokens), {}


def block_stages(encoder: Encoder) -> dict[str, int]:
    """``blocks.0`` and so on, each as wide as the others."""
    return {f"blocks.{number}": int(encoder.embed_dim) for number in range(len(encoder.blocks))}


def image_size(encoder: Encoder) -> tuple[int, int]:
    """(height, width) in pixels that the positions are for."""
    height, width = encoder.patch_embed.img_size
    return int(height), int(width)


def map_size(encoder: Encoder) -> tuple[int, int]:
    """(rows, columns) of patches."""
    rows, columns = encoder_grid(encoder).size[-2:]
    return rows, columns


def patch_side(encoder: Encoder) -> int:
    """The longer side of a patch, in pixels."""
    return max(encoder_grid(encoder).patch[-2:])


def sizes(encoder: Encoder) -> dict[str, Any]:
    """timm's arguments for the sizes of images and patches."""
    embed = encoder.patch_embed
    return {"img_size": list(embed.img_size), "patch_size": embed.patch_size[-1]}


def has_fc_norm(encoder: Encoder) -> bool:
    """Whether there is a norm after pooling."""
    return not isinstance(encoder.fc_norm, nn.Identity)


def file_arguments(tensors: Mapping[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the file's norm after pooling, which timm else tells from pooling."""
    return {"fc_norm": "fc_norm.weight" in tensors} | arguments


VIT = Family(
    name="vit",
    module=VisionTransformer,
    timm_modules=frozenset({"vision_transformer", "deit"}),
    item=IMAGE,
    hierarchical=False,
    create=create,
    build=build,
    initialise=initialise_vit,
    stages=block_stages,
    features=partial(token_features, enter_blocks=enter_blocks),
    image_size=image_size,
    map_size=map_size,
    smallest_side=patch_side,
    enter_blocks=enter_blocks,
    export_arguments=lambda encoder: {
        **sizes(encoder),
        "global_pool": encoder.global_pool,
        "fc_norm": has_fc_norm(encoder),
    },
    stores_positions=True,
    recognises=lambda tensors: "patch_embed.proj.weight" in tensors,
    infer=infer_architecture,
    file_arguments=file_arguments,
)
