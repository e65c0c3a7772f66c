"""Settings of MOKD."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import DistillationSettings
from patchmine.strict import Arguments, Count, Depth


class MokdSettings(DistillationSettings):
    """Two networks, each with an EMA teacher, that also learn from each other's teacher.

    Song et al., CVPR 2023, arXiv 2304.06461.  The defaults are the published ones, for a ResNet-50
    beside a ViT-S/16.
    """

    implementation: ClassVar[str] = "patchmine.methods.mokd:MOKD"
    families: ClassVar[frozenset[str]] = frozenset(
        {"vit", "beit", "eva", "resnet", "convnext", "swin", "swinv2"}
    )
    relative_positions: ClassVar[bool] = True
    multi_crop: ClassVar[bool] = True
    name: Literal["mokd"] = "mokd"
    partner_model: str = Field(
        "resnet50", description="the second network, one of timm's, of any kind that model may be"
    )
    partner_args: Arguments = Field(
        {}, description="its arguments, as model_args are the first one's"
    )
    cross_weight: float | None = Field(
        None,
        ge=0,
        description="weight of what model learns from the partner; null: 1 for a ResNet or "
        "ConvNeXt, 0.1 for a ViT or Swin",
    )
    partner_cross_weight: float | None = Field(
        None,
        ge=0,
        description="weight of what the partner learns from model; null: as for cross_weight",
    )
    thead_width: Count | None = Field(
        None, description="width of the transformer heads; null: a ViT's own, 384 without a ViT"
    )
    thead_depth: Depth = Field(3, description="blocks of the transformer heads")
    thead_heads: Count = Field(6, description="attention heads of the transformer heads")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth of a student's last block; a ResNet has none"
    )
    cnn_temp_warmup_epochs: int = Field(
        50,
        ge=0,
        description="epochs until teacher_temp_end, for the own teacher of a ResNet or ConvNeXt",
    )
    vit_temp_warmup_epochs: int = Field(
        30, ge=0, description="the same for that of a ViT or Swin, and between the networks"
    )
    weight_decay_end: float | None = Field(
        0.4,
        ge=0,
        description="AdamW's at the end, by half a cosine from weight_decay; null: it stays",
    )
    sgd_blr: float = Field(
        0.1, gt=0, description="a ResNet's learning rate for 256 images; blr is AdamW's"
    )
    sgd_min_lr: float = Field(
        0.0048, ge=0, description="a ResNet's learning rate at the end; min_lr is AdamW's"
    )
    sgd_weight_decay: float = Field(1e-4, ge=0, description="a ResNet's, constant")
    cnn_thead_optimizer: Literal["sgd", "adamw"] = Field(
        "sgd",
        description="of a ResNet's transformer head: SGD at AdamW's rates, as in the code; or "
        "AdamW, ours",
    )
