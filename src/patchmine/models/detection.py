"""Faster and Mask R-CNN: torchvision's parts behind the maps of a pyramid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from patchmine.models.pyramid import StagesBackbone, TransformerBackbone
from patchmine.types import Losses, Objects

Backbone = TransformerBackbone | StagesBackbone
Maps = dict[str, Tensor]

_RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
_MAPS = ["0", "1", "2", "3"]  # that boxes are cut from; proposals are made on the coarsest, too
_BOX, _MASK = 7, 14  # cells along a side of what is cut out
_IN_CROWD = 0.5  # share of a box inside a crowd from which on it is no negative
_TERMS = {
    "loss_objectness": "proposal",
    "loss_rpn_box_reg": "proposal_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}
"""torchvision's names of losses, and those in the log."""


@dataclass(frozen=True)
class Found:
    """The objects found in one view, the surest first.

    ``boxes`` (N, 4) (left, top, right, bottom) in pixels of the view, ``labels`` (N,) from 0,
    ``scores`` (N,); ``masks`` (N, 1, m, m): probabilities inside each box, None without masks.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None


class _Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, for which anchors inside of crowds are no negatives."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        crowds = [target["crowds"] for target in targets]
        return _without_crowds(labels, anchors, crowds), boxes


class _Heads(RoIHeads):  # type: ignore[misc]
    """torchvision's, for which proposals inside of crowds are no negatives."""

    crowds: Sequence[Tensor] = ()

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> Any:
        self.crowds = [target["crowds"] for target in targets]
        return super().select_training_samples(proposals, targets)

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        return matched, _without_crowds(labels, proposals, self.crowds)


class DetectHead(nn.Module):
    """All that finds objects on an encoder's maps: the pyramid, proposals, boxes, masks.

    Args:
        backbone: its pyramid becomes a part of this; its encoder does not.
        num_classes: without the background.
        masks: whether masks are found, too.
        kind: "fpn": torchvision's heads for feature pyramids; "vitdet": two convolutions in front
            of proposals, four with layer norm and a linear layer in front of boxes.
        anchor_scale: size of anchors in strides of their map.
        proposals: of an image, that boxes are looked for in.
        samples: of these, that boxes are learned from.
        score_threshold: surest class below which nothing is found.
        nms: overlap (IoU) from which on the less sure of two boxes of a class is dropped.
        most: objects found in one image.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        masks: bool = False,
        kind: Literal["fpn", "vitdet"] = "fpn",
        anchor_scale: float = 8,
        proposals: int = 1000,
        samples: int = 512,
        score_threshold: float = 0.05,
        nms: float = 0.5,
        most: int = 100,
    ) -> None:
        super().__init__()
        self.neck = backbone.neck
        width, as_vitdet = backbone.out_channels, kind == "vitdet"
        sizes = tuple((stride * anchor_scale,) for stride in backbone.strides)
        self.proposals = _Proposals(
            AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
            RPNHead(width, len(_RATIOS), conv_depth=2 if as_vitdet else 1),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        box_head = _vitdet_box_head(width) if as_vitdet else TwoMLPHead(width * _BOX**2, 4 * width)
        self.objects = _Heads(
            MultiScaleRoIAlign(_MAPS, _BOX, sampling_ratio=2),
            box_head,
            FastRCNNPredictor(4 * width, 1 + num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=nms,
            detections_per_img=most,
        )
        if masks:
            norm = LayerNorm2d if as_vitdet else None
            self.objects.mask_roi_pool = MultiScaleRoIAlign(_MAPS, _MASK, sampling_ratio=2)
            self.objects.mask_head = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm)
            self.objects.mask_predictor = MaskRCNNPredictor(width, width, 1 + num_classes)

    def limit(self, score_threshold: float, most: int) -> None:
        """Find, from now on, only what is surer than this, and at most so much in an image."""
        self.objects.score_thresh, self.objects.detections_per_img = score_threshold, most

    def losses(
        self, images: Tensor, maps: Maps, targets: Sequence[Objects], seeds: Sequence[int]
    ) -> Losses:
        """What torchvision says of each image by itself, and then the mean over images.

        So a batch may be divided among processes.

        Args:
            images: (B, C, H, W).
            maps: of the pyramid, (B, width, h, w) each.
            targets: B objects of these images.
            seeds: B numbers that decide which anchors and proposals are learned from.
        """
        rows: list[Losses] = []
        for number, (objects, seed) in enumerate(zip(targets, seeds, strict=True)):
            row = slice(number, number + 1)
            own = {name: one[row] for name, one in maps.items()}
            with _seeded(seed, images.device):
                rows.append(self._losses_of(images[row], own, objects))
        return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}

    def _losses_of(self, image: Tensor, maps: Maps, objects: Objects) -> Losses:
        """Of one image."""
        size = (image.shape[-2], image.shape[-1])
        real = objects.chosen(~objects.crowd)
        target = {"boxes": real.boxes, "labels": 1 + real.labels}  # 0 is the background
        target["crowds"] = objects.boxes[objects.crowd]
        if real.masks is not None:
            target["masks"] = real.masks
        boxes, first = self.proposals(ImageList(image, [size]), maps, [target])
        _, second = self.objects(maps, boxes, [size], [target])
        return {_TERMS[name]: loss for name, loss in (first | second).items()}

    def find(self, images: Tensor, maps: Maps) -> list[Found]:
        """The objects of B images, in evaluation mode."""
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        boxes, _ = self.proposals(ImageList(images, sizes), maps)
        every, _ = self.objects(maps, boxes, sizes)
        return [
            Found(one["boxes"], one["labels"] - 1, one["scores"].float(), one.get("masks"))
            for one in every
        ]


def _vitdet_box_head(width: int) -> nn.Module:
    """Four convolutions with layer norm and one linear layer."""
    convolutions, size = [width] * 4, (width, _BOX, _BOX)
    head = FastRCNNConvFCHead(size, convolutions, [4 * width], norm_layer=LayerNorm2d)
    for module in head.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which not every linear layer allows behind it
    return head


def _without_crowds(
    labels: list[Tensor], boxes: Sequence[Tensor], crowds: Sequence[Tensor]
) -> list[Tensor]:
    """Labels by image, -1 (not learned from) instead of 0 (background) inside of crowds."""
    return [
        _ignored(label, each, crowd) if len(crowd) else label
        for label, each, crowd in zip(labels, boxes, crowds, strict=True)
    ]


def _ignored(labels: Tensor, boxes: Tensor, crowds: Tensor) -> Tensor:
    corner = torch.maximum(boxes[:, None, :2], crowds[:, :2])
    opposite = torch.minimum(boxes[:, None, 2:], crowds[:, 2:])
    shared = (opposite - corner).clamp_min(0).prod(2)  # (N, crowds)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    inside = (shared > _IN_CROWD * area[:, None]).any(1)
    left = torch.where(inside & (labels == 0), -1, labels)
    # Where a crowd is all that there is, torchvision would take the mean of nothing.
    return torch.where((left >= 0).any(), left, labels)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Around what draws from torch's own generators, which are put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
