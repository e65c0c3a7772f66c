"""DPT's head for dense predictions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.models.droppath import ChannelDropout
from patchmine.models.segment_head import (
    SCALES,
    SegmentHead,
    Stages,
    conv_norm_relu,
    initialise_convolution,
    new_classifier,
)


class DptHead(SegmentHead):
    """DPT's head (arXiv 2103.13413) on the maps after each quarter of the blocks.

    Every map is made 4, 2, 1 or 1/2 times as fine, then the coarsest is refined by one after the
    other.  The class token is left out (the paper's readout "ignore"), so that all encoders have
    the same head.

    ``width`` is that of the refining part; None: the published 256.
    """

    depths = (1 / 4, 1 / 2, 3 / 4, 1.0)

    def __init__(self, stages: Stages, num_classes: int, width: int | None = None) -> None:
        super().__init__()
        width = width or 256
        self.stages = stages.names
        self.levels = nn.ModuleList(
            _Reassemble(channels, width, 1.0 if stages.shrinking else scale)
            for channels, scale in zip(stages.widths, SCALES, strict=True)
        )
        self.fusions = nn.ModuleList(
            _Fusion(width, joins=number < 3) for number in range(len(stages.widths))
        )
        self.body = conv_norm_relu(width, width)
        self.dropout = ChannelDropout(width, 0.1)
        self.classifier = new_classifier(width, num_classes)
        for part in (self.levels, self.fusions, self.body):
            part.apply(initialise_convolution)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, K, h, w), eight times as fine as a transformer's map, or as the images."""
        levels = [level(one) for level, one in zip(self.levels, maps, strict=True)]
        # Each refined map is as fine as the next level; the last one twice as fine as its own.
        height, width = levels[0].shape[2:]
        sizes = [(min(2 * height, size[0]), min(2 * width, size[1]))]
        sizes += [(level.shape[2], level.shape[3]) for level in levels[:-1]]
        refined: Tensor | None = None
        for number in reversed(range(len(levels))):
            refined = self.fusions[number](levels[number], refined, sizes[number])
        return self.classifier(self.dropout(self.body(refined)))


class _Reassemble(nn.Module):
    """A map of an encoder as one of DPT's levels: ``scale`` times as fine, ``width`` wide."""

    def __init__(self, channels: int, width: int, scale: float) -> None:
        super().__init__()
        inner = max(1, int(channels / (2 * scale)))  # 96, 192, 384 and 768 of a ViT-B
        resize: nn.Module = nn.Identity()
        if scale > 1:
            resize = nn.ConvTranspose2d(inner, inner, int(scale), stride=int(scale))
        elif scale < 1:
            resize = nn.Conv2d(inner, inner, 3, stride=int(1 / scale), padding=1)
        self.project = nn.Conv2d(channels, inner, 1)
        self.resize = resize
        self.out = nn.Conv2d(inner, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, scale * h, scale * w)."""
        return self.out(self.resize(self.project(x)))


class _Fusion(nn.Module):
    """RefineNet's block (arXiv 1611.06612): a level joins what is refined so far."""

    def __init__(self, width: int, *, joins: bool) -> None:
        super().__init__()
        self.level = _ResidualUnit(width) if joins else nn.Identity()
        self.unit = _ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, level: Tensor, refined: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Two maps (B, C, h, w), the second None for the coarsest level -> (B, C, *size)."""
        x = level if refined is None else self.level(level) + refined
        x = self.out(self.unit(x))  # a 1x1 convolution commutes with the resizing
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class _ResidualUnit(nn.Module):
    """Two convolutions 3x3 beside an identity, activation first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return x + self.body(x)
