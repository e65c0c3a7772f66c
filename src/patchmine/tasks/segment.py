"""Semantic segmentation: the class of every pixel, by a head on or in an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, stage_features
from patchmine.models.adapt import decay_of, hold_statistics, rate_groups, select_trainable
from patchmine.models.dense import build_head
from patchmine.models.droppath import add_drop_paths, draw_drop_paths, draw_dropouts, dropouts_of
from patchmine.models.eomt import EomtHead
from patchmine.models.lora import merged
from patchmine.models.mask_loss import num_candidates, query_losses
from patchmine.models.segment_head import SegmentHead, enlarged
from patchmine.ops.schedules import masked_share
from patchmine.ops.segmentation import dice_losses, focal_losses, pixel_losses
from patchmine.task import Task
from patchmine.tasks.settings import SegmentSettings
from patchmine.types import Batch, Losses, ParamGroup, Progress


class SegmentNetwork(nn.Module):
    """Images (B, C, H, W), normalised, to scores (B, K, H, W) before softmax.

    Args:
        encoder: a network of images.
        head: see `models.dense`.
    """

    def __init__(self, encoder: Encoder, head: SegmentHead | EomtHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, H, W) of images of the size that the encoder was built for."""
        return self.head.scores(self.encoder, images)


class Segment(Task):
    """The class of every pixel.

    Args:
        settings: how, and how far, the backbone moves.
        encoder: the backbone without classifier, built for crops of ``size``.
        names: of the classes.
        size: (height, width) of crops in pixels.
        weights: (K,) how much a pixel of each class counts; None: all the same.
    """

    uses_targets: ClassVar[bool] = True
    weights: Tensor

    def __init__(
        self,
        settings: SegmentSettings,
        encoder: Encoder,
        names: Sequence[str],
        size: tuple[int, int],
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(settings)
        self.names = list(names)
        self.encoder = encoder
        self.head = build_head(
            settings.head,
            encoder,
            len(self.names),
            size,
            settings.head_width,
            settings.queries,
            settings.query_blocks,
        )
        self.drop_paths = add_drop_paths(encoder, settings.drop_path)
        self.dropouts = dropouts_of(self.head)
        frozen = settings.positions == "frozen"
        select_trainable(encoder, settings.trainable, frozen_positions=frozen)
        count = len(self.names)
        self.register_buffer("weights", torch.ones(count) if weights is None else weights)

    def network(self) -> SegmentNetwork:
        """What is used when training is done, without LoRA."""
        return SegmentNetwork(merged(self.encoder), self.head)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """What the head learns by, over all pixels of the batch that are of some class."""
        images, labels = batch.views[0], batch.target
        draw_drop_paths(self.drop_paths, self.noise, images)
        draw_dropouts(self.dropouts, self.noise, images)
        known = labels != self.config.ignore_index
        # Where nothing is known any class will do: it counts for nothing.
        labels = torch.where(known, labels, 0)
        if isinstance(self.head, EomtHead):
            return self._learn_masks(self.head, images, labels, known, progress)
        return self._learn_pixels(self.head, images, labels, known)

    def _learn_pixels(
        self, head: SegmentHead, images: Tensor, labels: Tensor, known: Tensor
    ) -> Losses:
        """Cross entropy (focal, Dice, of an auxiliary head)."""
        size = (images.shape[-2], images.shape[-1])
        maps = stage_features(self.encoder, images, head.stages).maps
        scores = enlarged(head(maps, size), size).float()
        losses = self._losses(scores, labels, known)
        auxiliary = head.auxiliary(maps) if self.config.aux_weight else None
        if auxiliary is not None:
            second = self._losses(enlarged(auxiliary, size).float(), labels, known)["loss"]
            losses["loss"] = losses["loss"] + self.config.aux_weight * second
            losses["auxiliary"] = second.detach()
        with torch.no_grad():
            right = (scores.argmax(1) == labels) & known
            share = right.sum((1, 2)) / known.sum((1, 2)).clamp_min(1)
            losses["accuracy"] = 100 * share.mean()
        return losses

    def _learn_masks(
        self, head: EomtHead, images: Tensor, labels: Tensor, known: Tensor, progress: Progress
    ) -> Losses:
        """Classes and masks of queries, the more of them masked the earlier it is in the run."""
        blocks, device = head.num_blocks, images.device
        shares = [masked_share(progress, block, blocks) for block in range(blocks)]
        noise = self.noise.uniform(len(images), blocks, len(head.queries), device=device)
        proposals = head.at_all_depths(self.encoder, images, shares, noise)
        candidates = num_candidates(proposals.masks)
        points = self.noise.uniform(len(images), candidates, 2, device=device)
        return query_losses(proposals, labels, known, points)

    def _losses(self, scores: Tensor, labels: Tensor, known: Tensor) -> Losses:
        """Means over rows of sums over pixels, divided by all pixels, known or not.

        So a batch may be divided among processes (mmsegmentation's ``avg_non_ignore=False``).
        """
        settings = self.config
        each = pixel_losses(scores, labels)  # (B, H, W)
        if settings.focal:
            each = focal_losses(each, settings.focal)
        each = each * self.weights[labels] * known
        loss = each.mean()
        if not settings.dice:
            return {"loss": loss}
        dice = dice_losses(scores, labels, known).mean()
        return {"loss": loss + settings.dice * dice, "dice": dice.detach()}

    def predict(self, batch: Batch) -> Tensor:
        """(B, K, H, W): scores before softmax, of images as large as crops."""
        return self.scores(batch.views[0])

    def scores(self, images: Tensor) -> Tensor:
        """The same of images (B, C, H, W)."""
        return self.head.scores(self.encoder, images).float()

    def param_groups(self) -> list[ParamGroup]:
        """Rates that fall from layer to layer (layer decay), as timm groups parameters."""
        settings = self.config
        decay = decay_of(settings.layer_decay, settings.trainable)
        return rate_groups(self.encoder, self.head, decay, clip_norm=settings.clip_grad)

    def train(self, mode: bool = True) -> Segment:
        """Frozen batch norms keep their statistics."""
        super().train(mode)
        hold_statistics(self.encoder)
        return self

    def encoders(self) -> dict[str, nn.Module]:
        """The backbone alone."""
        return {"student": self.network().encoder}

    def metric(self) -> str:
        """The score that chooses the best checkpoint."""
        return "miou"
