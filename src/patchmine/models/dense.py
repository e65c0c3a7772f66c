"""Heads for semantic segmentation: those on the maps of any encoder's stages, and all by name."""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn

from patchmine.backbones.family import family_of, stage_widths
from patchmine.backbones.record import Encoder
from patchmine.backbones.tokens import refuse_unfilled
from patchmine.errors import UserError, shown_name
from patchmine.models.dpt import DptHead
from patchmine.models.droppath import ChannelDropout
from patchmine.models.eomt import EomtHead
from patchmine.models.processes import num_processes
from patchmine.models.rescale import Rescale
from patchmine.models.segment_head import (
    SCALES,
    SegmentHead,
    Stages,
    conv_norm_relu,
    initialise_convolution,
    new_classifier,
)


class LinearHead(SegmentHead):
    """Batch norm and one matrix on the last map: DINOv2's linear head (arXiv 2304.07193)."""

    depths = (1.0,)

    def __init__(self, stages: Stages, num_classes: int, width: int | None = None) -> None:
        super().__init__()
        if width is not None:
            raise UserError(f"width={width} is not for head=linear, which has no hidden layer")
        self.stages = stages.names
        self.norm = nn.BatchNorm2d(stages.widths[-1])
        self.classifier = new_classifier(stages.widths[-1], num_classes)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, K, h, w), as fine as the map."""
        return self.classifier(self.norm(maps[-1]))


class FcnHead(nn.Module):
    """One convolution 3x3 and the classifier (arXiv 1411.4038), the usual auxiliary head."""

    def __init__(self, channels: int, num_classes: int, width: int = 256) -> None:
        super().__init__()
        self.body = conv_norm_relu(channels, width)
        self.dropout = ChannelDropout(width, 0.1)
        self.classifier = new_classifier(width, num_classes)
        self.body.apply(initialise_convolution)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, K, h, w)."""
        return self.classifier(self.dropout(self.body(x)))


class UperNetHead(SegmentHead):
    """UPerNet (arXiv 1807.10221) by segmentation-models-pytorch, on four levels.

    Of a transformer the maps after a third, a half, two thirds and all of the blocks (4, 6, 8 and
    12 of 12) are made 4, 2, 1 and 1/2 times as fine; the four stages of others are levels
    already.

    ``width`` is that of the decoder; None: twice the first map's channels, but no more than 768 or
    what the first map has.  That gives the published 768 for a ViT-B, 1024 for a ViT-L, 512 for a
    ResNet-50 and 128 for a ResNet-18.
    """

    depths = (1 / 3, 1 / 2, 2 / 3, 1.0)

    def __init__(self, stages: Stages, num_classes: int, width: int | None = None) -> None:
        super().__init__()
        decoder = _upernet_decoder()
        first = stages.widths[0]
        width = width or min(2 * first, max(768, first))
        self.stages = stages.names
        self.neck = nn.ModuleList(
            nn.Identity()
            if stages.shrinking
            else Rescale([channels] * 3, scale, norm=nn.BatchNorm2d)
            for channels, scale in zip(stages.widths, SCALES, strict=True)
        )
        # It passes over two finer levels, which it is told of and never takes.
        self.decoder = decoder([0, 0, *stages.widths], encoder_depth=5, decoder_channels=width)
        self.dropout = ChannelDropout(width, 0.1)
        self.classifier = new_classifier(width, num_classes)
        self.fcn = FcnHead(stages.widths[2], num_classes, min(256, width))
        self.decoder.apply(initialise_convolution)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, K, h, w), four times as fine as a transformer's map, as fine as a first stage's."""
        if self.training and maps[0].shape[0] == 1 and num_processes() == 1:
            raise UserError(
                "head=upernet has batch norms over whole images, which one image cannot be "
                "compared in: set batch_size=2 or more for each step and process"
            )
        levels = [level(one) for level, one in zip(self.neck, maps, strict=True)]
        return self.classifier(self.dropout(self.decoder([None, None, *levels])))

    def auxiliary(self, maps: list[Tensor]) -> Tensor:
        """(B, K, h, w) of the third map."""
        return self.fcn(maps[2])


def _upernet_decoder() -> type[nn.Module]:
    """The decoder's class; UserError where its library is not installed."""
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        raise UserError(
            "head=upernet needs segmentation-models-pytorch, which this Python lacks: run "
            '`pip install "patchmine[seg]"`, or choose head=dpt or head=linear'
        )
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return UPerNetDecoder


HEADS: dict[str, type[LinearHead | UperNetHead | DptHead]] = {
    "linear": LinearHead,
    "upernet": UperNetHead,
    "dpt": DptHead,
}


def build_head(
    name: str,
    encoder: Encoder,
    num_classes: int,
    size: tuple[int, int],
    width: int | None = None,
    queries: int | None = None,
    query_blocks: int | None = None,
) -> SegmentHead | EomtHead:
    """A head for semantic segmentation, freshly drawn.

    Args:
        name: ``linear``, ``upernet``, ``dpt`` or ``eomt``.
        encoder: of images, of any family.
        num_classes: K, the channels of the logits.
        size: (height, width) in pixels of the images to come; the head itself takes others too.
        width: of its hidden layers; None is the head's own (see the classes).
        queries: of `EomtHead`, which alone has any.
        query_blocks: of `EomtHead`, too.

    Returns:
        The head.  Of one on maps ``stages`` are to be asked of `stage_features`.

    Raises:
        UserError: no such head; a library is missing; an encoder of videos, one that does not
            take images of ``size``, or one that the head does not fit.
    """
    if name not in (*HEADS, "eomt"):
        raise UserError(f"head={name} is none of the heads: choose among {', '.join(HEADS)}, eomt")
    _refuse_size(encoder, size)
    if name == "eomt":
        return EomtHead(encoder, num_classes, queries, query_blocks)
    family, kind = family_of(encoder), HEADS[name]
    every = list(family.stages(encoder))
    # Rounded half up: of 4 blocks a third and two thirds are 1 and 3.
    names = [every[max(1, int(len(every) * share + 0.5)) - 1] for share in kind.depths]
    stages = Stages(names, stage_widths(encoder, names), shrinking=family.hierarchical)
    return kind(stages, num_classes, width)


def _refuse_size(encoder: Encoder, size: tuple[int, int]) -> None:
    """UserError for an encoder that makes no maps of images of that size."""
    family = family_of(encoder)
    model = shown_name(encoder.built_from.model)
    if family.clip(encoder) is not None:
        raise UserError(
            f"model={model} reads videos, and a map of classes is of one image: choose an image "
            "model such as vit_small_patch16_224"
        )
    if not hasattr(encoder, "patch_embed"):
        return
    refuse_unfilled(size, encoder.patch_embed.patch_size, f"model={model}")
    own = family.image_size(encoder)
    if family.relative_positions(encoder) and own != size:
        raise UserError(
            f"image_size={size[0]}x{size[1]}, but model={model} has relative positions for "
            f"{own[0]}x{own[1]} pixels and takes no others: open it at image_size="
            f"{size[0]}x{size[1]}"
        )
