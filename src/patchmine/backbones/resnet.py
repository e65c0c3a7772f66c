"""What is special about a ResNet of timm's: a stem for small images, how it starts, its name read
off its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import is_model_in_modules
from timm.models.resnet import ResNet
from torch import Tensor, nn

from patchmine.errors import UserError, foreign_parser

# Arguments of timm's create_model that a description of a network, which may be a stranger's, has
# no business with.
_READING = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}
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


def names_resnet(architecture: str) -> bool:
    """Whether timm's ``architecture`` (no prefix, no tag) is built by its ``resnet`` module."""
    return is_model_in_modules(architecture, {"resnet"})


def create(
    architecture: str, *, cifar_stem: bool = False, norm_eps: float | None = None, **arguments: Any
) -> nn.Module:
    """timm's ``architecture`` without stored weights.

    Two arguments are not timm's: ``cifar_stem`` (`use_cifar_stem`), and ``norm_eps``, which every
    layer norm gets.

    Raises ValueError with what timm says of arguments that do not fit, for those that would make it
    read or download files, and for a stem that cannot be exchanged.
    """
    if reading := _READING & arguments.keys():
        raise ValueError(
            f"{', '.join(sorted(reading))} would make timm read or download other weights"
        )
    with foreign_parser(ValueError):
        encoder = timm.create_model(architecture, pretrained=False, **arguments)
    if cifar_stem:
        use_cifar_stem(encoder)
    if norm_eps is not None:
        for norm in encoder.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.eps = norm_eps
    return encoder


def use_cifar_stem(encoder: nn.Module) -> None:
    """In place, for images of 32 pixels: the first convolution is 3x3 and skips no pixel, and
    nothing is max-pooled.

    The last map of a 32x32 image is then 4x4 instead of 1x1 (SimCLR, arXiv 2002.05709, appendix
    B.9).  The new weights are drawn like all others, `initialise_resnet`.
    """
    old = getattr(encoder, "conv1", None)
    if not isinstance(encoder, ResNet) or type(old) is not nn.Conv2d:
        raise ValueError(
            "cifar_stem=true is for ResNets that begin with one convolution, such as resnet18"
        )
    encoder.conv1 = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        3,
        padding=1,
        bias=False,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    encoder.maxpool = nn.Identity()
    for stage in encoder.feature_info:
        stage["reduction"] = max(1, stage["reduction"] // 4)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")


def has_cifar_stem(encoder: nn.Module) -> bool:
    """Whether `use_cifar_stem` was applied, so that timm by itself cannot build this network."""
    return isinstance(encoder, ResNet) and isinstance(encoder.maxpool, nn.Identity)


def initialise_resnet(encoder: ResNet) -> None:
    """Fresh convolutions in place, normal by fan-out: torchvision's rule, which MOKD and SCFS start
    from.

    Norms are left as they are made, with gain 1: timm's own default, zero for the last one of each
    block, is another.
    """
    encoder.init_weights(zero_init_last=False)


def is_resnet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict names the stem and the stages of a ResNet."""
    return "conv1.weight" in tensors and any(name.startswith("layer4.0.") for name in tensors)


def infer_resnet(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Any]]:
    """(timm's name, its arguments) of the plain ResNet whose tensors these are.

    Raises UserError where blocks are counted that no plain ResNet has; widths are left for loading
    to compare.
    """
    places = {tuple(name.split(".")[:2]) for name in tensors if name.startswith(STAGES)}
    depths = tuple(sum(stage == place[0] for place in places) for stage in STAGES)
    found = _PLAIN.get((depths, "layer1.0.conv3.weight" in tensors))
    stem = tensors["conv1.weight"]
    if found is None or stem.ndim != 4:
        raise UserError(
            f"{source} holds a ResNet with {depths} blocks in its stages, which is none of "
            f"{', '.join(_PLAIN.values())}: give patchmine.load_encoder its name, model=..."
        )
    arguments: dict[str, Any] = {"in_chans": stem.shape[1]}
    return found, arguments | ({"cifar_stem": True} if stem.shape[-1] == 3 else {})
