"""Fine-tuning a backbone on labels: classes, several labels an image, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones.classifier import Classifier, Head, new_layer
from patchmine.backbones.family import Encoder, family_of, pooled
from patchmine.models.adapt import decay_of, hold_statistics, rate_groups, select_trainable
from patchmine.models.droppath import add_drop_paths, draw_drop_paths
from patchmine.models.lora import merged
from patchmine.models.mixing import draw_mixing, mixing_generator
from patchmine.ops.erasing import erase
from patchmine.ops.mixing import mix_images, mix_targets, smoothed
from patchmine.task import Task
from patchmine.types import Batch, Losses, ParamGroup, Progress

SCORE = {"ce": "top1", "bce": "map", "mse": "r2"}
"""What the best checkpoint has most of, by loss."""


class ClassifySettings(Protocol):
    """What a `Classify` reads of a run's settings: see `tasks.settings` and `AugmentSettings`."""

    loss: Any
    pool: Any
    head_std: float
    trainable: str
    positions: Any
    layer_decay: float | None
    drop_path: float
    label_smoothing: float
    clip_grad: float | None
    ema_decay: float | None
    mixup: float
    cutmix: float
    mix_prob: float
    mix_switch_prob: float
    clip: Any


class Classify(Task):
    """A linear layer on pooled features, trained together with the backbone.

    Args:
        settings: how, and how far, the backbone moves.
        encoder: the backbone without classifier.
        names: of the scores: classes, labels, or columns of numbers.
        weights: (K,) how much an image of each class counts; None: all the same.
        scale: (2, K) mean and deviation of the numbers to be learnt, with ``loss=mse``.
    """

    uses_targets: ClassVar[bool] = True
    weights: Tensor
    scale: Tensor

    def __init__(
        self,
        settings: ClassifySettings,
        encoder: Encoder,
        names: Sequence[str],
        weights: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__(settings)
        self.names = list(names)
        self.encoder = encoder
        self.head = new_layer(encoder.num_features, len(self.names), settings.head_std)
        Classifier(encoder, self.head, settings.pool)  # which refuses what does not fit
        self.drop_paths = add_drop_paths(encoder, settings.drop_path)
        if settings.pool == "mean" and not family_of(encoder).hierarchical:
            # It stands behind the pooling now, where it never was: MAE starts it afresh
            # (main_finetune.py drops the stored norm).
            nn.init.ones_(encoder.norm.weight)
            nn.init.zeros_(encoder.norm.bias)
        frozen = settings.positions == "frozen"
        select_trainable(encoder, settings.trainable, frozen_positions=frozen)
        count = len(self.names)
        self.register_buffer("weights", torch.ones(count) if weights is None else weights)
        unit = torch.tensor([[0.0], [1.0]]).expand(2, count).contiguous()
        self.register_buffer("scale", unit if scale is None else scale)
        self.keep_average(settings.ema_decay, ["encoder", "head"])

    @property
    def used(self) -> Any:
        """What holds the ``encoder`` and ``head`` that count: the average where there is one."""
        return self if self.average is None else self.average

    def network(self) -> Classifier:
        """What is used when training is done, a copy without LoRA."""
        encoder = merged(self.used.encoder)  # what LoRA added becomes part of the weights
        return Classifier(encoder, self.used.head, self.config.pool)

    def head_of(self) -> Head:
        """What an export says of the scores; numbers are in their own units."""
        layer: nn.Linear = self.used.head
        if self.config.loss == "mse":
            plain = nn.Linear(layer.in_features, layer.out_features)
            mean, deviation = self.scale.cpu()
            with torch.no_grad():
                plain.weight.copy_(layer.weight.cpu() * deviation[:, None])
                plain.bias.copy_(layer.bias.cpu() * deviation + mean)
            layer = plain
        return Head(layer, self.config.pool, self.names, self.config.loss)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """The loss of images that are mixed and erased as the settings say."""
        settings, images = self.config, batch.views[0]
        assert batch.target is not None, "training rows have targets"
        targets = self._targets(batch.target)
        if batch.erase is not None:
            drawn = self.noise.uniform(len(images), 2, device=images.device)
            images = erase(images, batch.erase, drawn)
        if settings.mixup or settings.cutmix:
            generator = mixing_generator(self.noise.seed, progress.step)
            mixing = draw_mixing(
                generator,
                (images.shape[-2], images.shape[-1]),
                mixup=settings.mixup,
                cutmix=settings.cutmix,
                prob=settings.mix_prob,
                switch_prob=settings.mix_switch_prob,
                repeats=settings.clip.repeats,
            )
            images, targets = mix_images(images, mixing), mix_targets(targets, mixing)
        draw_drop_paths(self.drop_paths, self.noise, images)
        scores = self.head(pooled(self.encoder, images, settings.pool))
        return self._loss(scores, targets, batch.target)

    def _targets(self, target: Tensor) -> Tensor:
        """(B, K): shares of classes, labels, or standardised numbers."""
        if self.config.loss == "ce":
            return smoothed(target, len(self.names), self.config.label_smoothing)
        if self.config.loss == "bce":
            eps = self.config.label_smoothing
            return target.float() * (1 - eps) + 0.5 * eps
        return (target.float() - self.scale[0]) / self.scale[1]

    def _loss(self, scores: Tensor, targets: Tensor, labels: Tensor) -> Losses:
        scores = scores.float()
        if self.config.loss == "ce":
            # Means over rows, not over weights, so that a batch may be divided (averages_rows).
            rows = -(targets * F.log_softmax(scores, dim=1)).sum(1)
            right = (scores.argmax(1) == labels).float()
            return {"loss": (rows * self.weights[labels]).mean(), "accuracy": 100 * right.mean()}
        if self.config.loss == "bce":
            return {"loss": F.binary_cross_entropy_with_logits(scores, targets)}
        return {"loss": F.mse_loss(scores, targets)}

    def predict(self, batch: Batch) -> Tensor:
        """(B, K): scores before softmax or sigmoid, or numbers in their own units."""
        return self.scores(batch.views[0])

    def scores(self, images: Tensor) -> Tensor:
        """The same of images (B, C, H, W), or of clips (B, C, T, H, W)."""
        features = pooled(self.used.encoder, images, self.config.pool)
        scores: Tensor = self.used.head(features).float()
        if self.config.loss == "mse":
            return scores * self.scale[1] + self.scale[0]
        return scores

    def averaged(self, scores: Tensor) -> Tensor:
        """(B, K) of scores (B, V, K) of several views: probabilities are averaged, or numbers."""
        if self.config.loss == "mse":
            return scores.mean(1)
        if self.config.loss == "bce":
            odds = F.logsigmoid(scores).logsumexp(1) - F.logsigmoid(-scores).logsumexp(1)
            return odds  # of the mean probability, without rounding to 0 or 1
        return scores.log_softmax(-1).logsumexp(1) - math.log(scores.shape[1])

    def param_groups(self) -> list[ParamGroup]:
        """Rates that fall from layer to layer (layer decay), as timm groups parameters."""
        settings = self.config
        decay = decay_of(settings.layer_decay, settings.trainable)
        return rate_groups(self.encoder, self.head, decay, clip_norm=settings.clip_grad)

    def train(self, mode: bool = True) -> Classify:
        """Frozen batch norms keep their statistics."""
        super().train(mode)
        hold_statistics(self.encoder)
        return self

    def encoders(self) -> dict[str, nn.Module]:
        """The backbone alone, in the state that is used."""
        return {"student": self.network().encoder}

    def metric(self) -> str:
        """The score that chooses the best checkpoint."""
        return SCORE[self.config.loss]
