"""Masked encoding with a stock timm ViT: functions *around* its parts, so that the encoder needs no conversion."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchmine.errors import UserError
from patchmine.models.positions import sincos_table
from patchmine.ops.patches import all_patches, gather_patches
from patchmine.types import Grid


def build_encoder(
    model: str,
    *,
    image_size: tuple[int, int] = (224, 224),
    patch_size: int | None = None,
    channels: int = 3,
    model_args: Mapping[str, Any] | None = None,
) -> VisionTransformer:
    """A plain ViT of timm's by name, without classifier, with MAE's fixed positions and freshly initialised as there.

    Raises UserError for a name that timm does not know or that is no plain ViT, and for a patch that does not divide
    the image.
    """
    # Stored class count and pooling are settled here once: no head, the final norm on all tokens.
    settings: dict[str, Any] = dict(
        img_size=image_size, in_chans=channels, num_classes=0, global_pool="", fc_norm=False
    )
    if patch_size is not None:
        settings["patch_size"] = patch_size
    encoder = _create(model, {**settings, **(model_args or {})})
    patch = encoder.patch_embed.patch_size
    if any(side % step for side, step in zip(image_size, patch, strict=True)):
        size, step = "x".join(map(str, image_size)), "x".join(map(str, patch))
        raise UserError(
            f"image_size={size} is not a multiple of the patch size {step} of model={model}: "
            f"choose image_size={_near_multiple(image_size[0], patch[0])}, or patch_size=N with N dividing {size}"
        )
    encoder.reset_classifier(0, "token" if encoder.has_class_token else "avg")
    initialise(encoder)
    _fix_positions(encoder)
    return encoder


def _near_multiple(side: int, step: int) -> int:
    return max(step, round(side / step) * step)


def _create(model: str, settings: dict[str, Any]) -> VisionTransformer:
    name = model.removeprefix("timm/")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UserError(
            f"model={model!r} is no architecture of timm {timm.__version__}{hint} (`patchmine list models` lists them)"
        )
    try:
        encoder = timm.create_model(architecture, pretrained=False, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"timm cannot build model={model!r} as a plain vision transformer ({error}): check model_args, "
            "or choose a model such as vit_small_patch16_224"
        ) from error
    if type(encoder) is not VisionTransformer or encoder.pos_embed is None:
        raise UserError(
            f"model={model!r} is a {type(encoder).__name__}, not a plain vision transformer with absolute positions: "
            "choose one such as vit_small_patch16_224 or vit_base_patch16_224"
        )
    return encoder


def initialise(module: nn.Module) -> None:
    """MAE's initialisation of every part in place (spec mae.md, section 3): the only place where weights are drawn."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.out_channels, -1))  # the bias keeps the convolution's default
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] in ("cls_token", "reg_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


def _fix_positions(encoder: VisionTransformer) -> None:
    """Sine-cosine positions that take no gradient; prefix tokens have none (zeros)."""
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    with torch.no_grad():
        encoder.pos_embed.zero_()
        encoder.pos_embed[0, prefix:] = sincos_table(encoder.embed_dim, encoder.patch_embed.grid_size)
    encoder.pos_embed.requires_grad_(False)


def encoder_grid(encoder: VisionTransformer) -> Grid:
    """The patch grid that the encoder was built for."""
    return Grid(tuple(encoder.patch_embed.grid_size), tuple(encoder.patch_embed.patch_size))


def embed_patches(encoder: VisionTransformer, images: Tensor, index: Tensor | None = None) -> Tensor:
    """Patch tokens with their positions: all of them in raster order, or those in ``index`` (B, V) -> (B, V, D).

    The convolution is applied as a matrix product to the patches that are wanted, and to no others.
    """
    embed = encoder.patch_embed
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    positions = encoder.pos_embed[0, prefix:]  # (L, D)
    if index is None:
        patches = all_patches(images, embed.patch_size)
    else:
        patches = gather_patches(images, index, embed.patch_size)
        positions = positions[index]  # (B, V, D)
    tokens = F.linear(patches.flatten(2), embed.proj.weight.flatten(1), embed.proj.bias)
    return embed.norm(tokens) + positions


def prefix_tokens(encoder: VisionTransformer, batch: int) -> Tensor:
    """Class and register tokens with their positions, (B, P, D); P may be 0."""
    parts = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if not parts:
        return encoder.pos_embed.new_zeros(batch, 0, encoder.embed_dim)
    tokens = torch.cat(parts, dim=1)
    if not encoder.no_embed_class:
        tokens = tokens + encoder.pos_embed[:, : encoder.num_prefix_tokens]
    return tokens.expand(batch, -1, -1)


def encode(encoder: VisionTransformer, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Tokens after the final norm, prefix first, then the patches in ``visible`` (or all): (B, P + V, D)."""
    tokens = embed_patches(encoder, images, visible)
    tokens = torch.cat([prefix_tokens(encoder, len(tokens)), tokens], dim=1)
    return encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))
