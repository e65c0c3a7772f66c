"""Settings of DropPos."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import DecoderSettings
from patchmine.strict import Depth


class DropPosSettings(DecoderSettings):
    """Say where visible patches belong whose position was withheld.

    Wang et al., NeurIPS 2023, arXiv 2309.03576.  The defaults are the published recipe (scripts/,
    models_DropPos_mae.py).
    """

    implementation: ClassVar[str] = "patchmine.methods.droppos:DropPos"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit"})
    relative_positions: ClassVar[bool] = True
    name: Literal["droppos"] = "droppos"
    mask_ratio: float = Field(0.75, ge=0, lt=1, description="share of the patches that are removed")
    pos_mask_ratio: float = Field(
        0.75, gt=0, le=1, description="share of the visible patches whose position is withheld"
    )
    mask_token_type: Literal["param", "zeros", "wrong_pos"] = Field(
        "param",
        description="in place of a withheld position: a learned token, nothing, or the position "
        "of another patch that lost its own",
    )
    smoothing: float = Field(
        1.0,
        ge=0,
        description="width of the smoothed targets in patches: exp(-distance^2 / width^2); 0: none",
    )
    smoothing_decay: bool = Field(
        True, description="let that width fall linearly towards 0, epoch by epoch"
    )
    smoothing_grid: Literal["patches", "as_run"] = Field(
        "patches",
        description="distances on the grid of patches, or on one as wide as a patch has pixels "
        "(published runs)",
    )
    smoothing_norm: Literal["column", "row"] = Field(
        "column",
        description="divide the smoothed targets by the sum of each place (the code) or of each "
        "target",
    )
    attentive: bool = Field(
        True,
        description="weigh patches by their similarity to the class token, in a pass over the "
        "whole image",
    )
    temperature: float = Field(
        0.1, gt=0, description="of the softmax over these similarities (0.1 in the code)"
    )
    conf_ignore: bool = Field(
        False,
        description="leave out patches that are placed at least as surely as the smoothed target "
        "says",
    )
    multi_task: bool = Field(
        False, description="also predict the pixels of removed patches, as MAE does"
    )
    pos_weight: float = Field(
        0.05, gt=0, description="weight of the position loss with multi_task, and only then"
    )
    norm_pix_loss: bool = Field(
        True, description="with multi_task: predict pixels standardised within each patch"
    )
    decoder_depth: Depth = Field(2, description="blocks of the decoder")
    clip_grad: float | None = Field(
        5.0,
        gt=0,
        description="largest gradient norm of each parameter by itself (main_pretrain.py: 5)",
    )
