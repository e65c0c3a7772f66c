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
from patchmine.backbones.record import Blueprint, Encoder, Family
from patchmine.backbones.tokens import angles_at, encoder_grid, token_features
from patchmine.errors import UserError, shown_name

# timm draws these from torch's generator in every training step, which no resumed run repeats.
_AUGMENTATIONS = ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")
_USUAL = "vit_small_patch16_dinov3 or eva02_tiny_patch14_224"


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
    infer=None,
)
