"""From a name and arguments to a network, whoever gives them: timm's, or ours for clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.models.beit import Beit
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer

from patchmine.backbones.resnet import create
from patchmine.backbones.video import create_video, is_video
from patchmine.backbones.vit import Encoder
from patchmine.errors import UserError


def network(architecture: str, arguments: Mapping[str, Any]) -> Any:
    """What the name and the arguments describe, without classifier: timm's, or ours for clips."""
    if is_video(architecture):
        return create_video(architecture, **arguments)
    return create(architecture, **{**arguments, "num_classes": 0})


def create_encoder(model: str, arguments: dict[str, Any], source: str) -> Encoder:
    """A plain or BEiT-style ViT, one of clips, or a ResNet of timm's, as ``source`` describes it.

    Nothing is downloaded.  Raises UserError where that cannot be built, or is something else.
    """
    if not is_video(model) and not timm.is_model(model):
        raise UserError(
            f"{source}: timm {timm.__version__} knows no architecture {model!r}; a newer timm may"
        )
    try:
        encoder = network(model, arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        shown = {name: value for name, value in arguments.items() if name != "device"}
        raise UserError(f"{source}: timm cannot build {model} with {shown} ({error})") from error
    if not isinstance(encoder, VisionTransformer | Beit | ResNet):
        raise UserError(
            f"{source}: {model} is a {type(encoder).__name__}, not a plain vision transformer or ResNet"
        )
    return encoder
