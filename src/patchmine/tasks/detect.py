"""Detection: boxes, and masks, of objects, by Faster or Mask R-CNN on the maps of an encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchmine.backbones.family import family_of
from patchmine.backbones.record import Encoder
from patchmine.backbones.tokens import encoder_grid
from patchmine.models.adapt import decay_of, hold_statistics, rate_groups, select_trainable
from patchmine.models.detection import Backbone, DetectHead, Found
from patchmine.models.droppath import add_drop_paths, draw_drop_paths
from patchmine.models.lora import merged
from patchmine.models.pyramid import build_pyramid
from patchmine.task import Task
from patchmine.tasks.settings import DetectSettings
from patchmine.types import Batch, Losses, ParamGroup, Progress

USUAL_WINDOW = 14  # patches along each side (arXiv 2203.16527)
_FEW_PATCHES = 32 * 32  # that attention between all of them is cheap for


class Detect(Task):
    """The objects in an image.

    Args:
        settings: which heads, and how the backbone moves.
        encoder: the backbone without classifier, built for views of the run's size.
        names: of the classes.
    """

    uses_targets: ClassVar[bool] = True

    def __init__(self, settings: DetectSettings, encoder: Encoder, names: Sequence[str]) -> None:
        super().__init__(settings)
        self.names = list(names)
        self.encoder = encoder
        backbone = build_pyramid(
            encoder, window_of(settings.window, encoder), settings.global_blocks, settings.width
        )
        self._backbone = (backbone,)  # no part of its own: encoder and head.neck are all of it
        self.head = DetectHead(
            backbone,
            len(self.names),
            masks=settings.masks,
            kind=settings.head,
            anchor_scale=settings.anchor_scale,
            proposals=settings.proposals,
            samples=settings.samples,
            score_threshold=settings.score_threshold,
            nms=settings.nms,
        )
        self.drop_paths = add_drop_paths(encoder, settings.drop_path)
        frozen = settings.positions == "frozen"
        select_trainable(encoder, settings.trainable, frozen_positions=frozen)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """The sum of torchvision's losses of proposals, classes, boxes and masks."""
        images = batch.views[0]
        draw_drop_paths(self.drop_paths, self.noise, images)
        seeds = [int(2**24 * drawn) for drawn in self.noise.uniform(len(images), 1)]
        losses = self.head.losses(images, self._maps(images), batch.target, seeds)
        told = {name: loss.detach() for name, loss in losses.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **told}

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        """Of the pyramid, in float32, in which places of pixels are exact."""
        return {name: one.float() for name, one in self._backbone[0](images).items()}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Found]:
        """The objects in each view of a batch."""
        images = batch.views[0]
        return self.head.find(images, self._maps(images))

    def backbone(self) -> Backbone:
        """A copy of what makes the maps, without LoRA; it has all weights but those of `head`."""
        backbone = copy.deepcopy(self._backbone[0])
        backbone.encoder = merged(backbone.encoder)
        return backbone

    def param_groups(self) -> list[ParamGroup]:
        """Rates that fall from layer to layer (layer decay), as timm groups parameters."""
        settings = self.config
        decay = decay_of(settings.layer_decay, settings.trainable)
        return rate_groups(self.encoder, self.head, decay, clip_norm=settings.clip_grad)

    def train(self, mode: bool = True) -> Detect:
        """Frozen batch norms keep their statistics."""
        super().train(mode)
        hold_statistics(self.encoder)
        return self

    def encoders(self) -> dict[str, nn.Module]:
        """The backbone alone."""
        return {"student": merged(self.encoder)}

    def metric(self) -> str:
        """The score that chooses the best checkpoint."""
        return "map"


def window_of(window: int | None, encoder: Encoder) -> int | None:
    """Patches along each side of attention's windows; None: every block sees all patches.

    Args:
        window: the setting: 0 is for no windows; None: the papers' where there are many patches and
            the encoder can.
        encoder: built for the size of the images.
    """
    if window is not None:
        return window or None
    family = family_of(encoder)
    if family.hierarchical or family.relative_positions(encoder):
        return None
    return USUAL_WINDOW if encoder_grid(encoder).num_patches > _FEW_PATCHES else None
