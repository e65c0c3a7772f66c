"""What heads for semantic segmentation have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones.family import stage_features
from patchmine.backbones.record import Encoder

SCALES = (4.0, 2.0, 1.0, 0.5)  # of the levels that equally fine maps are made into


@dataclass(frozen=True)
class Stages:
    """The stages that a head reads.

    Args:
        names: of `Family.stages`.
        widths: channels of each stage's map.
        shrinking: whether each map has half the side of the one before, as those of a ResNet have;
            those of a plain transformer are equally fine.
    """

    names: list[str]
    widths: list[int]
    shrinking: bool


class SegmentHead(nn.Module):
    """What a head on maps has: logits of all classes from the maps of ``stages``, in that order.

    ``depths`` says where it reads: after so large shares of the encoder's stages.
    """

    depths: ClassVar[tuple[float, ...]]
    stages: list[str]

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, K, h, w), no finer than the images, which are of ``size`` = (height, width)."""
        raise NotImplementedError

    def auxiliary(self, maps: list[Tensor]) -> Tensor | None:
        """Logits (B, K, h, w) of a second head, which helps in training only; None without."""
        return None

    def scores(self, encoder: Encoder, images: Tensor) -> Tensor:
        """(B, K, H, W) before softmax, of images (B, C, H, W)."""
        size = (images.shape[2], images.shape[3])
        maps = stage_features(encoder, images, self.stages).maps
        return enlarged(self(maps, size), size)


def enlarged(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h, w) -> (B, K, *size)."""
    if scores.shape[2:] == size:
        return scores
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def conv_norm_relu(channels: int, width: int) -> nn.Sequential:
    """A convolution 3x3, a batch norm and a ReLU."""
    conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def new_classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """A matrix at every place, drawn as mmsegmentation draws it."""
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)
    return classifier


def initialise_convolution(part: nn.Module) -> None:
    """First weights of a convolution that a ReLU follows, in place (arXiv 1502.01852)."""
    if isinstance(part, nn.Conv2d):
        nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        if part.bias is not None:
            nn.init.zeros_(part.bias)
