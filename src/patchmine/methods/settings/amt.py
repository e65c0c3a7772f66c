"""Settings of AMT."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import DecoderSettings
from patchmine.strict import Count


class AmtSettings(DecoderSettings):
    """The model's own attention decides which patches are masked and which thrown away.

    Liu, Gui, Luo, AAAI 2023, arXiv 2211.15362.  A setting that is left open (null) takes the
    published value of its host and of the length of the run.
    """

    implementation: ClassVar[str] = "patchmine.methods.amt:AMT"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit", "eva"})
    predicts_patches: ClassVar[bool] = True
    name: Literal["amt"] = "amt"
    host: Literal["mae", "simmim"] = Field(
        "mae", description="what predicts the masked patches: MAE or SimMIM"
    )
    mask_ratio: float | None = Field(
        None, gt=0, lt=1, description="share that is masked; null: 0.45 on MAE, 0.44 on SimMIM"
    )
    throw_ratio: float | None = Field(
        None, ge=0, lt=1, description="share that is thrown away; null: 0.40 on MAE, 0.26 on SimMIM"
    )
    start_epoch: int | None = Field(
        None,
        ge=0,
        description="first epoch guided by attention; null: 41, or a tenth of a run below 200 "
        "epochs",
    )
    refresh_every: int | None = Field(
        None,
        gt=0,
        description="epochs that stored maps serve; null: 40, or a tenth of a run below 200 epochs",
    )
    warmup_mask_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share masked at random before; null: 0.75 on MAE, mask_ratio on SimMIM",
    )
    maps: Literal["stored", "online"] = Field(
        "stored",
        description="a map of each image, renewed now and then; or an EMA teacher's attention",
    )
    alignment: Literal["area", "bilinear", "released"] = Field(
        "area",
        description="how a stored map follows the crop; released: the published code's mistake, "
        "for parity",
    )
    ema: float = Field(0.999, ge=0, le=1, description="decay of the EMA teacher, for maps=online")
    norm_pix_loss: bool = Field(
        False, description="on MAE: predict pixels standardised within each patch"
    )
    mask_unit: Count | None = Field(
        None,
        description="on SimMIM: pixels along a side of what is hidden at once; null: two patches",
    )
    clip_grad: float | None = Field(
        None, gt=0, description="largest global gradient norm; null: none on MAE, 5 on SimMIM"
    )
