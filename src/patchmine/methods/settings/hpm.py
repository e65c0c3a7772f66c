"""Settings of HPM."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import DecoderSettings, FeatureTargetSettings


class HpmSettings(FeatureTargetSettings, DecoderSettings):
    """A teacher predicts where reconstruction will be hard, and masks there.

    Wang et al., "Hard Patches Mining", CVPR 2023, arXiv 2304.05919.  The defaults are the
    published recipe (models_mae_learn_loss.py, engine_pretrain.py).
    """

    implementation: ClassVar[str] = "patchmine.methods.hpm:HPM"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit", "video"})
    name: Literal["hpm"] = "hpm"
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that are removed")
    target: Literal["pixel", "ema", "dino", "clip"] = Field(
        "pixel", description="pixels, or features of the teacher or a frozen DINO or CLIP"
    )
    norm_pix_loss: bool = Field(False, description="predict pixels standardised within each patch")
    prediction: Literal["relative", "absolute", "none"] = Field(
        "relative", description="of losses: their order, their standardised value, or none"
    )
    losspred_head: Literal["patch", "scalar"] = Field(
        "patch", description="an output per pixel value, averaged; or a single one"
    )
    alpha_start: float = Field(
        0.0, ge=0, le=1, description="share of hard patches among the masked, at first"
    )
    alpha_end: float = Field(0.5, ge=0, le=1, description="the same at the end")
    alpha_offset: int = Field(1, ge=0, description="epochs by which the schedule is ahead")
    mask_unit: Literal["tube", "cube"] = Field(
        "tube", description="of clips: hide a place at all times, or each cube by itself"
    )
    tube_score: Literal["mean", "max"] = Field(
        "mean", description="a tube's difficulty, from its cubes'"
    )
    clip_grad: float | None = Field(5.0, gt=0, description="largest global gradient norm")
