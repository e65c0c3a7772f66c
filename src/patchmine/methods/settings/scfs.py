"""Settings of SCFS."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from patchmine.models.settings import DistillationSettings
from patchmine.strict import LARGEST_BATCH, Count


class ScfsSettings(DistillationSettings):
    """Local crops search the teacher's map of a global crop and learn from what they find.

    Song et al., ICCV 2023, arXiv 2212.06486.  The defaults are the published ones for a ResNet-50.
    """

    implementation: ClassVar[str] = "patchmine.methods.scfs:SCFS"
    families: ClassVar[frozenset[str]] = frozenset(
        {"vit", "beit", "eva", "resnet", "convnext", "swin", "swinv2"}
    )
    relative_positions: ClassVar[bool] = True
    multi_crop: ClassVar[bool] = True
    name: Literal["scfs"] = "scfs"
    stages: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="stages that are searched; null: the last three, as layer2 to layer4 of a "
        "ResNet, or three blocks of a ViT",
    )
    stage_weights: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = Field(
        1.0,
        description="weight of the stages, one number or one a stage; 0 leaves a stage out, all "
        "0 is DINO",
    )
    stage_global_weight: float = Field(
        0.5, ge=0, description="weight of a stage's loss between global crops"
    )
    stage_search_weight: float = Field(
        0.5, ge=0, description="weight of a stage's loss of local crops"
    )
    stage_out_dim: int = Field(
        256, gt=1, le=LARGEST_BATCH, description="outputs of the stages' heads"
    )
    stage_hidden: Count = Field(2048, description="hidden width of the stages' heads")
    stage_bottleneck: Count = Field(256, description="channels within the stages' heads")
    teacher_temp_warmup_epochs: int = Field(50, ge=0, description="epochs until teacher_temp_end")
    optimizer: Literal["auto", "sgd", "lars", "adamw"] = Field(
        "auto",
        description="auto: SGD with momentum for a ResNet, AdamW for others; set blr to suit it",
    )
