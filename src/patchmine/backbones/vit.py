"""Encoders, and masked encoding with a stock timm ViT: functions *around* its parts, so that it
needs no conversion.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeAlias

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchmine.backbones.beit import has_relative_positions, initialise_beit
from patchmine.backbones.positions import sincos_table
from patchmine.backbones.resnet import create, initialise_resnet, names_resnet
from patchmine.backbones.video import VideoTransformer, build_video, is_video
from patchmine.errors import UserError, shown_name
from patchmine.ops.patches import all_patches, gather_patches
from patchmine.types import Grid

_USUAL = "vit_small_patch16_224"
Encoder: TypeAlias = VisionTransformer | Beit | ResNet
"""What is trained: a plain ViT (of clips: a `VideoTransformer`), a BEiT-style one (layer scale,
relative positions), or a ResNet.

Methods that hide patches take the first two only (`require_vit`), and so does every function of
this file but `build_encoder`, `initialise_encoder` and `smallest_side`.
"""


def build_encoder(
    model: str,
    *,
    image_size: tuple[int, int] = (224, 224),
    patch_size: int | None = None,
    channels: int = 3,
    model_args: Mapping[str, Any] | None = None,
    clip: tuple[int, int] | None = None,
) -> Encoder:
    """A plain or BEiT-style ViT or a ResNet of timm's, without classifier, freshly drawn
    (`initialise_encoder`).

    A ResNet takes images of any size; ``model_args`` ``{"cifar_stem": True}`` gives it a stem for
    small ones (`use_cifar_stem`).  Its ``forward_features`` is the last map, its ``forward`` the
    mean over that.  A video model (`models.video`) is not timm's and needs ``clip``, (frames,
    frames in a tubelet), which nothing else looks at. Raises UserError for a name that timm does
    not know or that is none of them, and for a patch that does not divide the image or the clip.
    """
    if is_video(model):
        video = build_video(
            model,
            clip=clip,
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            model_args=model_args or {},
        )
        initialise_encoder(video)
        return video
    if names_resnet(_architecture(model)):
        return _build_resnet(model, image_size, patch_size, channels, model_args or {})
    # Stored class count and pooling are settled here once: no head, the final norm on all tokens.
    settings: dict[str, Any] = dict(
        img_size=image_size, in_chans=channels, num_classes=0, global_pool=""
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
    encoder.reset_classifier(0, "avg" if encoder.cls_token is None else "token")
    initialise_encoder(encoder)
    return encoder


def _build_resnet(
    model: str,
    image_size: tuple[int, int],
    patch_size: int | None,
    channels: int,
    model_args: Mapping[str, Any],
) -> ResNet:
    if patch_size is not None:
        raise UserError(
            f"patch_size={patch_size}, but model={model} has no patches: leave the setting out"
        )
    settings: dict[str, Any] = dict(in_chans=channels, num_classes=0, zero_init_last=False)
    try:
        encoder: Any = create(_architecture(model), **{**settings, **model_args})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"timm cannot build model='{shown_name(model)}' ({error}): check model_args"
        ) from error
    encoder.reset_classifier(0, "avg")
    # No tensor of a ResNet tells the size that it is trained at; timm's own description of a model
    # does.
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (channels, *image_size)}
    initialise_encoder(encoder)
    return encoder


def _near_multiple(side: int, step: int) -> int:
    return max(step, round(side / step) * step)


def _architecture(model: str) -> str:
    return model.removeprefix("timm/").split(".")[0]


def _create(model: str, settings: dict[str, Any]) -> Encoder:
    architecture, name = _architecture(model), shown_name(model)
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UserError(
            f"model='{name}' is no architecture of timm {timm.__version__}{hint} (`patchmine list models` lists them)"
        )
    if not is_model_in_modules(architecture, {"beit", "eva"}):
        settings = {"fc_norm": False, **settings}
    try:
        encoder: Any = create(architecture, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"timm cannot build model='{name}' as a plain vision transformer ({error}): check model_args"
            f"{'' if architecture == _USUAL else f', or choose a model such as {_USUAL}'}"
        ) from error
    plain = type(encoder) is VisionTransformer and encoder.pos_embed is not None
    if not plain and type(encoder) is not Beit:
        raise UserError(
            f"model='{name}' is a {type(encoder).__name__}, not a plain vision transformer with absolute positions"
            f"{_known_otherwise(encoder)}: choose one such as vit_small_patch16_224 or vit_base_patch16_224"
        )
    if not isinstance(encoder.patch_embed, PatchEmbed):
        raise UserError(
            f"model='{name}' looks at its images through a convolutional stem, so that patches are not cut apart and "
            "the image's border gives their places away: choose one such as vit_small_patch16_224, whose patches do "
            "not overlap"
        )
    return encoder


def _known_otherwise(encoder: nn.Module) -> str:
    """Why an encoder whose attention itself knows places is of no use where patches or positions
    are withheld.
    """
    rotary = getattr(encoder, "rope", None) is not None
    if not rotary and not any("rel_pos" in name for name, _ in encoder.named_modules()):
        return ""
    kind = "rotary" if rotary else "relative"
    return f" ({kind} positions tell its attention where each patch is, so that no position can be withheld)"


def require_vit(encoder: Encoder, method: str) -> None:
    """UserError for a ResNet: ``method`` hides patches, and a convolution cannot leave a part of
    its image out.
    """
    if isinstance(encoder, ResNet):
        raise UserError(
            f"method={method} hides patches, which a ResNet does not have: choose a vision transformer, as in "
            "model=vit_small_patch16_224, or a method that compares views"
        )


def refuse_video(encoder: Encoder, method: str) -> None:
    """UserError for an encoder of clips: ``method`` is defined for images."""
    if isinstance(encoder, VideoTransformer):
        raise UserError(
            f"method={method} does not train on videos: choose method=mae or method=hpm, or an image model such as "
            "model=vit_small_patch16_224"
        )


def refuse_relative(encoder: Encoder, method: str) -> None:
    """UserError for an encoder whose attention knows distances: ``method`` needs positions in the
    additive table only.

    Relative tables belong to the full grid; a sequence with patches missing has no place in them.
    """
    if has_relative_positions(encoder):
        raise UserError(
            f"method={method} leaves patches out, which an encoder with relative positions does not allow: set "
            "model_args.use_rel_pos_bias=false model_args.use_abs_pos_emb=true, or choose vit_base_patch16_224"
        )


def initialise_encoder(encoder: Encoder) -> None:
    """Fresh weights in place.

    MAE's and its fixed positions for a plain ViT, SimMIM's for a BEiT-style one, torchvision's for
    a ResNet.  One of clips has MAE's but for its first layer, drawn as torch draws convolutions
    (spec hpm-video.md, section 3).
    """
    if isinstance(encoder, ResNet):
        initialise_resnet(encoder)
    elif isinstance(encoder, VideoTransformer):
        encoder.patch_embed.proj.reset_parameters()
        initialise(encoder)
    elif isinstance(encoder, Beit):
        initialise_beit(encoder)
    else:
        initialise(encoder)
        _fix_positions(encoder)


def initialise(module: nn.Module) -> None:
    """MAE's initialisation of every part in place (spec mae.md, section 3): the only place where
    weights are drawn.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(
                part.weight.view(part.out_channels, -1)
            )  # the bias keeps the convolution's default
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] in ("cls_token", "reg_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


def _fix_positions(encoder: VisionTransformer) -> None:
    """Sine-cosine positions that take no gradient; prefix tokens have none (zeros)."""
    if encoder.pos_embed is None:
        return
    with torch.no_grad():
        encoder.pos_embed.zero_()
        encoder.pos_embed[0, embedded_prefix(encoder) :] = sincos_table(
            encoder.embed_dim, encoder.patch_embed.grid_size
        )
    encoder.pos_embed.requires_grad_(False)


def embedded_prefix(encoder: Encoder) -> int:
    """Rows of the position table that belong to prefix tokens and not to patches."""
    return 0 if getattr(encoder, "no_embed_class", False) else encoder.num_prefix_tokens


def encoder_grid(encoder: Encoder) -> Grid:
    """The patch grid that the encoder was built for."""
    return Grid(tuple(encoder.patch_embed.grid_size), tuple(encoder.patch_embed.patch_size))


def smallest_side(encoder: Encoder) -> int:
    """Pixels on a side below which an image cannot be of use: a ViT's patch; a ResNet takes
    anything.
    """
    return 1 if isinstance(encoder, ResNet) else max(encoder_grid(encoder).patch[-2:])


def project_patches(encoder: Encoder, images: Tensor, index: Tensor | None = None) -> Tensor:
    """Patch tokens without positions: all of them in raster order, or those in ``index`` (B, V) ->
    (B, V, D).

    The convolution is applied as a matrix product to the patches that are wanted, and to no others.
    """
    embed = encoder.patch_embed
    if index is None:
        patches = all_patches(images, embed.patch_size)
    else:
        patches = gather_patches(images, index, embed.patch_size)
    tokens = F.linear(patches.flatten(2), embed.proj.weight.flatten(1), embed.proj.bias)
    return embed.norm(tokens)


def patch_positions(encoder: Encoder) -> Tensor:
    """(L, D), what is added to patch tokens to say where they are; zeros where only relative
    positions say it.
    """
    if encoder.pos_embed is None:
        return encoder.cls_token.new_zeros(encoder.patch_embed.num_patches, encoder.embed_dim)
    return encoder.pos_embed[0, embedded_prefix(encoder) :]


def embed_patches(encoder: Encoder, images: Tensor, index: Tensor | None = None) -> Tensor:
    """Patch tokens with their positions: all of them in raster order, or those in ``index`` (B, V)
    -> (B, V, D).
    """
    positions = patch_positions(encoder)
    return project_patches(encoder, images, index) + (
        positions if index is None else positions[index]
    )


def prefix_tokens(encoder: Encoder, batch: int) -> Tensor:
    """Class and register tokens with their positions, (B, P, D); P may be 0."""
    parts = [
        token
        for token in (encoder.cls_token, getattr(encoder, "reg_token", None))
        if token is not None
    ]
    if not parts:
        return encoder.pos_embed.new_zeros(batch, 0, encoder.embed_dim)
    tokens = torch.cat(parts, dim=1)
    if encoder.pos_embed is not None and embedded_prefix(encoder):
        tokens = tokens + encoder.pos_embed[:, : encoder.num_prefix_tokens]
    return tokens.expand(batch, -1, -1)


def transform_until(encoder: Encoder, tokens: Tensor, num_blocks: int) -> Tensor:
    """Tokens (B, N, D), positions added, after the first ``num_blocks`` blocks; no final norm."""
    if isinstance(encoder, Beit):
        bias = (
            None if encoder.rel_pos_bias is None else encoder.rel_pos_bias()
        )  # (H, N, N), once for all blocks
        for block in encoder.blocks[:num_blocks]:
            tokens = block(tokens, shared_rel_pos_bias=bias)
        return tokens
    return encoder.blocks[:num_blocks](encoder.norm_pre(tokens))


def transform(encoder: Encoder, tokens: Tensor) -> Tensor:
    """Tokens (B, N, D), positions added, after all blocks and the final norm."""
    return encoder.norm(transform_until(encoder, tokens, len(encoder.blocks)))


def encode(encoder: Encoder, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Tokens after the final norm, prefix first, then the patches in ``visible`` (or all): (B, P +
    V, D).
    """
    tokens = embed_patches(encoder, images, visible)
    return transform(encoder, torch.cat([prefix_tokens(encoder, len(tokens)), tokens], dim=1))
