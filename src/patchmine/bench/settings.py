"""Settings of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from patchmine.data.settings import Crops
from patchmine.strict import Arguments, BatchSize, Count, Device, Side, Strict, Text


class BenchStepSettings(Strict):
    """Time whole training steps.

    Prints ms and samples/s, peak memory, and the share of the machine's matrix-multiply rate.

    Example:
        patchmine bench step method=mae,hpm
    """

    method: str | list[str] | dict[str, Any] = Field(
        "mae", description="one method, or several as mae,hpm; method.KEY=VALUE is for all of them"
    )
    model: str = Field(
        "vit_small_patch16_224",
        description="a ViT, ResNet, ConvNeXt or Swin of timm's, or of clips",
    )
    model_args: Arguments = Field({}, description="extra arguments for timm, such as depth")
    image_size: Side | tuple[Side, Side] = Field(224, description="pixels, or [height, width]")
    patch_size: Side | None = Field(None, description="side of a patch; null: the model's own")
    channels: Count = Field(3, description="channels of the images")
    frames: Count = Field(16, description="frames of a clip, of a video model")
    tubelet: Count = Field(2, description="frames in a tubelet, of a video model")
    batch_size: BatchSize = Field(16, description="images or clips in one step")
    crops: Crops = Field(Crops(), description="of methods with several crops of each image")
    device: Device = Field("auto", description="auto: cuda where there is one")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 on a GPU, fp32 on a CPU"
    )
    rounds: Count = Field(10, description="rounds in which every contestant takes its turn")
    profile: bool = Field(False, description="tell where the time goes, by kind of operator")
    out: Path | None = Field(None, description="JSON file for the result")


class BenchDataSettings(Strict):
    """Time how a worker makes training crops, or clips.

    One thread, as in a worker; flips, colours and normalisation are the device's in training.

    Example:
        patchmine bench data data=photos.tar
        patchmine bench data data=clips/ video=true
    """

    data: Text = Field(description="name the images, as in data=photos/")
    image_size: Side = Field(224, description="side of the crops, in pixels")
    repeats: Count = Field(5, description="times that all images are read")
    video: bool = Field(False, description="these are videos: time the reading of clips")
    frames: Count = Field(16, description="of a clip, where these are videos")
    stride: Count = Field(4, description="a clip takes every such frame of a video")
