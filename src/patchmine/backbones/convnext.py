"""ConvNeXts of timm's, of both versions: images of any size, and names read off tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from patchmine.backbones import vit
from patchmine.backbones.record import Blueprint, Encoder, Family, StageFeatures
from patchmine.backbones.stages import (
    count_blocks,
    last_step,
    no_blocks,
    note_image_size,
    noted_image_size,
    renote_image_size,
    stage_channels,
)
from patchmine.data.items import IMAGE
from patchmine.errors import UserError, shown_name

_USUAL_SCALE = 1e-6  # ``ls_init_value`` of all models with layer scale (arXiv 2201.03545)
_STD = 0.02
# By blocks in each stage and the width of the first: the last part of timm's names.
_SIZES: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 6, 2), 40): "atto",
    ((2, 2, 6, 2), 48): "femto",
    ((2, 2, 6, 2), 64): "pico",
    ((2, 2, 8, 2), 80): "nano",
    ((3, 3, 9, 3), 96): "tiny",
    ((3, 3, 27, 3), 96): "small",
    ((3, 3, 27, 3), 128): "base",
    ((3, 3, 27, 3), 192): "large",
    ((3, 3, 27, 3), 256): "xlarge",
    ((3, 3, 27, 3), 352): "huge",
}


def create(architecture: str, arguments: Mapping[str, Any]) -> Encoder:
    """timm's network; ``img_size``, which it does not take, is noted."""
    arguments = dict(arguments)
    size = arguments.pop("img_size", None)
    encoder = vit.create(architecture, arguments)
    return note_image_size(encoder, size, arguments.get("in_chans", 3))


def build(blueprint: Blueprint) -> Encoder:
    """A ConvNeXt without classifier; ``patch_size`` is the side of its stem's patches."""
    encoder = create(blueprint.architecture, {"num_classes": 0} | blueprint.arguments())
    model, smallest = shown_name(blueprint.model), last_step(encoder)
    if not isinstance(getattr(encoder.head, "pre_logits", nn.Identity()), nn.Identity):
        raise UserError(
            f"model={model} has a layer between pooling and classifier, which is no part of an "
            "encoder: set model_args.head_hidden_size=null"
        )
    if blueprint.patch_size is not None and isinstance(encoder.stem[1], nn.Conv2d):
        raise UserError(
            f"patch_size={blueprint.patch_size}, but model={model} has an overlapping stem and no "
            "patches: leave the setting out"
        )
    if min(blueprint.image_size) < smallest:
        shown = "x".join(map(str, blueprint.image_size))
        raise UserError(
            f"image_size={shown} is smaller than one place of the last map of model={model}, "
            f"{smallest} pixels: choose image_size={smallest} or more, or patch_size=1, with which "
            "a place has 8"
        )
    return encoder


@torch.no_grad()
def initialise_convnext(encoder: Encoder) -> None:
    """ConvNeXt's own first weights, in place, which are timm's.

    Weights are normal with deviation 0.02, biases 0; layer scale is what ``ls_init_value`` says.
    """
    built = getattr(encoder, "built_from", None)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GlobalResponseNorm):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()  # of a norm
    for name, parameter in encoder.named_parameters():
        if name.endswith(".gamma") and built is not None:  # else timm has just made it
            parameter.fill_(built.model_args.get("ls_init_value", _USUAL_SCALE))


def features(encoder: Encoder, images: Tensor, stages: Sequence[str]) -> StageFeatures:
    """Maps are the outputs of ``stages``; ``pooled`` is the last one's mean, normed.

    Raises UserError for images smaller than one place of the last map.
    """
    smallest = last_step(encoder)
    if min(images.shape[2:]) < smallest:
        shown = "x".join(map(str, images.shape[2:]))
        raise UserError(
            f"images of {shown} pixels are smaller than one place of this ConvNeXt's last map, "
            f"{smallest} pixels: choose a larger image_size and crops.local_size"
        )
    x = encoder.stem(images)
    maps: dict[str, Tensor] = {}
    for number, stage in enumerate(encoder.stages):
        x = maps[f"stages.{number}"] = stage(x)
    pooled = encoder.forward_head(encoder.norm_pre(x), pre_logits=True)
    return StageFeatures(pooled, [maps[stage] for stage in stages])


def map_size(encoder: Encoder) -> tuple[int, int]:
    """(rows, columns) of the last map; what is left over at the edges is not looked at."""
    step, (height, width) = last_step(encoder), noted_image_size(encoder)
    return height // step, width // step


def infer_convnext(tensors: Mapping[str, Tensor], source: str, **how: Any) -> Blueprint:
    """The ConvNeXt whose tensors these are, or UserError."""
    stem, after = tensors.get("stem.0.weight"), tensors.get("stem.1.weight")
    depths = count_blocks(tensors, "stages")
    first = [f"stages.{number}.blocks.0.conv_dw.weight" for number in range(len(depths))]
    if stem is None or (after is not None and after.ndim == 4) or len(depths) != 4:
        raise UserError(
            f"{source} holds a ConvNeXt with another stem than one of patches, or with "
            f"{len(depths)} stages: give patchmine.load_encoder its name, model=..."
        )
    dims = tuple(tensors[name].shape[0] for name in first if name in tensors)
    version = "convnextv2" if "stages.0.blocks.0.mlp.grn.weight" in tensors else "convnext"
    name = f"{version}_{_SIZES.get((depths, dims[0]))}"
    own: dict[str, Any] = {}
    if not timm.is_model(name) or dims != tuple(dims[0] * 2**number for number in range(4)):
        name, own = f"{version}_tiny", {"depths": list(depths), "dims": list(dims)}
    matrix = tensors.get("stages.0.blocks.0.mlp.fc1.weight")
    own["conv_mlp"] = matrix is not None and matrix.ndim == 4  # else a linear layer
    if version == "convnext" and "stages.0.blocks.0.gamma" not in tensors:
        own["ls_init_value"] = None
    if "norm_pre.weight" in tensors:
        own["head_norm_first"] = True
    known, patch = how.get("known"), int(stem.shape[-1])
    stated = how.get("image_size") or how.get("source_size") or getattr(known, "image_size", None)
    return Blueprint(
        name,
        image_size=stated or (224, 224),
        patch_size=None if patch == 4 else patch,
        channels=int(stem.shape[1]),
        model_args=own,
    )


def fitted(
    encoder: Encoder, tensors: Mapping[str, Tensor], _: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with the axes of length one that this encoder has, and no others.

    Matrices of MLPs are those of layers or of 1x1 convolutions; the authors' norms of responses are
    (1, 1, 1, C).
    """
    fitting = dict(tensors)
    for name, own in encoder.state_dict().items():
        given = tensors.get(name, own)
        if ".mlp." in name and given.squeeze().shape == own.squeeze().shape:
            fitting[name] = given.reshape(own.shape)
    return fitting, []


CONVNEXT = Family(
    name="convnext",
    module=ConvNeXt,
    timm_modules=frozenset({"convnext"}),
    item=IMAGE,
    hierarchical=True,
    convolutional=True,
    why_whole="a ConvNeXt mixes with their neighbours from its first block on",
    create=create,
    build=build,
    initialise=initialise_convnext,
    stages=stage_channels,
    features=features,
    image_size=noted_image_size,
    map_size=map_size,
    smallest_side=last_step,
    enter_blocks=no_blocks,
    # timm has an argument for eps, unlike for other families (`export._config`).
    export_arguments=lambda encoder: {
        "global_pool": encoder.head.global_pool.pool_type,
        "norm_eps": encoder.stem[-1].eps,
    },
    resize=renote_image_size,
    classifier="head.fc",
    recognises=lambda tensors: "stages.0.blocks.0.conv_dw.weight" in tensors,
    infer=infer_convnext,
    fitted=fitted,
)
