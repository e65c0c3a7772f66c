"""Which vision transformer a bag of tensors belongs to, told from their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import timm

from patchmine.backbones.description import Description
from patchmine.backbones.loading import Tensors
from patchmine.backbones.parts import FC1, is_gated
from patchmine.backbones.positions import RELATIVE, source_grid
from patchmine.backbones.record import Blueprint
from patchmine.backbones.tokens import refuse_unfilled
from patchmine.errors import UserError

TIMM_EPS, CLIP_EPS = 1e-6, 1e-5  # of the layer norms of timm's ViTs, and of its CLIPs
# Attention heads cannot be seen in the tensors.  timm's ViT-Ti/S/B/L/H, SoViT-400m, ViT-g and
# DINOv2's giant; the decoders of MAE's files and of VideoMAE's S, B, L and H.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1152: 16, 1408: 16, 1536: 24}
DECODER_HEADS = {512: 16}
VIDEO_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
_OPTIONAL = {  # parts that only some ViTs have: a tensor of theirs, timm's argument
    "blocks.0.attn.q_norm.weight": ("qk_norm", True),
    "blocks.0.ls1.gamma": ("init_values", 1.0),  # the file has the values
    "norm_pre.weight": ("pre_norm", True),
}
_OF_CLIPS = ("embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "fc_norm")
_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}
_SWIGLU = "vit_giant_patch14_dinov2"  # an argument that is text cannot ask timm for SwiGLU


@dataclass(frozen=True)
class Architecture(Blueprint):
    """A ViT as its tensors tell it: a model's name, and arguments where they differ from it.

    ``table_grid`` is that of the stored positions, ``note`` says how it is known, where it was
    assumed.
    """

    width: int = 0
    depth: int = 0
    num_heads: int = 0
    table_grid: tuple[int, int] = (0, 0)
    note: str = ""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that it is wanted at."""
        assert self.patch_size is not None
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def values_of_a_patch(self) -> int:
        """Numbers that a decoder predicts for a patch, or for a cube of several frames."""
        assert self.patch_size is not None
        frames = 1 if self.clip is None else self.clip[1]
        return self.patch_size**2 * self.channels * frames

    def summary(self) -> str:
        """The architecture in a few words."""
        frames = () if self.clip is None else self.clip[:1]
        size = "x".join(map(str, (*frames, *self.image_size, self.channels)))
        return (
            f"ViT {self.width} wide, {self.depth} blocks, {self.num_heads} heads, "
            f"patch {self.patch_size}, {size} ({self.model})"
        )

    def arguments(self) -> dict[str, Any]:
        """Keywords of the network: no norm after pooling, unless there is one in the file."""
        return {**({} if self.clip else {"fc_norm": False}), **super().arguments()}


def count_blocks(names: Iterable[str], source: str, prefix: str = "blocks.") -> int:
    """Number of blocks with tensors called ``{prefix}{i}.*``; UserError where one is missing."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    numbers = {int(found[1]) for found in map(pattern.match, names) if found}
    if numbers != set(range(len(numbers))):
        raise UserError(
            f"{source} lacks blocks: it has {len(numbers)}, the last one called "
            f"{prefix}{max(numbers)}"
        )
    return len(numbers)


def known_heads(width: int, table: Mapping[int, int], setting: str, given: int | None) -> int:
    """``given``, or what is usual at this width; UserError where neither is or divides it."""
    heads = table.get(width) if given is None else given
    if heads is None:
        raise UserError(
            f"the number of attention heads cannot be read off a model of width {width}: "
            f"give {setting}, as in `patchmine import FILE {setting}=N out=RUN`, and go on from RUN"
        )
    if heads <= 0 or width % heads:
        raise UserError(
            f"{setting}={heads} does not divide the width {width} of the file's model: give a "
            "divisor of it"
        )
    return heads


def infer_architecture(
    tensors: Tensors,
    source: str,
    *,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    source_size: tuple[int, int] | None = None,
    known: Description | None = None,
) -> Architecture:
    """The ViT of these tensors at ``image_size``, or at what it was trained at; else UserError."""
    known = known or Description()
    _check_ranks(tensors, source)
    width, channels, *cube = tensors["patch_embed.proj.weight"].shape
    *_, rows, patch = cube
    if rows != patch:
        raise UserError(
            f"{source}: patches of {rows}x{patch} pixels are not supported, only square ones"
        )
    depth = count_blocks(tensors, source)
    heads = known_heads(width, ENCODER_HEADS, "num_heads", num_heads or known.num_heads)
    size_name = _SIZES.get((width, depth, heads))
    clips = len(cube) == 3
    own, (names, nearest) = _parts(tensors, width), _names(tensors, size_name, patch)
    found = [name for name in names if clips or timm.is_model(name)]
    if size_name is None or not found:  # the nearest thing, and the arguments that correct it
        found = [nearest]
        own = {"embed_dim": width, "depth": depth, "num_heads": heads} | own
    common: dict[str, Any] = dict(
        channels=channels, patch_size=patch, width=width, depth=depth, num_heads=heads
    )
    if clips:
        own = {name: value for name, value in own.items() if name in _OF_CLIPS}
        given = image_size or source_size
        return _of_clips(found[0], own, common, cube[0], known, given, source)
    prefix = sum(tensors[name].shape[1] for name in ("cls_token", "reg_token") if name in tensors)
    # Of the table's rows all of these belong to class and register tokens, or none.
    candidates = tuple(dict.fromkeys((prefix, 0)))
    positions, square = tensors["pos_embed"], (patch, patch)
    table = source_grid(positions, candidates, square, source, known, source_size, image_size)
    if table.num_prefix != prefix:
        own["no_embed_class"] = True
    if known.norm_eps not in (None, CLIP_EPS if "pre_norm" in own else TIMM_EPS):
        own["norm_eps"] = known.norm_eps
    if known.act_layer is not None:
        own["act_layer"] = known.act_layer
    size = image_size or (table.grid[0] * patch, table.grid[1] * patch)
    refuse_unfilled(size, (patch, patch), source)
    return Architecture(
        model=found[0],
        image_size=size,
        model_args=own,
        table_grid=table.grid,
        note=table.note,
        **common,
    )


def _names(tensors: Tensors, size: str | None, patch: int) -> tuple[list[str], str]:
    """Models that a network of these parts and this size may be, and the nearest of another."""
    if tensors["patch_embed.proj.weight"].ndim == 5:
        return [f"video_vit_{size}_patch16"], "video_vit_base_patch16"
    if is_gated(tensors):
        return [], _SWIGLU
    if "norm_pre.weight" in tensors:
        return [f"vit_{size}_patch{patch}_clip_224"], "vit_base_patch16_clip_224"
    return [f"vit_{size}_patch{patch}_224", f"vit_{size}_patch16_224"], "vit_base_patch16_224"


def activation_note(tensors: Tensors, known: Description) -> str:
    """What was assumed of a CLIP's activation, which no tensor shows."""
    if (known.act_layer and known.source) or not (known.act_layer or "norm_pre.weight" in tensors):
        return ""
    return (
        f"its activation is taken as {known.act_layer or 'gelu'}, because no tensor shows it; "
        "OpenAI's CLIP has QuickGELU, which model=vit_base_patch16_clip_quickgelu_224 gives"
    )


def _check_ranks(tensors: Tensors, source: str) -> None:
    """Refuse what is no plain ViT, by the few tensors that everything else is read off."""
    ranks = {"patch_embed.proj.weight": (4, 5), "pos_embed": (3,), "blocks.0.mlp.fc1.weight": (2,)}
    first = tensors.get("patch_embed.proj.weight")
    if first is not None and first.ndim == 5:
        del ranks["pos_embed"]  # computed, not stored
    lacking = [name for name in ranks if name not in tensors]
    ranks |= {name: (3,) for name in ("cls_token", "reg_token") if name in tensors}
    held = [name for name in ranks if name in tensors]
    odd = [name for name in held if tensors[name].ndim not in ranks[name]]
    if lacking or odd or any(0 in tensors[name].shape for name in held):
        why = f"{', '.join(odd) or 'its patch projection'} of another shape"
        if lacking:
            why = f"no {', '.join(lacking)}"
        relative = any(name.endswith(RELATIVE) for name in tensors)
        remedy = (
            ": its positions are relative; name it, as in patchmine.load_encoder(path, "
            "model='beit_base_patch16_224')"
        )
        raise UserError(
            f"{source} holds no plain vision transformer ({why}){remedy if relative else ''}"
        )


def _parts(tensors: Tensors, width: int) -> dict[str, Any]:
    """Arguments for what only some ViTs have."""
    own: dict[str, Any] = {}
    hidden = tensors[FC1].shape[0]
    if hidden != 4 * width:
        exact = int(width * (hidden / width)) == hidden  # timm rounds down
        own["mlp_ratio"] = hidden / width if exact else (hidden + 0.5) / width
    if is_gated(tensors):  # what _SWIGLU has of its own
        own = {"mlp_ratio": hidden / width, "init_values": None} | own
    if "blocks.0.attn.qkv.bias" not in tensors:
        own["qkv_bias"] = False
    own |= {argument: value for name, (argument, value) in _OPTIONAL.items() if name in tensors}
    if "reg_token" in tensors:
        own["reg_tokens"] = tensors["reg_token"].shape[1]
    if "cls_token" not in tensors:
        own |= {"class_token": False, "global_pool": "avg"}
    if "fc_norm.weight" in tensors:  # a fine-tuned classifier normalises after pooling
        own |= {"fc_norm": True, "global_pool": "avg"}
    return own


def _of_clips(
    model: str,
    model_args: dict[str, Any],
    common: dict[str, Any],
    tubelet: int,
    known: Description,
    given: tuple[int, int] | None,
    source: str,
) -> Architecture:
    """A video model, whose tensors tell no sizes: without anything else VideoMAE's are taken."""
    patch = common["patch_size"]
    trained_at = known.image_size or given or (224, 224)
    size, frames = given or trained_at, 16 if known.clip is None else known.clip[0]
    shown = f"{frames}x{size[0]}x{size[1]}"
    if any(side % patch for side in size) or frames % tubelet:
        raise UserError(
            f"{source}: cubes of {tubelet}x{patch}x{patch} do not fill clips of {shown}: give "
            "image_size"
        )
    assumed = f"clips of {shown} are assumed, because the file does not tell"
    return Architecture(
        model=model,
        image_size=size,
        model_args=model_args,
        clip=(frames, tubelet),
        table_grid=(trained_at[0] // patch, trained_at[1] // patch),
        note="" if known.image_size else assumed,
        **common,
    )
