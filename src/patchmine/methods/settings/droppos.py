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
        0.75, gt=0, le=1, description="share of visible patches without position"
    )
    mask_token_type: Literal["param", "zeros", "wrong_pos"] = Field(
        "param",
        description="instead of a withheld position: a learned token, nothing, another's position",
    )
    smoothing: float = Field(
        1.0, ge=0, description="width of smoothed targets: exp(-distance^2 / width^2); 0: none"
    )
    smoothing_decay: bool = Field(True, description="let that width fall linearly towards 0")
    smoothing_grid: Literal["patches", "as_run"] = Field(
        "patches",
        description="distances on the grid of patches, or of pixels in a patch (published runs)",
    )
    smoothing_norm: Literal["column", "row"] = Field(
        "column",
        description="divide smoothed targets by the sum of each place (the code) or target",
    )
    attentive: bool = Field(True, description="weigh patches by similarity to the class token")
    temperature: float = Field(0.1, gt=0, description="of the softmax over these similarities")
    conf_ignore: bool = Field(
        False, description="leave out patches placed as surely as their target says"
    )
    multi_task: bool = Field(False, description="also predict removed pixels, as MAE does")
    pos_weight: float = Field(
        0.05, gt=0, description="with multi_task: weight of the position loss"
    )
    norm_pix_loss: bool = Field(
        True, description="with multi_task: standardise pixels in each patch"
    )
    decoder_depth: Depth = Field(2, description="blocks of the decoder")
    clip_grad: float | None = Field(
        5.0, gt=0, description="largest gradient norm of each parameter"
    )
