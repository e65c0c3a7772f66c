"""A frozen network of somebody else's, from a local file, whose patch features a method predicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchmine.backbones.architecture import count_blocks, known_heads
from patchmine.backbones.description import describe, find_weights
from patchmine.backbones.grids import source_grid
from patchmine.backbones.loading import (
    LoadReport,
    Tensors,
    load_tensors,
    read_checkpoint,
    refuse_non_finite,
    tensors_only,
)
from patchmine.backbones.naming import flatten
from patchmine.backbones.positions import move_all_positions
from patchmine.backbones.video import VideoTransformer
from patchmine.backbones.weights import load_encoder
from patchmine.errors import UserError, foreign_parser
from patchmine.types import Grid

SETTING = "method.target_file"


class ForeignTeacher(nn.Module):
    """A frozen ViT, always in eval mode, that turns images into one feature vector for each patch.

    ``kind="dino"``: any plain ViT under timm's names (DINO's official file, an MAE or HPM
    checkpoint, an export folder); features are the patch tokens after the final norm.
    ``kind="clip"``: OpenAI's CLIP image tower; all tokens go through ``ln_post`` and the projection
    (spec hpm.md, section 3.3).

    ``grid`` is the student's patch grid; a position table trained on another one is resampled.
    ``renormalise``: turn images that are normalised with ImageNet's mean and deviation into CLIP's
    own normalisation; the reference does not.

    Raises UserError, naming ``method.target_file``, for a file that is missing, broken, of another
    architecture, or whose patches are not of the student's size.
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
                f"{SETTING} is not set, but method.target={kind} needs the local weights of that network"
            )
        self.grid = grid
        self.tower, projection = _open(kind, Path(file), grid)
        if self.tower.patch_embed.proj.in_channels != len(IMAGENET_DEFAULT_MEAN):
            raise UserError(
                f"{SETTING}={file} is a network for {self.tower.patch_embed.proj.in_channels} channels, not three"
            )
        self.register_buffer("projection", projection)
        self.width = self.tower.embed_dim if projection is None else projection.shape[1]
        scale, shift = (
            _to_clip_normalisation()
            if renormalise and kind == "clip"
            else (torch.ones(3), torch.zeros(3))
        )
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
        """The same with the network's class and register tokens before the patches: (B, P + L,
        width).
        """
        tokens = self.tower.forward_features(images * self.scale + self.shift)  # (B, P + L, D)
        return tokens if self.projection is None else tokens @ self.projection


def _to_clip_normalisation() -> tuple[Tensor, Tensor]:
    """Factor and summand, (3,) each, that turn ImageNet-normalised values into CLIP-normalised
    ones.
    """
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    clip_mean, clip_std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return std / clip_std, (mean - clip_mean) / clip_std


def _open(kind: str, file: Path, grid: Grid) -> tuple[VisionTransformer, Tensor | None]:
    """The network in ``file`` for images of ``grid``, and CLIP's projection."""
    try:
        return _clip_tower(file, grid) if kind == "clip" else (_plain_tower(file, grid), None)
    except UserError as error:
        if SETTING in str(error):
            raise
        raise UserError(f"{SETTING}={file}: {error}") from error


def _check_patch(patch: int, grid: Grid, file: Path) -> None:
    if grid.patch != (patch, patch):
        own = "x".join(map(str, grid.patch))
        raise UserError(
            f"{SETTING}={file} cuts images into patches of {patch}x{patch} pixels and the student into {own}: "
            "their patches do not correspond, choose a network or a patch_size that matches"
        )


def _image_size(grid: Grid) -> tuple[int, int]:
    rows, columns = (count * side for count, side in zip(grid.size, grid.patch, strict=True))
    return rows, columns


def _plain_tower(file: Path, grid: Grid) -> VisionTransformer:
    tower = load_encoder(file, image_size=_image_size(grid), setting=SETTING)
    if not isinstance(tower, VisionTransformer | Beit) or isinstance(tower, VideoTransformer):
        raise UserError(
            f"{SETTING}={file} holds a {type(tower).__name__}, no plain vision transformer for images"
        )
    _check_patch(tower.patch_embed.patch_size[0], grid, file)
    return tower


def _filled(
    tower: VisionTransformer, tensors: Tensors, file: Path, content: Mapping[str, Any]
) -> VisionTransformer:
    """The tower with the tensors in it, every one of them used, positions moved from the grid that
    they are of.
    """
    source, embed, prefix = f"{SETTING}={file}", tower.patch_embed, tower.num_prefix_tokens
    found = source_grid(
        tensors["pos_embed"], (prefix,), embed.patch_size, source, describe(file, content)
    )
    tensors, _ = move_all_positions(tensors, found.grid, embed.grid_size, prefix)
    load_tensors(tower, tensors, LoadReport(source))
    return tower


def _clip_tower(file: Path, grid: Grid) -> tuple[VisionTransformer, Tensor]:
    """CLIP's image tower as a timm ViT, and its projection (D, width)."""
    file = find_weights(file, SETTING)
    content = read_checkpoint(file, SETTING)
    with foreign_parser(
        lambda reason: UserError(f"{SETTING}={file} holds no CLIP image tower ({reason})")
    ):
        tensors = _clip_names(tensors_only(flatten(content)), file)
        projection = tensors.pop("projection")
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    _check_patch(patch, grid, file)
    if projection.ndim != 2 or projection.shape[0] != width:
        raise UserError(
            f"{SETTING}={file} projects tokens of width {projection.shape[0]}, but its network gives {width}: "
            "it was put together from two, give the original file"
        )
    # OpenAI's towers have heads of 64 channels; the layer norms' eps of 1e-5 and QuickGELU come
    # with timm's name.
    heads = known_heads(width, {}, "heads", max(1, width // 64))
    tower = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224",
        pretrained=False,
        num_classes=0,
        img_size=_image_size(grid),
        patch_size=patch,
        embed_dim=width,
        depth=count_blocks(tensors, str(file)),
        num_heads=heads,
    )
    refuse_non_finite({"its projection": projection}, f"{SETTING}={file}")
    return _filled(tower, tensors, file, content), projection


def _clip_names(tensors: Tensors, file: Path) -> Tensors:
    """CLIP's image tower under timm's names, from OpenAI's naming or transformers'."""
    for needed, renamed in (
        (_OPENAI_NEEDS, _from_openai),
        (_TRANSFORMERS_NEEDS, _from_transformers),
    ):
        if all(name in tensors for name in needed):
            return renamed(tensors)
    raise UserError(
        f"{SETTING}={file} holds no CLIP image tower with its projection: it lacks "
        f"{', '.join(_OPENAI_NEEDS)} (OpenAI's naming) or {', '.join(_TRANSFORMERS_NEEDS)} (transformers' naming)"
    )


_OPENAI_NEEDS = (
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.conv1.weight",
    "visual.proj",
)
_TRANSFORMERS_NEEDS = (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.embeddings.patch_embedding.weight",
    "visual_projection.weight",
)
_OPENAI_NAMES: dict[str, str] = {
    r"^conv1\.": "patch_embed.proj.",
    r"^ln_pre\.": "norm_pre.",
    r"^ln_post\.": "norm.",
    r"^transformer\.resblocks\.": "blocks.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.attn\.in_proj_": ".attn.qkv.",
    r"\.attn\.out_proj\.": ".attn.proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
_TRANSFORMERS_NAMES: dict[str, str] = {
    r"^embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"^pre_layrnorm\.": "norm_pre.",  # transformers' own spelling
    r"^post_layernorm\.": "norm.",
    r"^encoder\.layers\.": "blocks.",
    r"\.layer_norm([12])\.": r".norm\1.",
    r"\.self_attn\.qkv\.": ".attn.qkv.",
    r"\.self_attn\.out_proj\.": ".attn.proj.",
}


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _from_openai(tensors: Tensors) -> Tensors:
    tower = {
        name.removeprefix("visual."): tensor
        for name, tensor in tensors.items()
        if name.startswith("visual.")
    }
    special: dict[str, Any] = {
        "cls_token": tower.pop("class_embedding")[None, None],
        "pos_embed": tower.pop("positional_embedding")[None],
        "projection": tower.pop("proj").clone(),  # (D, width)
    }
    return _renamed(tower, _OPENAI_NAMES) | special


def _from_transformers(tensors: Tensors) -> Tensors:
    prefix = "vision_model."
    tower = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    special = {
        "cls_token": tower.pop("embeddings.class_embedding")[None, None, :],
        "pos_embed": tower.pop("embeddings.position_embedding.weight")[None],
        "projection": tensors["visual_projection.weight"].T.contiguous(),  # (D, width)
    }
    for name in [name for name in tower if ".self_attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in tower for part in parts):
            tower[name.replace(".q_proj.", ".qkv.")] = torch.cat(
                [tower.pop(part) for part in parts]
            )
    return _renamed(tower, _TRANSFORMERS_NAMES) | special
