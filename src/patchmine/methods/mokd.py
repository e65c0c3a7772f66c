"""MOKD: two networks, each with an EMA teacher, that also learn from each other's teacher.

Song, Xie, Zhang, Luo, "Multi-Mode Online Knowledge Distillation for Self-Supervised Visual
Representation Learning", CVPR 2023, arXiv 2304.06461.  On DINO's multi-crop distillation, arXiv
2104.14294, which is what each network is left with when both cross weights are 0.  Constants come
from the reference code, skyoux/mokd (main_mokd.py, README); it trains one ResNet with one ViT,
other pairs are ours: there a ConvNeXt stands for the ResNet and a Swin for the ViT, both trained by
AdamW as their authors do.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchmine.backbones.family import Encoder, family_of
from patchmine.methods.settings.mokd import MokdSettings
from patchmine.models import networks
from patchmine.models.centre import Centre
from patchmine.models.distillation import check_crops, prototype_groups
from patchmine.models.droppath import add_drop_paths, draw_drop_paths
from patchmine.models.heads import DinoHead
from patchmine.models.teacher import Teacher
from patchmine.models.transformer_head import TransformerHead, draw_dino_weights
from patchmine.ops import distill
from patchmine.ops.pictures import two_parts
from patchmine.ops.schedules import cosine_decay
from patchmine.task import Method
from patchmine.types import Batch, Losses, Panel, ParamGroup, Progress

# README: of the pair the weaker network, a ResNet, gets 1, the stronger 0.1.
CROSS_WEIGHT_CNN, CROSS_WEIGHT_TRANSFORMER = 1.0, 0.1


class MOKD(Method):
    """Each network is distilled from its own teacher and the other's, in two embedding spaces."""

    Config = MokdSettings

    config: MokdSettings
    encoder: Encoder
    partner: Encoder
    averages_rows = False  # batch norms and centres

    def __init__(self, config: MokdSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        partner = networks.build_partner(config, encoder)
        self.draw_weights(partner)
        width = networks.thead_width(config, encoder, partner)
        self.drop_paths = []
        for student in (encoder, partner):
            self.drop_paths.append(add_drop_paths(student, config.drop_path))
            if networks.has_tokens(student) and student.pos_embed is not None:
                student.pos_embed.requires_grad_(True)
        self.partner = partner
        self.head, self.partner_head = (
            networks.dino_head(config, each) for each in (encoder, partner)
        )
        both = (networks.thead(config, each, width) for each in (encoder, partner))
        self.thead, self.partner_thead = both
        self.teacher, self.partner_teacher = (
            Teacher(own_statistics=True, **student._asdict()) for student in self.students()
        )
        # By network and head.  The reference has two more, always equal to two of these
        # (docs/methods/mokd.md).
        names = ("head", "thead", "partner_head", "partner_thead")
        self.centres = nn.ModuleDict(
            {name: Centre(config.out_dim, config.centre_momentum) for name in names}
        )
        given = (config.cross_weight, config.partner_cross_weight)
        usual = [
            CROSS_WEIGHT_CNN if networks.is_cnn(e) else CROSS_WEIGHT_TRANSFORMER
            for e in (encoder, partner)
        ]
        self.cross_weights = [u if w is None else w for w, u in zip(given, usual, strict=True)]
        self.has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.modules())

    @classmethod
    def draw_weights(cls, encoder: nn.Module) -> None:
        """DINO's first weights for a ViT; what has stages starts as it is built."""
        if networks.has_tokens(encoder):
            draw_dino_weights(cast(Any, encoder))

    def students(self) -> list[networks.Network]:
        """The network of the settings ``model``, then its partner."""
        own = networks.Network(self.encoder, self.head, self.thead)
        return [own, networks.Network(self.partner, self.partner_head, self.partner_thead)]

    def teachers(self) -> list[networks.Network]:
        """Their EMA teachers, in the same order."""
        return [
            networks.Network(
                cast(Encoder, t.encoder), cast(DinoHead, t.head), cast(TransformerHead, t.thead)
            )
            for t in (self.teacher, self.partner_teacher)
        ]

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        check_crops(batch, "mokd", has_batch_norm=self.has_batch_norm)
        large, small = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])  # 2B and J * B crops
        local = len(batch.views) - 2
        # Each size by itself, as in the reference: batch norms must not mix them.
        students = [
            (self.study(number, large, crops=2), self.study(number, small, crops=local))
            for number in range(2)
        ]
        with torch.no_grad():
            known = [networks.outputs_of(teacher, large) for teacher in self.teachers()]
        own, partners = (self.distil(n, *students[n], known, progress) for n in range(2))
        for number, outputs in enumerate(known):
            both = (outputs.head, outputs.thead)
            for centre, logits in zip(self._centres(number), both, strict=True):
                centre.see(logits)
        # All targets and queries are constants: the sum pulls at each student with its loss only.
        loss = own.pop("loss") + partners.pop("loss")
        agreement = (known[0].head.argmax(dim=1) == known[1].head.argmax(dim=1)).float().mean()
        theirs = {f"partner_{name}": value for name, value in partners.items()}
        return {"loss": loss, **own, **theirs, "agreement": agreement}

    def distil(
        self,
        number: int,
        large: networks.Outputs,
        small: networks.Outputs,
        known: list[networks.Outputs],
        progress: Progress,
    ) -> Losses:
        """The loss of student ``number``, its terms without their weight, its teacher's monitors.

        ``large`` and ``small`` are the student's outputs of global and local crops, ``known`` both
        teachers' of the global ones.
        """
        student, own, other = self.students()[number], known[number], known[1 - number]
        cnn, vit = self.config.cnn_temp_warmup_epochs, self.config.vit_temp_warmup_epochs
        temperature = self._temperature(progress, cnn if networks.is_cnn(student.encoder) else vit)
        centre, thead_centre = self._centres(number)
        targets = distill.sharpen(own.head, centre.mean, temperature)  # (2B, K)
        thead_targets = distill.sharpen(own.thead, thead_centre.mean, temperature)
        head = torch.cat([large.head, small.head])  # ((2 + J) * B, K)
        thead = torch.cat([large.thead, small.thead])
        terms = {
            "self_head": distill.view_cross_entropy(head, targets),
            "self_thead": distill.view_cross_entropy(thead, thead_targets),
        }
        loss = terms["self_head"] + terms["self_thead"]
        if weight := self.cross_weights[number]:
            # Between the networks the temperature is always the ViT's (main_mokd.py), and what is
            # found has no centre.
            temperature = self._temperature(progress, vit)
            their_centre = self._centres(1 - number)[0].mean
            their_targets = distill.sharpen(other.head, their_centre, temperature)
            query = student.thead.query(small.pooled)
            found = networks.search(self.teachers()[1 - number].thead, other.maps, query)
            wanted = distill.sharpen(found, None, temperature)
            terms["cross_head"] = distill.view_cross_entropy(head, their_targets)
            terms["cross_search"] = distill.search_cross_entropy(small.thead, wanted)
            loss = loss + weight * (terms["cross_head"] + terms["cross_search"])
        terms["entropy"] = distill.mean_entropy(targets)
        terms["feature_spread"] = distill.feature_spread(own.pooled)
        return {"loss": loss, **terms}

    def study(self, number: int, images: Tensor, *, crops: int) -> networks.Outputs:
        """What student ``number`` makes of crop-major images, with stochastic depth."""
        draw_drop_paths(self.drop_paths[number], self.noise, images, crops=crops)
        return networks.outputs_of(self.students()[number], images)

    def _centres(self, number: int) -> list[Centre]:
        """Of the logits of a teacher's head and T-Head."""
        prefix = ("", "partner_")[number]
        return [cast(Centre, self.centres[prefix + name]) for name in ("head", "thead")]

    def _temperature(self, progress: Progress, warmup_epochs: int) -> float:
        start, end = self.config.teacher_temp_start, self.config.teacher_temp_end
        return distill.teacher_temperature(
            progress, start=start, end=end, warmup_epochs=warmup_epochs
        )

    def after_step(self, progress: Progress) -> None:
        decay = cosine_decay(progress, start=self.config.ema_start, end=self.config.ema_end)
        own, partners = self.students()
        self.teacher.update(decay, **own._asdict())
        self.partner_teacher.update(decay, **partners._asdict())
        for centre in self.centres.values():
            cast(Centre, centre).update()

    def encoders(self) -> dict[str, nn.Module]:
        """Both students and their EMA teachers."""
        teacher = self.partner_teacher.get_submodule("encoder")
        return {**super().encoders(), "partner": self.partner, "partner-teacher": teacher}

    def param_groups(self) -> list[ParamGroup]:
        """SGD for a ResNet, AdamW for all others; each gradient is clipped by itself."""
        config, groups = self.config, list[ParamGroup]()
        growing: dict[str, Any] = {"weight_decay_end": config.weight_decay_end}
        sgd = dict(
            blr=config.sgd_blr, min_lr=config.sgd_min_lr, weight_decay=config.sgd_weight_decay
        )
        for prefix, student in zip(("", "partner_"), self.students(), strict=True):
            encoder, head = prefix.removesuffix("_") or "encoder", f"{prefix}head"
            thead, kind = f"{prefix}thead", config.cnn_thead_optimizer
            if not family_of(student.encoder).batch_normed:
                groups += self._groups((encoder, head, thead), "adamw", **growing)
                continue
            groups += self._groups((encoder, head), "sgd", **sgd)
            # The reference's optimizer of a ResNet's T-Head is SGD with the rate and the decay of
            # the ViT's AdamW, and everything in it decays, biases and norms too (main_mokd.py).
            groups += self._groups((thead,), kind, decay_all=kind == "sgd", **growing)
        return groups

    def _groups(self, parts: tuple[str, ...], optimizer: str, **how: Any) -> list[ParamGroup]:
        """What learns in some of the modules."""
        members = [(name, p) for name, p in self.learning() if name.split(".")[0] in parts]
        return prototype_groups(members, self.config, optimizer, **how)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, and for two parts of it the part and each teacher's attention in the search.

        The query is the *other* student's feature of the part, as in training.
        """
        images = batch.views[0]
        students, teachers = self.students(), self.teachers()
        maps = [
            networks.outputs_of(teacher, images).maps for teacher in teachers
        ]  # (B, C, h, w) each
        size = tuple(max(each.shape[axis] for each in maps) for axis in (2, 3))
        step = math.lcm(*(family_of(s.encoder).smallest_side(s.encoder) for s in students))
        panels = [Panel("input", images)]
        for place, part in two_parts(images, step).items():
            enlarged = F.interpolate(part.float(), size=images.shape[2:], mode="nearest")
            panels.append(Panel(f"{place} part", enlarged, note="cut out of the input, enlarged"))
            for number, whose in enumerate(("model", "partner")):
                asking = students[1 - number]
                query = asking.thead.query(networks.outputs_of(asking, part).pooled)
                thead = teachers[number].thead
                attention = thead.attention_to_query(maps[number], query)  # (B, h * w)
                attention = attention.reshape(len(images), 1, *maps[number].shape[2:])
                heat = F.interpolate(attention, size=size, mode="nearest")[:, 0]
                title = f"{place} part sought by {whose}"
                note = "attention of each place to the other student's feature of the part, a share"
                panels.append(Panel(title, heat, kind="heat", note=note))
        return panels
