"""Settings of what methods are built of, and what those of every method have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from patchmine.strict import Count, Depth, Strict


class MethodSettings(Strict):
    """Settings of one pre-training method; a subclass narrows ``name`` to its own.

    Attributes:
        implementation: "module:Class" of the `Method` that these settings build, imported when
            work starts.
        families: names of the encoder families that the method trains.
        relative_positions: it takes encoders whose attention knows how far apart two patches are.
        multi_crop: a training batch holds several crops of each image, as ``crops`` says.
    """

    implementation: ClassVar[str]
    families: ClassVar[frozenset[str]] = frozenset({"vit"})
    relative_positions: ClassVar[bool] = False
    multi_crop: ClassVar[bool] = False

    name: str


class DecoderSettings(MethodSettings):
    """Settings of a method with MAE's decoder."""

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
