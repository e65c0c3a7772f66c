"""Settings of HPM."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import CrossDecoderSettings, FeatureTargetSettings


class HpmSettings(FeatureTargetSettings, CrossDecoderSettings):
    """A teacher predicts where reconstruction will be hard, and masks there.

    Wang et al., "Hard Patches Mining", CVPR 2023, arXiv 2304.05919.  The defaults are the
    published recipe (models_mae_learn_loss.py, engine_pretrain.py).
    """

    implementation: ClassVar[str] = "patchmine.methods.hpm:HPM"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit", "eva", "video"})
    predicts_patches: ClassVar[bool] = True
    name: Literal["hpm"] = "hpm"
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that are removed")
    target: Literal["pixel", "ema", "dino", "clip"] = Field(
        "pixel",
        description="what is predicted: pixels, the teacher's features, or those of a frozen "
        "DINO or CLIP",
    )
    norm_pix_loss: bool = Field(False, description="predict pixels standardised within each patch")
    prediction: Literal["relative", "absolute", "none"] = Field(
        "relative",
        description="how losses are predicted: their order, their standardised value, or not at "
        "all",
    )
    prediction_weight: float = Field(
        1.0, gt=0, description="of that loss, beside the reconstruction's weight of 1"
    )
    losspred_head: Literal["patch", "scalar"] = Field(
        "patch",
        description="one output per value of a patch, averaged, as published; or a single output",
    )
    predictor: Literal["decoder", "head"] = Field(
        "decoder",
        description="what predicts losses: a second decoder, as published; or a head on blocks of "
        "the first one",
    )
    predictor_depth: int | None = Field(
        None, gt=0, description="blocks of the decoder in front of that head; null: all of them"
    )
    look: Literal["full", "masked", "memory"] = Field(
        "full",
        description="where difficulty comes from: the teacher sees the whole image, as published; "
        "it sees what a random mask leaves, and scores the rest; or the student's errors at "
        "earlier visits, without a teacher",
    )
    score: Literal["predicted", "observed"] = Field(
        "predicted",
        description="of a masked look: the loss that the teacher predicts, or the error that it "
        "makes",
    )
    num_looks: int = Field(1, gt=0, le=64, description="masks of a masked look, whose mean counts")
    every: int = Field(
        1,
        gt=0,
        description="the teacher looks in every such epoch; maps are kept by item in between",
    )
    alpha_start: float = Field(
        0.0, ge=0, le=1, description="share of hard patches among the masked, at the start"
    )
    alpha_end: float = Field(0.5, ge=0, le=1, description="the same at the end")
    alpha_offset: int = Field(
        1, ge=0, description="epochs by which the schedule is ahead (generate_mask: 1)"
    )
    mask_unit: Literal["tube", "cube"] = Field(
        "tube",
        description="of clips: hide a place at all times, or each cube by itself; images know no "
        "difference",
    )
    tube_score: Literal["mean", "max"] = Field(
        "mean", description="difficulty of a tube: the mean or the greatest of its cubes"
    )
    clip_grad: float | None = Field(
        5.0, gt=0, description="largest global gradient norm (util/misc.py: 5)"
    )
