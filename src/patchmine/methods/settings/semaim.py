"""Settings of SemAIM."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import FeatureTargetSettings
from patchmine.strict import Count, Depth

Order = Literal[
    "attention_center",
    "similarity",
    "stochastic",
    "rowmajor",
    "serpentine",
    "center2out",
    "out2center",
]


class SemAimSettings(FeatureTargetSettings):
    """Predict every patch from those before it, in an order that starts at the main object.

    Song, Zhang, Wang, AAAI 2024, arXiv 2312.10457; order=stochastic is SAIM (arXiv 2212.01610).
    The defaults are the published recipe (README.md, main_pretrain.py).
    """

    implementation: ClassVar[str] = "patchmine.methods.semaim:SemAIM"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit", "eva"})
    predicts_patches: ClassVar[bool] = True
    name: Literal["semaim"] = "semaim"
    order: Order = Field(
        "attention_center",
        description="attention_center: by distance from the patch most similar to the image; "
        "similarity: by similarity; stochastic: at random (SAIM); rowmajor, serpentine; "
        "center2out, out2center: of the image",
    )
    similarity: Literal["cls", "gap", "self"] = Field(
        "cls",
        description="of a patch to class token or mean patch, or the class token's attention "
        "(self)",
    )
    semantic_source: Literal["online", "ema"] = Field(
        "online",
        description="who judges similarity when pixels are predicted: the encoder, or its EMA "
        "teacher",
    )
    ties: Literal["break", "keep"] = Field(
        "break", description="patches of equal distance: in random order, or all at once (slower)"
    )
    group_size: Count = Field(
        1, description="patches of consecutive ranks predicted at once (slower above 1)"
    )
    query_depth: Depth | None = Field(
        None,
        description="query blocks, a divisor of the encoder's depth; null: as many as the "
        "encoder has",
    )
    head: Literal["mlp", "linear"] = Field("mlp", description="what turns queries into predictions")
    target: Literal["pixel", "ema", "own", "dino", "clip"] = Field(
        "pixel",
        description="what is predicted: pixels, features of the EMA teacher or of itself, or "
        "those of a frozen DINO or CLIP",
    )
    pixel_loss: Literal["l2", "l1"] = Field(
        "l2", description="mean squared or mean absolute error of pixels"
    )
    norm_pix_loss: bool = Field(True, description="predict pixels standardised within each patch")
    blur_kernel: Count = Field(
        9, description="side of the window that pixel targets are blurred with, odd"
    )
    blur_sigma: float | None = Field(
        1.0, gt=0, description="deviation of that blur, in pixels; null: none"
    )
    clip_grad: float | None = Field(
        3.0, gt=0, description="largest global gradient norm (README.md: 3)"
    )
