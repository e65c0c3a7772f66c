"""Settings of the network that is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from patchmine.data.settings import InputSettings
from patchmine.strict import OF_A_MACHINE, Arguments, SettingError, Side, Text


class ModelSettings(InputSettings):
    """The encoder, and the images that it is built for."""

    model: str = Field(
        "vit_small_patch16_224",
        description="a plain ViT, ResNet, ConvNeXt or Swin of timm's, or a video model",
    )
    model_args: Arguments = Field({}, description="more arguments for timm: depth, embed_dim, ...")
    patch_size: Side | None = Field(None, description="pixels; null: the model's own")
    init: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="file, run or export to start from"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """An image size that patches do not fill."""
        yield from self.unfilled("image_size", self.image_size)

    def unfilled(self, name: str, sides: Sequence[int]) -> Iterator[SettingError]:
        """The error of a size that the model's patches do not fill, where its name tells them."""
        in_name = re.search(r"patch(\d+)", self.model)
        step = self.patch_size or (int(in_name[1]) if in_name else None)
        if step is None or "patch_size" in self.model_args:
            return
        if any(side % step for side in sides):
            near = [max(step, round(side / step) * step) for side in sides]
            size = str(near[0]) if len(set(near)) == 1 else f"[{near[0]},{near[1]}]"
            source = "patch_size" if self.patch_size else f"model {self.model}"
            must = f"must be a multiple of {step}, the patch of {source}: try {name}={size}"
            yield SettingError(name, f"given {'x'.join(map(str, sides))}; {must}")
