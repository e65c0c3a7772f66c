"""Settings of MAE."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import CrossDecoderSettings, NoiseColour
from patchmine.strict import Count


class MaeSettings(CrossDecoderSettings):
    """Predict the pixels of randomly removed patches from the few that are left.

    He et al., CVPR 2022, arXiv 2111.06377; on clips it is VideoMAE (Tong et al., NeurIPS 2022,
    arXiv 2203.12602).  The defaults are the published recipe (PRETRAIN.md, models_mae.py).
    """

    implementation: ClassVar[str] = "patchmine.methods.mae:MAE"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit", "eva", "video"})
    predicts_patches: ClassVar[bool] = True
    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that are removed")
    mask_block: Count = Field(
        1, description="patches along a side of the squares that are removed together"
    )
    mask_noise: NoiseColour = Field(
        "white",
        description="noise whose lowest values stay: white draws each patch by itself, red large "
        "regions, green small ones, blue scattered patches, purple both extremes",
    )
