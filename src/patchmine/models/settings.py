"""Settings of what methods are built of, what those of every method have in common, and what of a
network is trained.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, Field

from patchmine.strict import LARGEST_BATCH, Count, Depth, Share, Strict


class MethodSettings(Strict):
    """Settings of one pre-training method; a subclass narrows ``name`` to its own.

    Attributes:
        implementation: "module:Class" of the `Method` that these settings build, imported when
            work starts.
        families: names of the encoder families that the method trains.
        relative_positions: it takes encoders whose attention knows how far apart two patches are.
        multi_crop: a training batch holds several crops of each image, as ``crops`` says.
        predicts_patches: its loss is one of patches, out of which those without data can stay.
    """

    implementation: ClassVar[str]
    families: ClassVar[frozenset[str]] = frozenset({"vit"})
    relative_positions: ClassVar[bool] = False
    multi_crop: ClassVar[bool] = False
    predicts_patches: ClassVar[bool] = False

    name: str
    clip_grad: float | None = Field(
        None, gt=0, description="largest global gradient norm; null: no limit"
    )


NoiseColour = Literal["white", "red", "green", "blue", "purple"]
"""Which frequencies of a random field are left: all, low, middle, high, all but the middle."""


class DecoderSettings(MethodSettings):
    """Settings of a method with MAE's decoder; the defaults are MAE's (models_mae.py)."""

    norm_pix_loss: bool = Field(True, description="predict pixels standardised within each patch")
    decoder_embed_dim: Count = Field(512, description="width of the decoder")
    decoder_depth: Depth = Field(8, description="blocks of the decoder")
    decoder_num_heads: Count = Field(16, description="attention heads of the decoder")
    decoder_mlp_ratio: float = Field(
        4.0, gt=0, le=64, description="hidden width of the decoder's MLPs, times its own width"
    )
    decoder_norm_eps: float = Field(
        1e-6, gt=0, description="added to the variance in the decoder's layer norms"
    )
    decoder_qkv_bias: bool = Field(
        True, description="biases of queries, keys and values in the decoder's attention"
    )


class CrossDecoderSettings(DecoderSettings):
    """Settings of a method whose decoder may read masked patches out of visible ones alone."""

    decoder_attention: Literal["self", "cross"] = Field(
        "self",
        description="self: the decoder's tokens all look at each other; cross: those of masked "
        "patches look at visible ones only, as CrossMAE's",
    )
    predicted_share: Share = Field(
        1.0,
        description="share of the masked patches, drawn at random in each step, that the decoder "
        "predicts and the loss counts",
    )


class FeatureTargetSettings(MethodSettings):
    """Settings of a method that may predict features of its EMA teacher or of a frozen network."""

    target: Literal["pixel", "ema", "own", "dino", "clip"]
    target_file: str | None = Field(
        None, description="local weights of the frozen DINO or CLIP network"
    )
    target_renormalise: bool = Field(
        False,
        description="give a foreign network images in its own normalisation; the reference does "
        "not",
    )
    ema_start: float = Field(0.999, ge=0, le=1, description="decay of the EMA teacher at the start")
    ema_end: float = Field(
        0.9999, ge=0, le=1, description="decay of the EMA teacher after the ramp"
    )
    ema_ramp_epochs: int | None = Field(
        100,
        gt=0,
        description="epochs of the ramp, counted absolutely; null: per step, over the whole run",
    )


class DistillationSettings(MethodSettings):
    """Settings of a method on DINO's distillation between crops (arXiv 2104.14294)."""

    out_dim: int = Field(65536, gt=1, le=LARGEST_BATCH, description="prototypes of a head")
    head_hidden: Count = Field(2048, description="hidden width of DINO's head")
    head_bottleneck: Count = Field(256, description="width of DINO's head before its prototypes")
    teacher_temp_start: float = Field(
        0.04, gt=0, description="temperature of the EMA teacher at the start"
    )
    teacher_temp_end: float = Field(0.07, gt=0, description="the same after its warm-up")
    centre_momentum: float = Field(
        0.9, ge=0, lt=1, description="how slowly the centres of the EMA teacher's logits move"
    )
    ema_start: float = Field(0.996, ge=0, le=1, description="decay of the EMA teacher at the start")
    ema_end: float = Field(1.0, ge=0, le=1, description="decay of the EMA teacher at the end")
    clip_grad: float | None = Field(
        3.0, gt=0, description="largest gradient norm of each parameter by itself"
    )
    freeze_last_layer: int = Field(
        1, ge=0, description="epochs during which the prototypes do not move"
    )


DEFAULT_RANK = 16


class Trainable(NamedTuple):
    """What of an encoder is fine-tuned.

    ``amount``: blocks of "last", in halves; the rank of "lora"; else 0.  ``share``: that of the
    blocks, for "last", in place of a number.
    """

    kind: Literal["all", "none", "bias", "last", "lora"]
    amount: float = 0.0
    share: float = 0.0


def parse_trainable(text: str) -> Trainable:
    """What ``trainable=`` says: all, none, bias, last:4, last:0.5, last:25%, lora or lora:8.

    Raises:
        ValueError: it is none of these; the text is what a value must be.
    """
    if text in ("all", "none", "bias"):
        return Trainable(text)  # type: ignore[arg-type]  # mypy does not narrow by membership
    if found := re.fullmatch(r"lora(?::([1-9][0-9]{0,4}))?", text):
        return Trainable("lora", float(found[1] or DEFAULT_RANK))
    if found := re.fullmatch(r"last:([1-9][0-9]?)%", text):
        return Trainable("last", share=int(found[1]) / 100)
    found = re.fullmatch(r"last:([0-9]{1,3}(?:\.[05])?)", text)
    if found and float(found[1]) > 0:
        return Trainable("last", float(found[1]))
    raise ValueError(
        "all, none (the head only), bias, lora:16 (of any rank) or last:4 (any number of blocks; "
        "last:0.5 is the MLP of the last one, last:25% a quarter of all)"
    )


def _is_trainable(text: str) -> str:
    parse_trainable(text)
    return text


TrainableSpec = Annotated[str, AfterValidator(_is_trainable)]
"""A text that `parse_trainable` reads."""


class TrainableSettings(Strict):
    """What of an encoder learns, and at which rates."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    trainable: TrainableSpec = Field(
        "all", description="all, none (the head only), last:4 (blocks), bias, lora:8 (rank)"
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="factor of the rate from layer to layer; null: 1, or 0.75 where labels teach",
    )


class AverageSettings(Strict):
    """What stands in the place of the last weights when a run is done."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights, and use that"
    )


class AdaptSettings(AverageSettings, TrainableSettings):
    """How carefully pre-training moves an encoder that is good already."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    freeze_encoder: float = Field(
        0.0, ge=0, lt=1, description="share of the run in which all else learns first, as 0.05"
    )
