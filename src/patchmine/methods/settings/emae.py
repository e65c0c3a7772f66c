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
    families: ClassVar[frozenset[str]] = frozenset({"vit", "beit"})
    name: Literal["emae"] = "emae"
    parts: int = Field(
        4, ge=2, le=LARGEST_COUNT, description="parts an image is cut into, each seen once"
    )
    parts_used: Count | None = Field(
        None, description="parts that are encoded; null: all; 1 is MAE"
    )
    sc_weight: float = Field(
        1.0, ge=0, description="weight of self-consistency; 0: disjoint masks only"
    )
    sc_dist: Literal["l1", "l2"] = Field("l1", description="distance: absolute or squared")
    sc_norm: Literal["all", "overlap"] = Field(
        "all", description="divide by all patches, or those both predict"
    )
    sc_pairs: Literal["mean", "sum"] = Field("mean", description="how pairs of parts are summed up")
    sc_grad: Literal["both", "none"] = Field(
        "both", description="both: each distance counts twice, either side fixed"
    )
    mask_token: Literal["learned", "zeros"] = Field(
        "learned", description="the decoder's input for masked patches"
    )
