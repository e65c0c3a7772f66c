"""Which vision transformer a bag of tensors belongs to, told from their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import timm

from patchmine.backbones.description import Description
from patchmine.backbones.family import family_of
from patchmine.backbones.grids import source_grid
from patchmine.backbones.loading import Tensors
from patchmine.backbones.positions import RELATIVE
from patchmine.backbones.record import Encoder
from patchmine.errors import UserError

TIMM_EPS = 1e-6  # of the layer norms of timm's ViTs
# Attention heads cannot be seen in the tensors.  timm's ViT-Ti/S/B/L/H, and the decoder of every
# published MAE.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}
VIDEO_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}  # VideoMAE's S, B, L, H
_OPTIONAL = {  # parts that only some ViTs have: a tensor of theirs, timm's argument
    "blocks.0.attn.q_norm.weight": ("qk_norm", True),
    "blocks.0.ls1.gamma": ("init_values", 1.0),  # the file has the values
    "norm_pre.weight": ("pre_norm", True),
}
_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}


@dataclass(frozen=True)
class Architecture:
    """A plain ViT as timm builds it: a name, and keyword arguments where the tensors differ from
    what it stands for.

    ``grid`` is the one that it is wanted at, in patches.
    """

    model: str
    model_args: dict[str, Any]
    width: int
    depth: int
    num_heads: int
    patch_size: int
    channels: int
    grid: tuple[int, int]
    table_grid: tuple[int, int]  # that the stored positions are of
    note: str = ""  # how that is known, where it was assumed
    clip: tuple[int, int] | None = None  # frames and frames in a tubelet, of a video model

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def describe(self) -> str:
        """The architecture in a few words."""
        size = "x".join(
            map(str, self.image_size if self.clip is None else (self.clip[0], *self.image_size))
        )
        return (
            f"ViT {self.width} wide, {self.depth} blocks, {self.num_heads} heads, "
            f"patch {self.patch_size}, {size}x{self.channels} ({self.model})"
        )

    def build(self) -> Encoder:
        """The timm model, or ours for clips, without classifier, its weights not yet meaningful."""
        return family_of(self.model).create(self.model, self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the network, sizes included."""
        own = dict(
            img_size=self.image_size,
            patch_size=self.patch_size,
            in_chans=self.channels,
            **self.model_args,
        )
        if self.clip is None:
            return {"num_classes": 0, **own}
        frames, tubelet = self.clip
        return {"num_frames": frames, "tubelet_size": tubelet, **own}


def count_blocks(names: Iterable[str], source: str, prefix: str = "blocks.") -> int:
    """Number of transformer blocks whose tensors are called ``{prefix}{i}.*``.  UserError where one
    is missing.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    numbers = {int(found[1]) for found in map(pattern.match, names) if found}
    if numbers != set(range(len(numbers))):
        raise UserError(
            f"{source} lacks blocks: it has {len(numbers)}, the last one called {prefix}{max(numbers)}"
        )
    return len(numbers)


def known_heads(width: int, table: Mapping[int, int], setting: str, given: int | None) -> int:
    """``given``, or what is usual at this width.

    Raises UserError when nothing is usual or it does not divide the width.
    """
    heads = table.get(width) if given is None else given
    if heads is None:
        raise UserError(
            f"the number of attention heads cannot be read off a model of width {width}: give {setting}"
        )
    if heads <= 0 or width % heads:
        raise UserError(
            f"{setting}={heads} does not divide the width {width} of the file's model: give a divisor of it"
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
    """The ViT whose tensors these are, under timm's names.

    Args:
        tensors: of an encoder.
        source: their file, for messages.
        num_heads: attention heads, where the width is an unusual one.
        image_size: (height, width) in pixels that the model is wanted at; None: the one that it was
        trained at.
        source_size: that one, where nothing else tells it.
        known: what is known about the file.

    Raises:
        UserError: tensors that are no plain ViT's, and heads or sizes that stay ambiguous.  Those
            of a `VideoTransformer`, which hold no positions, do not tell the size of clips: without
            anything that does, what VideoMAE trains on is taken, 16 frames of 224 pixels on a side.
    """
    known = known or Description()
    _check_ranks(tensors, source)
    num_heads = num_heads or known.num_heads
    if tensors["patch_embed.proj.weight"].ndim == 5:
        return _infer_video(tensors, source, num_heads, image_size or source_size, known)
    width, channels, patch, patch_width = tensors["patch_embed.proj.weight"].shape
    if patch != patch_width:
        raise UserError(
            f"{source}: patches of {patch}x{patch_width} pixels are not supported, only square ones"
        )
    depth = count_blocks(tensors, source)
    heads = known_heads(width, ENCODER_HEADS, "num_heads", num_heads)
    model, model_args = _timm_name(width, depth, heads, patch)
    model_args |= _parts(tensors, width)
    rows = _prefix_rows(tensors)
    found = source_grid(tensors["pos_embed"], rows, patch, source, known, source_size, image_size)
    if found.num_prefix != max(rows):
        model_args["no_embed_class"] = True
    if known.norm_eps not in (None, TIMM_EPS):
        model_args["norm_eps"] = known.norm_eps
    grid = found.grid if image_size is None else _wanted_grid(image_size, patch, source)
    return Architecture(
        model, model_args, width, depth, heads, patch, channels, grid, found.grid, found.note
    )


def _check_ranks(tensors: Tensors, source: str) -> None:
    """Refuse what is no plain ViT, by the few tensors that everything else is read off."""
    ranks = {"patch_embed.proj.weight": (4, 5), "pos_embed": (3,), "blocks.0.mlp.fc1.weight": (2,)}
    first = tensors.get("patch_embed.proj.weight")
    if first is not None and first.ndim == 5:
        del ranks["pos_embed"]  # computed, not stored
    lacking = [name for name in ranks if name not in tensors]
    ranks |= {name: (3,) for name in ("cls_token", "reg_token") if name in tensors}
    odd = [
        name
        for name, allowed in ranks.items()
        if name in tensors and tensors[name].ndim not in allowed
    ]
    if lacking or odd or any(0 in tensors[name].shape for name in ranks):
        why = (
            f"no {', '.join(lacking)}"
            if lacking
            else f"{', '.join(odd) or 'its patch projection'} of another shape"
        )
        raise UserError(
            f"{source} holds no plain vision transformer ({why}){_relative_remedy(tensors)}"
        )


def _relative_remedy(tensors: Tensors) -> str:
    if not any(name.endswith(RELATIVE) for name in tensors):
        return ""
    return ": its positions are relative; name it, as in patchmine.load_encoder(path, model='beit_base_patch16_224')"


def _parts(tensors: Tensors, width: int) -> dict[str, Any]:
    """Arguments for what only some ViTs have."""
    own: dict[str, Any] = {}
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != 4 * width:
        own["mlp_ratio"] = hidden / width
    if "blocks.0.attn.qkv.bias" not in tensors:
        own["qkv_bias"] = False
    own |= {argument: value for name, (argument, value) in _OPTIONAL.items() if name in tensors}
    if "reg_token" in tensors:
        own["reg_tokens"] = tensors["reg_token"].shape[1]
    if "cls_token" not in tensors:
        own |= {"class_token": False, "global_pool": "avg"}
    # A fine-tuned classifier normalises after pooling, everything else before it.
    own["fc_norm"] = "fc_norm.weight" in tensors
    if own["fc_norm"]:
        own["global_pool"] = "avg"
    return own


def _prefix_rows(tensors: Tensors) -> tuple[int, ...]:
    """How many rows of the position table may belong to class and register tokens: all of these, or
    none.
    """
    named = [tensors[name] for name in ("cls_token", "reg_token") if name in tensors]
    return tuple(dict.fromkeys((sum(token.shape[1] for token in named), 0)))


def _wanted_grid(image_size: tuple[int, int], patch: int, source: str) -> tuple[int, int]:
    if any(side % patch for side in image_size):
        size = "x".join(map(str, image_size))
        raise UserError(
            f"image_size={size} is not a multiple of the patch size {patch} of {source}"
        )
    return image_size[0] // patch, image_size[1] // patch


def _infer_video(
    tensors: Tensors,
    source: str,
    num_heads: int | None,
    image_size: tuple[int, int] | None,
    known: Description,
) -> Architecture:
    width, channels, tubelet, patch, _ = tensors["patch_embed.proj.weight"].shape
    trained_at = known.image_size or image_size or (224, 224)
    size = image_size or trained_at
    frames = known.clip[0] if known.clip is not None else 16
    if any(side % patch for side in size) or frames % tubelet:
        shown = "x".join(map(str, size))
        raise UserError(
            f"{source}: cubes of {tubelet}x{patch}x{patch} do not fill clips of {frames}x{shown}: give image_size"
        )
    depth = count_blocks(tensors, source)
    heads = known_heads(width, ENCODER_HEADS, "num_heads", num_heads)
    size_name = _SIZES.get((width, depth, heads))
    own: dict[str, Any] = (
        {} if size_name else {"embed_dim": width, "depth": depth, "num_heads": heads}
    )
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != 4 * width:
        own["mlp_ratio"] = hidden / width
    if "blocks.0.attn.qkv.bias" not in tensors:
        own["qkv_bias"] = False
    if "fc_norm.weight" in tensors:
        own["fc_norm"] = True
    grid, before = ((side[0] // patch, side[1] // patch) for side in (size, trained_at))
    model = f"video_vit_{size_name or 'base'}_patch16"
    note = (
        ""
        if known.image_size
        else f"clips of {frames}x{size[0]}x{size[1]} are assumed, because the file does not tell"
    )
    return Architecture(
        model, own, width, depth, heads, patch, channels, grid, before, note, clip=(frames, tubelet)
    )


def _timm_name(width: int, depth: int, heads: int, patch: int) -> tuple[str, dict[str, Any]]:
    """timm's name for these sizes, or the nearest thing and the arguments that correct it."""
    size = _SIZES.get((width, depth, heads))
    name = f"vit_{size}_patch{patch}_224"
    if size is not None and timm.is_model(name):
        return name, {}
    if size is not None and timm.is_model(f"vit_{size}_patch16_224"):
        return f"vit_{size}_patch16_224", {}  # the patch size is given beside the name
    return "vit_base_patch16_224", {"embed_dim": width, "depth": depth, "num_heads": heads}
