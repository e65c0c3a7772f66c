"""Settings of EMAE."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import DecoderSettings
from patchmine.strict import LARGEST_COUNT, Count


class EmaeSettings(DecoderSettings):
    """All parts of an image predict the rest in one step, and must agree where they overlap.

    Li et al., arXiv 2302.14431, without published code; where the paper's choices are not known,
    the defaults are those of MAE.
    """

    implementation: ClassVar[str] = "patchmine.methods.emae:EMAE"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit", "eva"})
    predicts_patches: ClassVar[bool] = True
    name: Literal["emae"] = "emae"
    parts: int = Field(
        4,
        ge=2,
        le=LARGEST_COUNT,
        description="parts an image is divided into; each is seen once, 1 - 1/parts masked",
    )
    parts_used: Count | None = Field(
        None, description="parts that are encoded; null: all of them; 1 is MAE"
    )
    sc_weight: float = Field(
        1.0, ge=0, description="weight of the self-consistency loss; 0: disjoint masks only"
    )
    sc_dist: Literal["l1", "l2"] = Field(
        "l1", description="distance of two predictions: absolute or squared"
    )
    sc_norm: Literal["all", "overlap"] = Field(
        "all",
        description="a pair's distance is divided by all patches, or by those that both parts "
        "predict",
    )
    sc_pairs: Literal["mean", "sum"] = Field(
        "mean", description="pairs of parts are averaged, or added up"
    )
    sc_grad: Literal["both", "none"] = Field(
        "both",
        description="each distance counted twice, with either side held fixed; or once: only the "
        "value halves",
    )
    mask_token: Literal["learned", "zeros"] = Field(
        "learned",
        description="what the decoder gets for a masked patch: MAE's learned token, or zeros",
    )
