"""ResNets of timm's: a stem for small images, how they start, their names read off tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.resnet import ResNet
from torch import Tensor, nn

from patchmine.backbones import vit
from patchmine.backbones.record import Blueprint, Encoder, Family, StageFeatures
from patchmine.backbones.stages import (
    last_step,
    no_blocks,
    note_image_size,
    noted_image_size,
    renote_image_size,
    stage_channels,
)
from patchmine.data.items import IMAGE
from patchmine.errors import UserError, shown_name

STAGES = ("layer1", "layer2", "layer3", "layer4")
# By blocks in each stage, and whether they are bottlenecks (three convolutions).
_PLAIN: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((2, 2, 2, 2), True): "resnet26",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def create(architecture: str, arguments: Mapping[str, Any]) -> Encoder:
    """timm's network; ``cifar_stem`` exchanges its stem (`use_cifar_stem`)."""
    arguments = dict(arguments)
    small = arguments.pop("cifar_stem", False)
    size = arguments.pop("img_size", None)
    encoder = vit.create(architecture, arguments)
    if small:
        use_cifar_stem(encoder)
    return note_image_size(encoder, size, arguments.get("in_chans", 3))


def build(blueprint: Blueprint) -> Encoder:
    """A ResNet without classifier, for images of any size."""
    if blueprint.patch_size is not None:
        raise UserError(
            f"patch_size={blueprint.patch_size}, but model={shown_name(blueprint.model)} has no "
            "patches: leave the setting out"
        )
    usual = {"num_classes": 0, "zero_init_last": False}
    encoder = create(blueprint.architecture, usual | blueprint.arguments())
    encoder.reset_classifier(0, "avg")
    return encoder


def use_cifar_stem(encoder: Encoder) -> None:
    """For images of 32 pixels: a 3x3 convolution of stride 1, no max-pooling (arXiv 2002.05709)."""
    old = getattr(encoder, "conv1", None)
    if type(old) is not nn.Conv2d:
        raise ValueError(
            "cifar_stem=true is for ResNets that begin with one convolution, such as resnet18"
        )
    first = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        3,
        padding=1,
        bias=False,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    encoder.conv1 = first
    encoder.maxpool = nn.Identity()
    for stage in encoder.feature_info:
        stage["reduction"] = max(1, stage["reduction"] // 4)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")


def has_cifar_stem(encoder: Encoder) -> bool:
    """Whether `use_cifar_stem` was applied, so that timm by itself cannot build this network."""
    return isinstance(encoder.maxpool, nn.Identity)


def initialise_resnet(encoder: Encoder) -> None:
    """Fresh convolutions in place, normal by fan-out: torchvision's rule, as MOKD and SCFS have."""
    # Norms keep gain 1; timm's own default, zero for the last one of a block, is another.
    encoder.init_weights(zero_init_last=False)


def stages(encoder: Encoder) -> dict[str, int]:
    """``layer1`` to ``layer4``, each with its channels."""
    widths = stage_channels(encoder)
    return {stage: widths[stage] for stage in STAGES}


def features(encoder: Encoder, images: Tensor, stages: Sequence[str]) -> StageFeatures:
    """Maps are the outputs of ``stages``, ``pooled`` is the mean over the map of layer4."""
    x = encoder.maxpool(encoder.act1(encoder.bn1(encoder.conv1(images))))
    maps: dict[str, Tensor] = {}
    for stage in STAGES:
        x = maps[stage] = getattr(encoder, stage)(x)
    return StageFeatures(x.mean(dim=(2, 3)), [maps[stage] for stage in stages])


def map_size(encoder: Encoder) -> tuple[int, int]:
    """(rows, columns) of the last map of such an image."""
    step, (height, width) = last_step(encoder), noted_image_size(encoder)
    return -(-height // step), -(-width // step)


def is_resnet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict names the stem and the stages of a ResNet."""
    return "conv1.weight" in tensors and any(name.startswith("layer4.0.") for name in tensors)


def infer_resnet(tensors: Mapping[str, Tensor], source: str, **_: Any) -> Blueprint:
    """The plain ResNet whose tensors these are, or UserError."""
    places = {tuple(name.split(".")[:2]) for name in tensors if name.startswith(STAGES)}
    depths = tuple(sum(stage == place[0] for place in places) for stage in STAGES)
    found = _PLAIN.get((depths, "layer1.0.conv3.weight" in tensors))
    stem = tensors["conv1.weight"]
    if found is None or stem.ndim != 4:
        raise UserError(
            f"{source} holds a ResNet with {depths} blocks in its stages, which is none of "
            f"{', '.join(_PLAIN.values())}: give patchmine.load_encoder its name, model=..."
        )
    own = {"cifar_stem": True} if stem.shape[-1] == 3 else {}
    return Blueprint(found, channels=stem.shape[1], model_args=own)


RESNET = Family(
    name="resnet",
    module=ResNet,
    timm_modules=frozenset({"resnet"}),
    item=IMAGE,
    hierarchical=True,
    convolutional=True,
    batch_normed=True,
    why_whole="a ResNet does not have",
    create=create,
    build=build,
    initialise=initialise_resnet,
    stages=stages,
    features=features,
    image_size=noted_image_size,
    map_size=map_size,
    smallest_side=lambda _: 1,
    enter_blocks=no_blocks,
    export_arguments=lambda encoder: {"global_pool": encoder.global_pool.pool_type},
    resize=renote_image_size,
    classifier="fc",
    recognises=is_resnet,
    infer=infer_resnet,
    timm_opens=lambda encoder: not has_cifar_stem(encoder),
)
