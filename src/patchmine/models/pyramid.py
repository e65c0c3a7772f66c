"""Backbones of torchvision's detection models: maps of 256 channels, each half as fine as the last.

Of a plain transformer ViTDet's simple feature pyramid (arXiv 2203.16527), of what has stages
torchvision's feature pyramid network; those of a ConvNeXt or a Swin are normed first, as their
authors detect with them (arXiv 2103.14030, 2201.03545, code).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from patchmine.backbones.family import family_of, stage_features, stage_widths
from patchmine.backbones.record import Encoder
from patchmine.errors import UserError, shown_name
from patchmine.models.rescale import Rescale
from patchmine.models.windows import last_of_quarters, refuse_windows, windowed_map


class SimplePyramid(nn.Module):
    """Four maps of one, 4, 2, 1 and 1/2 times as fine, and a fifth that is every second place."""

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        narrowing = [channels, max(1, channels // 2), max(1, channels // 4)]
        self.levels = nn.ModuleList()
        for scale in (4.0, 2.0, 1.0, 0.5):
            rescale = Rescale(narrowing, scale, norm=LayerNorm2d)
            inner = nn.Conv2d(rescale.width, width, 1, bias=False)
            layer = nn.Conv2d(width, width, 3, padding=1, bias=False)
            for convolution in (inner, layer):
                nn.init.kaiming_uniform_(convolution.weight, a=1)  # as torchvision's FPN
            norms = LayerNorm2d(width), LayerNorm2d(width)
            self.levels.append(nn.Sequential(rescale, inner, norms[0], layer, norms[1]))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, h, w) -> ``0`` to ``3``, finest first, and ``pool``, (B, width, ., .) each."""
        maps = OrderedDict((str(number), level(x)) for number, level in enumerate(self.levels))
        maps["pool"] = F.max_pool2d(maps["3"], 1, stride=2)
        return maps


class TransformerBackbone(nn.Module):
    """A plain transformer, most of its blocks kept to windows, and its simple feature pyramid.

    Attributes:
        encoder: as it was given; it stays timm's.
        neck: all the rest that is learned, for `rate_groups`.
        out_channels: of every map.
        strides: pixels from place to place of each map.
    """

    def __init__(
        self, encoder: Encoder, window: int | None, global_blocks: Sequence[int], width: int
    ) -> None:
        super().__init__()
        self.encoder, self.window, self.global_blocks = encoder, window, frozenset(global_blocks)
        self.neck = SimplePyramid(int(encoder.embed_dim), width)
        self.out_channels = width
        patch = encoder.patch_embed.patch_size[0]
        self.strides = [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The maps ``0`` to ``3`` and ``pool`` of images (B, C, H, W)."""
        return self.neck(windowed_map(self.encoder, images, self.window, self.global_blocks))


class NormedPyramid(nn.Module):
    """A layer norm for each stage's maps, and torchvision's feature pyramid network."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(channels) for channels in widths)
        self.pyramid = FeaturePyramidNetwork(list(widths), width, extra_blocks=LastLevelMaxPool())

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        """The stages' maps -> ``0`` to ``3`` and ``pool``, (B, width, ., .) each."""
        normed = zip(self.norms, maps.items(), strict=True)
        return self.pyramid(OrderedDict((name, norm(one)) for norm, (name, one) in normed))


class StagesBackbone(nn.Module):
    """Stages and a feature pyramid network; attributes as `TransformerBackbone`'s."""

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.stages = list(family_of(encoder).stages(encoder))
        widths = stage_widths(encoder, self.stages)
        if family_of(encoder).batch_normed:
            self.neck = FeaturePyramidNetwork(widths, width, extra_blocks=LastLevelMaxPool())
        else:
            self.neck = NormedPyramid(widths, width)
        self.out_channels = width
        steps = {info["module"]: int(info["reduction"]) for info in encoder.feature_info}
        self.strides = [steps[stage] for stage in self.stages]
        self.strides.append(2 * self.strides[-1])

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The maps ``0`` to ``3`` and ``pool`` of images (B, C, H, W)."""
        maps = stage_features(self.encoder, images, self.stages).maps
        return self.neck(OrderedDict((str(number), one) for number, one in enumerate(maps)))


def build_pyramid(
    encoder: Encoder,
    window: int | None = None,
    global_blocks: Sequence[int] | None = None,
    width: int = 256,
) -> TransformerBackbone | StagesBackbone:
    """What a detection model of torchvision's takes as its backbone, its new parts freshly drawn.

    Args:
        encoder: of images, of any family.
        window: patches along each side of the windows that most blocks of a transformer are kept
            to (ViTDet: 14); None: no windows.
        global_blocks: numbers, from 0, of the blocks that see all patches; None: the last of each
            quarter.
        width: channels of every map.

    Returns:
        A module of images (B, C, H, W) with ``out_channels``; strides are a quarter, a half, one
        and two patches, or those of the stages, and for ``pool`` twice the last.

    Raises:
        UserError: an encoder of videos; windows that its blocks cannot have; a patch whose strides
            torchvision would round.
    """
    family, model = family_of(encoder), shown_name(encoder.built_from.model)
    if family.clip(encoder) is not None:
        raise UserError(
            f"model={model} reads videos, and boxes are of one image: choose an image model such "
            "as vit_small_patch16_224"
        )
    if family.hierarchical:
        refuse_windows(encoder, window, ())
        return _of_stages(encoder, width, model)
    patch = encoder.patch_embed.patch_size
    # RoIAlign takes every stride for the nearest power of two; strides begin at a quarter patch.
    if patch[0] != patch[1] or patch[0] < 4 or patch[0] & (patch[0] - 1):
        raise UserError(
            f"model={model} has patches of {patch[0]}x{patch[1]} pixels, and detection reads its "
            "maps at strides that are powers of two: choose a model or patch_size with patches of "
            "4, 8, 16 or 32"
        )
    chosen = last_of_quarters(len(encoder.blocks)) if global_blocks is None else global_blocks
    refuse_windows(encoder, window, chosen)
    return TransformerBackbone(encoder, window, chosen, width)


def _of_stages(encoder: Encoder, width: int, model: str) -> StagesBackbone:
    """UserError for strides that RoIAlign would round."""
    backbone = StagesBackbone(encoder, width)
    if any(stride & (stride - 1) for stride in backbone.strides):
        raise UserError(
            f"model={model} makes maps at strides of {backbone.strides[0]} pixels and its doubles, "
            "and detection reads its maps at powers of two: choose patch_size=4, or 1, 2 or 8"
        )
    return backbone
