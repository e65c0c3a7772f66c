"""Settings of SimMIM."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import MethodSettings
from patchmine.strict import Count


class SimMimSettings(MethodSettings):
    """Predict the pixels of large masked squares by one linear layer.

    Xie et al., CVPR 2022, arXiv 2111.09886.  The defaults are the published recipe
    (configs/vit_base__800ep, data_simmim.py).
    """

    implementation: ClassVar[str] = "patchmine.methods.simmim:SimMIM"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit", "eva"})
    predicts_patches: ClassVar[bool] = True
    relative_positions: ClassVar[bool] = True
    name: Literal["simmim"] = "simmim"
    mask_ratio: float = Field(
        0.6, gt=0, lt=1, description="share of the mask units that are hidden, rounded up"
    )
    mask_unit: Count | None = Field(
        None,
        description="pixels along a side of what is hidden at once; null: two patches, 32 as "
        "published",
    )
    clip_grad: float | None = Field(
        5.0, gt=0, description="largest global gradient norm (config.py: 5)"
    )
