"""A vision transformer for clips: its patches are cubes, its positions one fixed table.

VideoMAE, NeurIPS 2022, arXiv 2203.12602.  All but the first layer and the positions is timm's.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchmine.backbones import vit
from patchmine.backbones.names import VIDEO_MODELS
from patchmine.backbones.positions import interleaved_table
from patchmine.backbones.record import Blueprint, Encoder, Family
from patchmine.backbones.tokens import refuse_unfilled
from patchmine.data.items import CLIP
from patchmine.errors import UserError
from patchmine.ops.patches import all_patches


class TubeletEmbed(nn.Module):
    """Cubes of frames and pixels to tokens in the order (time, row, column): (B, C, T, H, W) ->
    (B, L, D).

    The weight is that of a convolution whose steps are as long as its kernel, applied as a matrix
    product.  Attributes are those of timm's `PatchEmbed`; ``img_size`` is (height, width).
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        num_frames: int,
        tubelet_size: int,
        bias: bool = True,
        dynamic_img_pad: bool = False,  # timm passes it; a clip is never padded
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.patch_size = (tubelet_size, patch_size, patch_size)
        cube, place = self.patch_size, {"device": device, "dtype": dtype}
        self.proj = nn.Conv3d(in_chans, embed_dim, cube, stride=cube, bias=bias, **place)
        self.norm = nn.Identity()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.set_input_size((height, width), num_frames)

    def set_input_size(self, img_size: tuple[int, int], num_frames: int) -> None:
        """Say which clips are expected.  Raises UserError where cubes do not fill them."""
        self.img_size, self.num_frames = (img_size[0], img_size[1]), num_frames
        self.grid_size = self._grid_of(num_frames, *self.img_size)
        self.num_patches = math.prod(self.grid_size)

    def _grid_of(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        tubelet, patch, _ = self.patch_size
        if frames % tubelet or height % patch or width % patch or not frames:
            raise UserError(
                f"clips of {frames} frames of {height}x{width} pixels are not filled by cubes of "
                f"{tubelet} frames and {patch}x{patch} pixels: choose clip.frames and "
                "image_size that clip.tubelet and patch_size divide"
            )
        return frames // tubelet, height // patch, width // patch

    def forward(self, clips: Tensor) -> Tensor:
        """All tokens of clips of any size that cubes fill."""
        self._grid_of(clips.shape[2], clips.shape[3], clips.shape[4])
        cubes = all_patches(clips, self.patch_size).flatten(2)  # (B, L, C * t * p * p)
        tokens: Tensor = self.norm(F.linear(cubes, self.proj.weight.flatten(1), self.proj.bias))
        return tokens


class VideoTransformer(VisionTransformer):  # type: ignore[misc]  # timm has no types
    """timm's ViT over cubes, without class token; ``forward`` is the mean of the tokens (B, L, D).

    ``pos_embed`` (1, L, D) is VideoMAE's fixed table over the flattened index; no parameter, and
    not in the state dict.  For clips of another size it is computed for their number of cubes, as
    VideoMAE does: an index then stands for another place than in training, and only a longer or
    shorter clip of the same height and width keeps the places of its first frames.

    VideoMAE gives queries and values a bias and keys none.  Here ``attn.qkv.bias`` has a third for
    the keys, which adds the same number to all scores of a query, so that the softmax does not see
    it; it starts at zero.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        num_frames: int = 16,
        tubelet_size: int = 2,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        fc_norm: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            class_token=False,
            global_pool="avg",
            pos_embed="none",
            fc_norm=fc_norm,
            embed_layer=partial(TubeletEmbed, num_frames=num_frames, tubelet_size=tubelet_size),
            **arguments,
        )
        del self.pos_embed
        self.register_buffer(
            "pos_embed", self._table(self.patch_embed.num_patches), persistent=False
        )

    def _table(self, count: int) -> Tensor:
        return interleaved_table(self.embed_dim, count)[None]

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's hook: positions for as many tokens as there are."""
        if x.shape[1] == self.pos_embed.shape[1]:
            return x + self.pos_embed
        return x + self._table(x.shape[1]).to(self.pos_embed)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, *, num_frames: int | None = None
    ) -> None:
        """Expect clips of another size, in place."""
        embed = self.patch_embed
        embed.set_input_size(img_size or embed.img_size, num_frames or embed.num_frames)
        self.pos_embed = self._table(embed.num_patches).to(self.pos_embed)


def create(model: str, arguments: Mapping[str, Any]) -> VideoTransformer:
    """The network called ``model``; raises UserError for a name that there is not."""
    if model not in VIDEO_MODELS:
        near = difflib.get_close_matches(model, VIDEO_MODELS, n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UserError(
            f"model={model!r} is no video model; there are {', '.join(VIDEO_MODELS)}{hint}"
        )
    own = {name: value for name, value in arguments.items() if name != "num_classes"}
    return VideoTransformer(**{**VIDEO_MODELS[model], **own})


def build(blueprint: Blueprint) -> VideoTransformer:
    """An encoder of clips, which the settings of a run must say the size of."""
    if blueprint.clip is None:
        raise UserError(
            f"model={blueprint.model} is for clips of videos: choose a model for images here, such "
            "as vit_small_patch16_224"
        )
    patch = blueprint.patch_size or 16
    refuse_unfilled(blueprint.image_size, (patch, patch), f"model={blueprint.model}")
    return create(blueprint.model, {"patch_size": patch, **blueprint.arguments()})


def initialise_video(encoder: Encoder) -> None:
    """MAE's first weights, but a first layer as torch draws convolutions, which VideoMAE keeps."""
    encoder.patch_embed.proj.reset_parameters()
    vit.initialise(encoder)


def clip_of(encoder: Encoder) -> tuple[int, int]:
    """(frames, frames in a tubelet) that it was built for."""
    return encoder.patch_embed.num_frames, encoder.patch_embed.patch_size[0]


def export_arguments(encoder: Encoder) -> dict[str, Any]:
    """Sizes of frames and cubes, and whether there is a norm after pooling."""
    frames, tubelet = clip_of(encoder)
    cube = {"num_frames": frames, "tubelet_size": tubelet}
    return {**vit.sizes(encoder), **cube, "fc_norm": vit.has_fc_norm(encoder)}


VIDEO: Family = replace(
    vit.VIT,
    name="video",
    module=VideoTransformer,
    timm_modules=frozenset(),
    item=CLIP,
    create=create,
    build=build,
    initialise=initialise_video,
    export_arguments=export_arguments,
    clip=clip_of,
    file_arguments=lambda _, arguments: arguments,
    stores_positions=False,  # fixed, and not in the state dict
    timm_opens=lambda _: False,
)
