"""SCFS: local crops search the teacher's map of a global crop and learn from what they find.

Song, Zhang, Luo, Wang, Xie, "Semantics-Consistent Feature Search for Self-Supervised Visual
Representation Learning", ICCV 2023, arXiv 2212.06486.  On DINO's multi-crop distillation, arXiv
2104.14294, which is what is left with all stage weights 0.  Constants come from the reference code,
skyoux/scfs (models/scfs.py, main_scfs.py, README).  The variant for vision transformers is ours.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones import family as backbones
from patchmine.backbones.family import Encoder, StageFeatures, stage_features
from patchmine.errors import UserError
from patchmine.methods.settings.scfs import ScfsSettings
from patchmine.models.centre import Centre
from patchmine.models.distillation import check_crops, prototype_groups
from patchmine.models.droppath import draw_drop_paths, seed_drop_paths
from patchmine.models.heads import DinoHead, StageHead
from patchmine.models.teacher import Teacher
from patchmine.ops import distill
from patchmine.ops.pictures import two_parts
from patchmine.ops.schedules import cosine_decay
from patchmine.ops.search import cosine_attention
from patchmine.task import Method
from patchmine.types import Batch, Losses, Panel, ParamGroup, Progress


class SCFS(Method):
    """DINO, and at some stages a head that compares global maps and what local crops find there."""

    Config = ScfsSettings

    config: ScfsSettings
    encoder: Encoder
    averages_rows = False  # batch norms and centres

    def __init__(self, config: ScfsSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.stages = config.stages or _usual_stages(encoder)
        widths = dict(zip(self.stages, backbones.stage_widths(encoder, self.stages), strict=True))
        factors = {"global": config.stage_global_weight, "search": config.stage_search_weight}
        self.factors = {term: factor for term, factor in factors.items() if factor}
        self.weights = _active_weights(config, self.stages) if self.factors else {}
        resnet = backbones.family_of(encoder).batch_normed
        self.drop_paths = [] if resnet else seed_drop_paths(encoder)
        widths_of_head = (config.out_dim, config.head_hidden, config.head_bottleneck)
        self.head = DinoHead(encoder.num_features, *widths_of_head, trainable_gain=False)
        self.centre = Centre(config.out_dim, config.centre_momentum)
        sizes = dict(hidden=config.stage_hidden, bottleneck=config.stage_bottleneck)
        outputs = config.stage_out_dim
        self.stage_heads = nn.ModuleList(
            StageHead(widths[name], outputs, **sizes) for name in self.weights
        )
        self.stage_centres = nn.ModuleList(
            Centre(outputs, config.centre_momentum) for _ in self.weights
        )
        self.teacher = Teacher(own_statistics=True, **self._copied())

    def _copied(self) -> dict[str, nn.Module]:
        """The student's modules of which the EMA teacher holds copies."""
        return {"encoder": self.encoder, "head": self.head, "stage_heads": self.stage_heads}

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        check_crops(batch, "scfs", has_batch_norm=True)
        config = self.config
        large, small = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])  # 2B and J * B crops
        temperature = distill.teacher_temperature(
            progress,
            start=config.teacher_temp_start,
            end=config.teacher_temp_end,
            warmup_epochs=config.teacher_temp_warmup_epochs,
        )
        # Each size by itself, as in the reference: batch norms must not mix them.
        whole, local = self._study(large, 2), self._study(small, len(batch.views) - 2)
        logits = self.head(torch.cat([whole.pooled, local.pooled]))  # ((2 + J) * B, K)
        with torch.no_grad():
            teacher = cast(Encoder, self.teacher.encoder)
            known = stage_features(teacher, large, list(self.weights))
            teacher_logits = cast(DinoHead, self.teacher.head)(known.pooled)  # (2B, K)
        targets = distill.sharpen(teacher_logits, self.centre.mean, temperature)
        self.centre.see(teacher_logits)

        loss = distill.view_cross_entropy(logits, targets)
        losses = {"dino": loss}
        for place, (stage, weight) in enumerate(self.weights.items()):
            maps = whole.maps[place], local.maps[place], known.maps[place]
            terms = self.compare_stage(place, *maps, temperature)
            parts = [factor * terms[term] for term, factor in self.factors.items()]
            loss = loss + weight * sum(parts)
            losses |= {f"{term}_{stage}": value for term, value in terms.items()}
        losses["entropy"] = distill.mean_entropy(targets)
        losses["feature_spread"] = distill.feature_spread(known.pooled)
        return {"loss": loss, **losses}

    def _study(self, images: Tensor, crops: int) -> StageFeatures:
        """The student's features of crop-major images (crops * B, C, H, W)."""
        draw_drop_paths(self.drop_paths, self.noise, images, crops=crops)
        return stage_features(self.encoder, images, list(self.weights))

    def compare_stage(
        self, place: int, whole: Tensor, local: Tensor, known: Tensor, temperature: float
    ) -> Losses:
        """The two losses of one stage without their weights, and the entropy of its targets.

        ``whole`` (2B, C, H, W) and ``local`` (J * B, C, h, w) are the student's maps of global and
        local crops, ``known`` (2B, C, H, W) the teacher's.
        """
        head, centre = self.stage_heads[place], cast(Centre, self.stage_centres[place])
        teacher_head = cast(nn.ModuleList, self.teacher.stage_heads)[place]
        terms: Losses = {}
        if "global" in self.factors:
            with torch.no_grad():
                outputs = teacher_head(known)  # (2B, S)
            targets = distill.sharpen(outputs, centre.mean, temperature)
            centre.see(outputs)
            terms["global"] = distill.view_cross_entropy(head(whole), targets)
            terms["entropy"] = distill.mean_entropy(targets)
        if "search" in self.factors:
            with torch.no_grad():
                first = known.chunk(2)[0]  # global crop 0 is searched, by every local crop
                found = teacher_head(first, search(local, first))  # (J * B, S)
            # Not centred, as in the reference (DINOShallowLoss in models/scfs.py).
            wanted = distill.sharpen(found, None, temperature)
            terms["search"] = distill.search_cross_entropy(head(local), wanted)
        return terms

    def after_step(self, progress: Progress) -> None:
        decay = cosine_decay(progress, start=self.config.ema_start, end=self.config.ema_end)
        self.teacher.update(decay, **self._copied())
        for centre in (self.centre, *self.stage_centres):
            cast(Centre, centre).update()

    def param_groups(self) -> list[ParamGroup]:
        """Each gradient is clipped by itself; the prototypes do not move in the first epoch."""
        config = self.config
        usual = "sgd" if backbones.family_of(self.encoder).batch_normed else "adamw"
        optimizer = usual if config.optimizer == "auto" else config.optimizer
        return prototype_groups(self.learning(), config, optimizer)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, and for two parts of it the part and where each stage finds it."""
        # Stages of weight 0 are shown too: a search needs nothing that is learned for it.
        images = batch.views[0]
        known = stage_features(cast(Encoder, self.teacher.encoder), images, self.stages)
        panels = [Panel("input", images)]
        step = backbones.family_of(self.encoder).smallest_side(self.encoder)
        for name, part in two_parts(images, step).items():
            local = stage_features(self.encoder, part, self.stages)
            enlarged = F.interpolate(part.float(), size=images.shape[2:], mode="nearest")
            panels.append(Panel(f"{name} part", enlarged, note="cut out of the input, enlarged"))
            for stage, mine, theirs in zip(self.stages, local.maps, known.maps, strict=True):
                title = f"{name} part sought in {stage}"
                note = "cosine of its mean feature with the teacher's at each place; 1: found"
                panels.append(Panel(title, search(mine, theirs)[0], kind="heat", note=note))
        return panels


def search(local: Tensor, maps: Tensor) -> Tensor:
    """Where local crops find themselves: (J * B, C, h, w), (B, C, H, W) -> (J, B, H, W)."""
    # The query is the mean feature of a local crop; it takes no gradient (models/scfs.py).
    queries = local.detach().float().mean(dim=(2, 3))  # (J * B, C)
    return cosine_attention(queries.view(-1, *maps.shape[:2]), maps)


def _usual_stages(encoder: Encoder) -> list[str]:
    """The last three, as published for a ResNet; of a ViT (ours) blocks at 1/2, 3/4 and the end."""
    family = backbones.family_of(encoder)
    if family.hierarchical:
        return list(family.stages(encoder))[-3:]
    depth = len(encoder.blocks)
    numbers = {max(0, depth * quarters // 4 - 1) for quarters in (2, 3, 4)}
    return [f"blocks.{number}" for number in sorted(numbers)]


def _active_weights(config: ScfsSettings, stages: list[str]) -> dict[str, float]:
    """Weights of the stages that take part in the loss, by name."""
    given = config.stage_weights
    weights = given if isinstance(given, list) else [given] * len(stages)
    if len(weights) != len(stages):
        raise UserError(
            f"method.stage_weights has {len(weights)} numbers for {len(stages)} stages "
            f"({', '.join(stages)}): give one number for all of them, or one a stage"
        )
    if len(set(stages)) < len(stages):
        raise UserError(
            f"method.stages=[{','.join(stages)}] names a stage twice: name each one once"
        )
    return {stage: weight for stage, weight in zip(stages, weights, strict=True) if weight}
