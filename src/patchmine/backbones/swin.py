"""Swin Transformers of timm's, both versions: windows, at any image size that patches fill."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from patchmine.backbones import vit
from patchmine.backbones.positions import RELATIVE, move_distances
from patchmine.backbones.record import Blueprint, Encoder, Family, StageFeatures
from patchmine.backbones.stages import count_blocks, last_step, no_blocks, stage_channels
from patchmine.backbones.tokens import image_grid, refuse_unfilled
from patchmine.data.items import IMAGE
from patchmine.errors import UserError, shown_name

# timm builds a Swin for one size, with masks of that size; so it makes them as images come, from
# shapes alone.  It also drops paths by torch's own noise, which a resumed run would not repeat.
_OURS = {"strict_img_size": False, "drop_path_rate": 0.0}
# By blocks in each stage and the width of the first: a part of timm's names.
_SIZES: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 6, 2), 96): "tiny",
    ((2, 2, 18, 2), 96): "small",
    ((2, 2, 18, 2), 128): "base",
    ((2, 2, 18, 2), 192): "large",
}


def create(architecture: str, arguments: Mapping[str, Any]) -> Encoder:
    """timm's network, for images of its size and of any other that patches fill."""
    return vit.create(architecture, _OURS | dict(arguments))


def build(blueprint: Blueprint) -> Encoder:
    """A Swin without classifier."""
    encoder = create(blueprint.architecture, {"num_classes": 0} | blueprint.arguments())
    model = f"model={shown_name(blueprint.model)}"
    refuse_unfilled(blueprint.image_size, encoder.patch_embed.patch_size, model)
    return encoder


def initialise_swin(encoder: Encoder) -> None:
    """Swin's own first weights, in place, as timm draws them: normal with deviation 0.02."""
    encoder.init_weights()


def resize(encoder: Encoder, size: tuple[int, int]) -> None:
    """Build it for images of another size, in place: its windows stay as large as they are meant.

    Windows that fill their map have no shift, and are no larger than it, so that some change.
    """
    refuse_unfilled(size, encoder.patch_embed.patch_size, "the weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm indexes tables
        encoder.set_input_size(img_size=size, window_size=encoder._ref_window_sizes)


def features(encoder: Encoder, images: Tensor, stages: Sequence[str]) -> StageFeatures:
    """Maps are the outputs of ``stages``, normed after the last one and no other.

    ``pooled`` is the mean of the normed last map.  Raises UserError for images that patches do not
    fill.
    """
    image_grid(encoder, images)  # which refuses them
    x = encoder.patch_embed(images)  # (N, h, w, C)
    maps: dict[str, Tensor] = {}
    for number, stage in enumerate(encoder.layers):
        x = stage(x)
        if number == len(encoder.layers) - 1:
            x = encoder.norm(x)
        maps[f"layers.{number}"] = x.permute(0, 3, 1, 2)
    return StageFeatures(x.mean(dim=(1, 2)), [maps[stage] for stage in stages])


def map_size(encoder: Encoder) -> tuple[int, int]:
    """(rows, columns) of the last map; odd maps are padded before they are halved."""
    step, (height, width) = last_step(encoder), vit.image_size(encoder)
    return -(-height // step), -(-width // step)


def infer_swin(tensors: Mapping[str, Tensor], source: str, **how: Any) -> Blueprint:
    """The Swin of the first version whose tensors these are, or UserError."""
    patches, depths = tensors["patch_embed.proj.weight"], count_blocks(tensors, "layers")
    names = [f"layers.{number}.blocks.0.attn.{RELATIVE}" for number in range(len(depths))]
    tables = [tensors[name] for name in names if name in tensors]
    if not tables or len(tables) < len(names) or patches.ndim != 4:
        raise UserError(
            f"{source} holds a Swin Transformer V2, whose tensors do not tell how large its windows"
            " are: give its name, as in model=swinv2_tiny_window8_256"
        )
    windows = {_side(table) for table in tables}
    window = windows.pop()
    if windows or window is None:
        raise UserError(
            f"{source} holds a Swin Transformer whose windows differ from stage to stage, as they "
            "do for small images: give its name, model=..., and image_size and model_args as it "
            "was trained"
        )
    width, channels, patch = patches.shape[0], patches.shape[1], int(patches.shape[-1])
    pixels = 384 if window == 12 else 224  # of the published ones
    name = f"swin_{_SIZES.get((depths, width))}_patch4_window{window}_{pixels}"
    own: dict[str, Any] = {}
    if not timm.is_model(name):
        name = "swin_tiny_patch4_window7_224"
        own = {"embed_dim": width, "depths": list(depths), "window_size": window}
        own["num_heads"] = [table.shape[1] for table in tables]
    known = how.get("known")
    stated = how.get("image_size") or how.get("source_size") or getattr(known, "image_size", None)
    usual = window * patch * 2 ** (len(depths) - 1)  # the last map is one window
    return Blueprint(
        name,
        image_size=stated or (usual, usual),
        patch_size=None if patch == 4 else patch,
        channels=channels,
        model_args=own,
    )


def _side(table: Tensor) -> int | None:
    """Patches along a side of the window that a table of distances is of; None: no square."""
    rows = table.shape[0]
    side = (math.isqrt(rows) + 1) // 2
    return side if table.ndim == 2 and rows == (2 * side - 1) ** 2 else None


def fitted(
    encoder: Encoder, tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with tables of distances for this encoder's windows, and what was moved.

    Raises UserError where a file's windows are no squares, which a table does not tell.
    """
    moved, report = dict(tensors), list[str]()
    for name, own in encoder.state_dict().items():
        table = tensors.get(name)
        if not name.endswith(RELATIVE) or table is None or table.shape == own.shape:
            continue
        old, wanted = _side(table), encoder.get_submodule(name.removesuffix(f".{RELATIVE}"))
        if old is None:
            raise UserError(
                f"{source}: {name} is of windows that are no squares, as small images that are none"
                " have them, and cannot be moved to others: set image_size to that of the weights"
            )
        if table.shape[1:] == own.shape[1:]:  # else `check_fit` says what is wrong
            moved[name] = move_distances(table, (old, old), wanted.window_size)
            rows, columns = wanted.window_size
            report.append(f"{name} from windows of {old}x{old} to {rows}x{columns} patches")
    return moved, report


SWIN = Family(
    name="swin",
    module=SwinTransformer,
    timm_modules=frozenset({"swin_transformer"}),
    item=IMAGE,
    hierarchical=True,
    why_whole="a Swin Transformer merges with their neighbours from stage to stage",
    create=create,
    build=build,
    initialise=initialise_swin,
    stages=stage_channels,
    features=features,
    image_size=vit.image_size,
    map_size=map_size,
    smallest_side=lambda encoder: max(encoder.patch_embed.patch_size),
    enter_blocks=no_blocks,
    export_arguments=lambda encoder: {
        **vit.sizes(encoder),
        "global_pool": encoder.global_pool,
        "strict_img_size": False,
    },
    resize=resize,
    classifier="head.fc",
    recognises=lambda tensors: (
        "layers.0.blocks.0.attn.qkv.weight" in tensors and "patch_embed.proj.weight" in tensors
    ),
    infer=infer_swin,
    fitted=fitted,
)
# Its distances are computed, so that no table is ever moved.
SWINV2 = replace(
    SWIN,
    name="swinv2",
    module=SwinTransformerV2,
    timm_modules=frozenset({"swin_transformer_v2"}),
    recognises=lambda _: False,  # `infer_swin` says what is missing
    infer=None,
)
