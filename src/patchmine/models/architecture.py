"""Which vision transformer a bag of tensors belongs to, told from their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from patchmine.errors import UserError
from patchmine.models.loading import Tensors
from patchmine.models.video import create_video

# Attention heads cannot be seen in the tensors.  timm's ViT-Ti/S/B/L/H, and the decoder of every published MAE.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}
VIDEO_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}  # VideoMAE's S, B, L, H
_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}


@dataclass(frozen=True)
class Architecture:
    """A plain ViT as timm builds it: a name, and keyword arguments where the tensors differ from what it stands for."""

    model: str
    model_args: dict[str, Any]
    width: int
    depth: int
    num_heads: int
    patch_size: int
    channels: int
    grid: tuple[int, int]
    clip: tuple[int, int] | None = None  # frames and frames in a tubelet, of a video model

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def describe(self) -> str:
        """The architecture in a few words."""
        size = "x".join(map(str, self.image_size if self.clip is None else (self.clip[0], *self.image_size)))
        return (
            f"ViT {self.width} wide, {self.depth} blocks, {self.num_heads} heads, "
            f"patch {self.patch_size}, {size}x{self.channels} ({self.model})"
        )

    def build(self) -> VisionTransformer:
        """The timm model, or ours for clips, without classifier, its weights not yet meaningful."""
        if self.clip is not None:
            frames, tubelet = self.clip
            return create_video(
                self.model,
                img_size=self.image_size,
                patch_size=self.patch_size,
                in_chans=self.channels,
                num_frames=frames,
                tubelet_size=tubelet,
                **self.model_args,
            )
        return timm.create_model(
            self.model,
            pretrained=False,
            num_classes=0,
            img_size=self.image_size,
            patch_size=self.patch_size,
            in_chans=self.channels,
            **self.model_args,
        )


def count_blocks(names: Iterable[str], prefix: str = "blocks.") -> int:
    """Number of transformer blocks whose tensors are called ``{prefix}{i}.*``."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(found[1]) for found in map(pattern.match, names) if found), default=-1)


def known_heads(width: int, table: Mapping[int, int], setting: str, given: int | None) -> int:
    """``given``, or what is usual at this width.

    Raises UserError when nothing is usual or it does not divide the width.
    """
    heads = table.get(width) if given is None else given
    if heads is None:
        raise UserError(f"the number of attention heads cannot be read off a model of width {width}: give {setting}")
    if heads <= 0 or width % heads:
        raise UserError(
            f"{setting}={heads} does not divide the width {width} of the file's model: give a divisor of it"
        )
    return heads


def infer_architecture(
    tensors: Tensors, source: str, *, num_heads: int | None = None, image_size: tuple[int, int] | None = None
) -> Architecture:
    """The ViT whose tensors these are, under timm's names.

    ``image_size`` (height, width) in pixels is the size that the model is wanted at; by default the one it was trained
    at, taken to be square.  Raises UserError for tensors that are no plain ViT's, and where heads or image size stay
    ambiguous.  Those of a `VideoTransformer`, which hold no positions, do not tell the size of clips: what VideoMAE
    trains on is taken, 16 frames of 224 pixels on a side.
    """
    if "patch_embed.proj.weight" in tensors and tensors["patch_embed.proj.weight"].ndim == 5:
        return _infer_video(tensors, source, num_heads, image_size or (224, 224))
    lacking = [
        name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight") if name not in tensors
    ]
    if lacking or tensors["patch_embed.proj.weight"].ndim != 4:
        raise UserError(
            f"{source} holds no plain vision transformer (no {', '.join(lacking) or 'two-dimensional patches'})"
        )
    width, channels, patch, patch_width = tensors["patch_embed.proj.weight"].shape
    if patch != patch_width:
        raise UserError(f"{source}: patches of {patch}x{patch_width} pixels are not supported, only square ones")
    depth = count_blocks(tensors)
    heads = known_heads(width, ENCODER_HEADS, "num_heads", num_heads)
    model, model_args = _timm_name(width, depth, heads, patch)
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != 4 * width:
        model_args["mlp_ratio"] = hidden / width
    if "blocks.0.attn.qkv.bias" not in tensors:
        model_args["qkv_bias"] = False
    if "cls_token" not in tensors:
        model_args |= {"class_token": False, "global_pool": "avg"}
    # A fine-tuned classifier normalises after pooling, everything else before it.
    model_args["fc_norm"] = "fc_norm.weight" in tensors
    if model_args["fc_norm"]:
        model_args["global_pool"] = "avg"
    grid = _grid(tensors["pos_embed"], 1 if "cls_token" in tensors else 0, patch, image_size, source)
    return Architecture(model, model_args, width, depth, heads, patch, channels, grid)


def _infer_video(tensors: Tensors, source: str, num_heads: int | None, image_size: tuple[int, int]) -> Architecture:
    width, channels, tubelet, patch, _ = tensors["patch_embed.proj.weight"].shape
    if any(side % patch for side in image_size) or 16 % tubelet:
        size = "x".join(map(str, image_size))
        raise UserError(f"{source}: cubes of {tubelet}x{patch}x{patch} do not fill clips of 16x{size}: give image_size")
    depth = count_blocks(tensors)
    heads = known_heads(width, ENCODER_HEADS, "num_heads", num_heads)
    size_name = _SIZES.get((width, depth, heads))
    own: dict[str, Any] = {} if size_name else {"embed_dim": width, "depth": depth, "num_heads": heads}
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != 4 * width:
        own["mlp_ratio"] = hidden / width
    if "blocks.0.attn.qkv.bias" not in tensors:
        own["qkv_bias"] = False
    if "fc_norm.weight" in tensors:
        own["fc_norm"] = True
    grid = (image_size[0] // patch, image_size[1] // patch)
    model = f"video_vit_{size_name or 'base'}_patch16"
    return Architecture(model, own, width, depth, heads, patch, channels, grid, clip=(16, tubelet))


def _timm_name(width: int, depth: int, heads: int, patch: int) -> tuple[str, dict[str, Any]]:
    """timm's name for these sizes, or the nearest thing and the arguments that correct it."""
    size = _SIZES.get((width, depth, heads))
    name = f"vit_{size}_patch{patch}_224"
    if size is not None and timm.is_model(name):
        return name, {}
    if size is not None and timm.is_model(f"vit_{size}_patch16_224"):
        return f"vit_{size}_patch16_224", {}  # the patch size is given beside the name
    return "vit_base_patch16_224", {"embed_dim": width, "depth": depth, "num_heads": heads}


def _grid(
    positions: Tensor, num_prefix: int, patch: int, image_size: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    if image_size is not None:
        if any(side % patch for side in image_size):
            size = "x".join(map(str, image_size))
            raise UserError(f"image_size={size} is not a multiple of the patch size {patch} of {source}")
        return image_size[0] // patch, image_size[1] // patch
    count = positions.shape[1] - num_prefix
    side = round(count**0.5)
    if side * side != count:
        raise UserError(f"{source}: {count} patches form no square grid: give the image_size that it was trained at")
    return side, side
