"""A frozen network of others, from a local file, whose patch features a method predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn

from patchmine.backbones.architecture import count_blocks
from patchmine.backbones.description import describe_weights, find_weights
from patchmine.backbones.family import family_of
from patchmine.backbones.loading import read_checkpoint, refuse_non_finite
from patchmine.backbones.naming import find_network
from patchmine.backbones.record import Encoder
from patchmine.backbones.weights import load_encoder
from patchmine.errors import UserError
from patchmine.types import Grid

SETTING = "method.target_file"
# The layer norms' eps of 1e-5 and QuickGELU, which OpenAI trained with, come with this name.
_CLIP = "vit_base_patch16_clip_quickgelu_224"


class ForeignTeacher(nn.Module):
    """A frozen ViT, always in eval mode, that turns images into one feature vector for each patch.

    Args:
        kind: ``"dino"``: any plain ViT that `open_weights` reads (DINO's official file, an MAE or
            HPM checkpoint, an export folder); features are the patch tokens after the final norm.
            ``"clip"``: CLIP's image tower as timm keeps it; all tokens go through the final norm
            and the projection, which timm calls ``head``.
        file: of its weights.
        grid: the student's patch grid; a position table of another one is moved.
        renormalise: turn images that are normalised with ImageNet's mean and deviation into CLIP's
            own normalisation; the reference does not.

    Raises:
        UserError: a file that is missing, broken, of another architecture, or whose patches are not
            of the student's size; it names ``method.target_file``.
    """

    width: int
    grid: Grid
    scale: Tensor
    shift: Tensor
    projection: Tensor | None

    def __init__(
        self,
        kind: Literal["dino", "clip"],
        file: str | Path | None,
        *,
        grid: Grid,
        renormalise: bool = False,
    ) -> None:
        super().__init__()
        if file is None:
            raise UserError(
                f"{SETTING} is not set, but method.target={kind} needs the local weights of that "
                "network"
            )
        self.grid = grid
        size = tuple(count * side for count, side in zip(grid.size, grid.patch, strict=True))
        try:
            given, projection = _clip_model(Path(file)) if kind == "clip" else ({}, None)
            tower = load_encoder(Path(file), image_size=size, setting=SETTING, **given)
            _check(tower, grid)
        except UserError as error:
            if SETTING in str(error):
                raise
            raise UserError(f"{SETTING}={file}: {error}") from error
        self.tower = tower
        self.register_buffer("projection", projection)
        self.width = tower.embed_dim if projection is None else projection.shape[1]
        scale, shift = torch.ones(3), torch.zeros(3)
        if renormalise and kind == "clip":
            mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
            own_mean, own_std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
            scale, shift = std / own_std, (mean - own_mean) / own_std
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> ForeignTeacher:
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised as ImageNet -> (B, L, width), raster order."""
        return self.tokens(images)[:, self.tower.num_prefix_tokens :]

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The same with class and register tokens before the patches: (B, P + L, width)."""
        tokens = self.tower.forward_features(images * self.scale + self.shift)  # (B, P + L, D)
        return tokens if self.projection is None else tokens @ self.projection


def _check(tower: Encoder, grid: Grid) -> None:
    """UserError for what gives no features of the student's patches."""
    family = family_of(tower)
    if family.hierarchical or family.clip(tower) is not None:
        raise UserError(f"holds a {type(tower).__name__}, no plain vision transformer for images")
    patch, channels = tower.patch_embed.patch_size, tower.patch_embed.proj.in_channels
    if grid.patch != tuple(patch):
        raise UserError(
            f"it cuts images into patches of {patch[0]}x{patch[1]} pixels and the student into "
            f"{grid.patch[0]}x{grid.patch[1]}: choose a network or a patch_size that matches"
        )
    if channels != len(IMAGENET_DEFAULT_MEAN):
        raise UserError(f"it is a network for {channels} channels, not three")


def _clip_model(file: Path) -> tuple[dict[str, Any], Tensor]:
    """How `load_encoder` is to open CLIP's image tower, and its projection (D, width)."""
    path, source = find_weights(file, SETTING), f"{SETTING}={file}"
    content = read_checkpoint(path, SETTING)
    tensors = find_network(content, source).tensors
    projection, norm = tensors.get("head.weight"), tensors.get("norm_pre.weight")
    patches = tensors["patch_embed.proj.weight"]
    width, depth = patches.shape[0], count_blocks(tensors, source)
    if projection is None or norm is None or projection.ndim != 2:
        raise UserError(
            f"{source} holds no CLIP image tower with its projection under timm's names "
            "(norm_pre.weight, head.weight): take the model.safetensors of timm's "
            f"{_CLIP}.openai"
        )
    if projection.shape[1] != width:
        raise UserError(
            f"{source} projects tokens of width {projection.shape[1]}, but its network gives "
            f"{width}: it was put together from two, give the original file"
        )
    refuse_non_finite({"its projection": projection}, source)
    own = dict(embed_dim=width, depth=depth, num_heads=max(1, width // 64))  # OpenAI's heads
    named: dict[str, Any] = {"model": _CLIP, "model_args": {**own, "patch_size": patches.shape[-1]}}
    described = describe_weights(path, content).model is not None
    return {} if described else named, projection.T.contiguous()
