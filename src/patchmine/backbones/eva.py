"""Vision transformers of timm's with rotary positions: DINOv3, EVA-02, Perception Encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models.eva import Eva, EvaBlockPostNorm
from torch import Tensor, nn

from patchmine.backbones import vit
from patchmine.backbones.architecture import count_blocks, known_heads
from patchmine.backbones.description import Description
from patchmine.backbones.record import Blueprint, Encoder, Family
from patchmine.backbones.tokens import angles_at, encoder_grid, refuse_unfilled, token_features
from patchmine.errors import UserError, shown_name

# timm draws these from torch's generator in every training step, which no resumed run repeats.
_AUGMENTATIONS = ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")
_USUAL = "vit_small_patch16_dinov3 or eva02_tiny_patch14_224"
_HEAD_WIDTH = 64
_SIZES = {  # by width, and whether the MLPs are gated
    (384, False): "small",
    (384, True): "small_plus",
    (768, False): "base",
    (1024, False): "large",
    (1280, True): "huge_plus",
}


def create(architecture: str, arguments: Mapping[str, Any]) -> Encoder:
    """timm's network without stored weights, its angles never augmented; raises ValueError."""
    own = {name: value for name, value in arguments.items() if name not in _AUGMENTATIONS}
    return vit.create(architecture, own)


def build(blueprint: Blueprint) -> Encoder:
    """A network without classifier; UserError for one whose blocks are not told places alike."""
    model = shown_name(blueprint.model)
    if given := [name for name in _AUGMENTATIONS if blueprint.model_args.get(name) is not None]:
        raise UserError(
            f"model_args.{given[0]} moves the places of patches by random numbers of timm's own, "
            "which a resumed run cannot repeat: leave it out"
        )
    encoder = vit.build(blueprint, module=Eva)
    if getattr(encoder, "rope_mixed", False):
        raise UserError(
            f"model='{model}' learns its rotary positions anew in every block (rope_type=mixed), "
            f"which is not supported: choose one of fixed ones, such as {_USUAL}"
        )
    if encoder.rope is None and encoder.pos_embed is None:
        raise UserError(
            f"model='{model}' has neither rotary nor absolute positions: set "
            "model_args.use_rot_pos_emb=true"
        )
    if isinstance(encoder.blocks[0], EvaBlockPostNorm):
        raise UserError(
            f"model='{model}' normalises behind attention (use_post_norm), which is not supported: "
            f"choose {_USUAL}"
        )
    return encoder


@torch.no_grad()
def initialise_eva(encoder: Encoder) -> None:
    """MAE's first weights, in place, and layer scale at the model's ``init_values``.

    Absolute positions, where the model has them, are MAE's sine-cosine table without gradient.
    """
    vit.initialise_vit(encoder)
    for block in encoder.blocks:
        for name, parameter in block.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind in ("gamma_1", "gamma_2"):
                parameter.fill_(block.init_values)
            elif kind in ("q_bias", "v_bias"):
                parameter.zero_()
            elif kind == "weight" and parameter.ndim == 1:  # of any norm
                parameter.fill_(1.0)


def angles(encoder: Encoder, size: tuple[int, ...]) -> Tensor | None:
    """Sines, then cosines, (L, 2 d) float32 for a grid of (rows, columns); computed once for each.

    None for a model that is told places by its absolute table only, as EVA's first version is.
    """
    if encoder.rope is None:
        return None
    if torch.compiler.is_compiling():  # what a traced program computes stays in it
        return _computed(encoder.rope, size)
    known: dict[Any, Tensor] = encoder.__dict__.setdefault("angles_by_grid", {})
    place = (*size, encoder.patch_embed.proj.weight.device)
    if place not in known:
        # A feature extraction may come first, and its tensors must not be barred from training.
        with torch.inference_mode(False), torch.no_grad():
            known[place] = _computed(encoder.rope, size)
    return known[place]


def _computed(rope: Any, size: tuple[int, ...]) -> Tensor:
    """What timm's module says for a grid, which it may have been built for or not."""
    built_for = getattr(rope, "feat_shape", None)
    if built_for is None:  # computed anew for each image
        found: Tensor = rope.get_embed(shape=list(size))
    elif tuple(built_for) == tuple(size):
        found = rope.get_embed()
    else:
        moved = copy.deepcopy(rope)
        moved.update_feat_shape(list(size))
        found = moved.get_embed()
    return found


def enter_blocks(
    encoder: Encoder,
    tokens: Tensor,
    index: Tensor | None = None,
    size: tuple[int, ...] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The tokens after the norm that some have, and the angles of the patches among them."""
    table = angles(encoder, size or encoder_grid(encoder).size)
    return encoder.norm_pre(tokens), {} if table is None else {"rope": angles_at(table, index)}


def export_arguments(encoder: Encoder) -> dict[str, Any]:
    """Sizes, pooling, and which of the last two norms there are, which timm tells from pooling."""
    return {
        **vit.sizes(encoder),
        "global_pool": encoder.global_pool,
        "use_fc_norm": vit.has_fc_norm(encoder),
        "use_post_transformer_norm": not isinstance(encoder.norm, nn.Identity),
    }


def file_arguments(tensors: Mapping[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the file's last norms; pooling by attention is no part of an encoder."""
    return arguments | {
        "global_pool": "token" if "cls_token" in tensors else "avg",
        "use_fc_norm": "fc_norm.weight" in tensors,
        "use_post_transformer_norm": "norm.weight" in tensors,
    }


def is_dinov3(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there are registers and layer scale under `Eva`'s names, and no position table."""
    own = {"patch_embed.proj.weight", "reg_token", "cls_token", "blocks.0.gamma_1"}
    return own <= tensors.keys() and "pos_embed" not in tensors


def infer_dinov3(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    source_size: tuple[int, int] | None = None,
    known: Description | None = None,
) -> Blueprint:
    """The DINOv3 of these tensors; what cannot be seen in them are its heads, 64 wide each."""
    known = known or Description()
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    hidden = tensors[f"blocks.0.mlp.{'fc1_g' if gated else 'fc1'}.weight"].shape[0]
    name = _SIZES.get((width, gated), "small_plus" if gated else "small")
    size = image_size or source_size or known.image_size or (224, 224)
    refuse_unfilled(size, (patch, patch), source)
    biases = "blocks.0.attn.q_bias" in tensors
    usual = {width: max(1, width // _HEAD_WIDTH)}
    own = {
        **dict(embed_dim=width, depth=count_blocks(tensors, source), mlp_ratio=hidden / width),
        **dict(num_heads=known_heads(width, usual, "num_heads", num_heads or known.num_heads)),
        **dict(qkv_bias=biases, num_reg_tokens=tensors["reg_token"].shape[1]),
    }
    if known.norm_eps is not None:
        own["norm_eps"] = known.norm_eps
    own = file_arguments(tensors, own)
    return Blueprint(f"vit_{name}_patch16_dinov3", size, patch, channels, own)


EVA: Family = replace(
    vit.VIT,
    name="eva",
    module=Eva,
    timm_modules=frozenset({"eva"}),
    create=create,
    build=build,
    initialise=initialise_eva,
    features=partial(token_features, enter_blocks=enter_blocks),
    enter_blocks=enter_blocks,
    angles=angles,
    export_arguments=export_arguments,
    file_arguments=file_arguments,
    recognises=is_dinov3,
    infer=infer_dinov3,
)
