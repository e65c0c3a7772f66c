"""MOKD: two different networks, each with a slow copy of its own, that also learn from each other's
slow copy.

Song, Xie, Zhang, Luo, "Multi-Mode Online Knowledge Distillation for Self-Supervised Visual
Representation Learning", CVPR 2023, arXiv 2304.06461.  On DINO's multi-crop distillation, arXiv
2104.14294, which is what each network is left with when both cross weights are 0.  Constants come
from the reference code, skyoux/mokd (main_mokd.py, README); it trains one ResNet with one ViT,
other pairs are ours.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchmine.backbones.family import Encoder, build_encoder, family_of, stage_features
from patchmine.errors import UserError
from patchmine.methods.settings.mokd import MokdSettings
from patchmine.models.centre import Centre
from patchmine.models.droppath import add_drop_paths, draw_drop_paths
from patchmine.models.heads import DinoHead
from patchmine.models.teacher import Teacher
from patchmine.models.transformer_head import TransformerHead, draw_dino_weights
from patchmine.ops.distill import (
    feature_spread,
    mean_entropy,
    search_cross_entropy,
    sharpen,
    teacher_temperature,
    view_cross_entropy,
)
from patchmine.ops.pictures import two_parts
from patchmine.ops.processes import num_processes
from patchmine.ops.schedules import cosine_decay
from patchmine.task import Method
from patchmine.types import Batch, Losses, Panel, ParamGroup, Progress

WIDTH_WITHOUT_VIT = (
    384  # of the T-Heads of two ResNets: that of ViT-S, the published partner of ResNet-50
)
CROSS_WEIGHT = {
    "resnet": 1.0,
    "vit": 0.1,
}  # README: of the pair the weaker network gets 1, the stronger 0.1


class Network(NamedTuple):
    """A student or a teacher."""

    encoder: Encoder
    head: DinoHead
    thead: TransformerHead


class Seen(NamedTuple):
    """What a network makes of N images: ``pooled`` (N, C), ``maps`` (N, C, h, w), logits (N, K) of
    both heads.
    """

    pooled: Tensor
    maps: Tensor
    head: Tensor
    thead: Tensor


class MOKD(Method):
    """Each of two networks is distilled from its own teacher and from the other's, in two embedding
    spaces.
    """

    Config = MokdSettings

    config: MokdSettings
    encoder: Encoder
    partner: Encoder
    averages_rows = False  # batch norms and centres

    def __init__(self, config: MokdSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        partner = _build_partner(config, encoder)
        width = _thead_width(config, encoder, partner)
        self.drop_paths = []
        for student in (encoder, partner):
            is_vit = not isinstance(student, ResNet)
            self.drop_paths.append(add_drop_paths(student, config.drop_path) if is_vit else [])
            if is_vit and student.pos_embed is not None:
                student.pos_embed.requires_grad_(True)
        self.partner = partner
        self.head, self.partner_head = (_dino_head(config, each) for each in (encoder, partner))
        self.thead, self.partner_thead = (
            _thead(config, each, width) for each in (encoder, partner)
        )
        self.teacher, self.partner_teacher = (
            Teacher(own_statistics=True, **student._asdict()) for student in self.students()
        )
        # By network and head.  The reference has two more, which are always equal to two of these
        # (spec mokd.md, 3.5).
        self.centres = nn.ModuleDict(
            {name: Centre(config.out_dim, config.centre_momentum) for name in ("head", "thead")}
            | {
                f"partner_{name}": Centre(config.out_dim, config.centre_momentum)
                for name in ("head", "thead")
            }
        )
        given = (config.cross_weight, config.partner_cross_weight)
        self.cross_weights = [
            CROSS_WEIGHT["resnet" if isinstance(student.encoder, ResNet) else "vit"]
            if weight is None
            else weight
            for weight, student in zip(given, self.students(), strict=True)
        ]
        self.has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.modules())

    @classmethod
    def draw_weights(cls, encoder: nn.Module) -> None:
        """DINO's first weights for a ViT; a ResNet starts as it is built."""
        if not isinstance(encoder, ResNet):
            draw_dino_weights(cast(Any, encoder))

    def students(self) -> list[Network]:
        """The network of the settings ``model``, then its partner."""
        own = Network(self.encoder, self.head, self.thead)
        return [own, Network(self.partner, self.partner_head, self.partner_thead)]

    def teachers(self) -> list[Network]:
        """Their slow copies, in the same order."""
        return [
            Network(
                cast(Encoder, t.encoder), cast(DinoHead, t.head), cast(TransformerHead, t.thead)
            )
            for t in (self.teacher, self.partner_teacher)
        ]

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        self._check(batch)
        large, small = (
            torch.cat(batch.views[:2]),
            torch.cat(batch.views[2:]),
        )  # (2B, C, H, W), (J * B, C, h, w)
        # Each size by itself, as in the reference: batch norms must not mix them.
        seen = [
            (
                self.study(number, large, crops=2),
                self.study(number, small, crops=len(batch.views) - 2),
            )
            for number in range(2)
        ]
        with torch.no_grad():
            taught = [look(teacher, large) for teacher in self.teachers()]
        own, partners = (
            self.distil(number, *seen[number], taught, progress) for number in range(2)
        )
        for number, outputs in enumerate(taught):
            for centre, logits in zip(
                self._centres(number), (outputs.head, outputs.thead), strict=True
            ):
                centre.see(logits)
        # All targets and queries are constants, so that the sum pulls at each student with that
        # student's loss only.
        loss = own.pop("loss") + partners.pop("loss")
        agreement = (taught[0].head.argmax(dim=1) == taught[1].head.argmax(dim=1)).float().mean()
        theirs = {f"partner_{name}": value for name, value in partners.items()}
        return {"loss": loss, **own, **theirs, "agreement": agreement}

    def distil(
        self, number: int, large: Seen, small: Seen, taught: list[Seen], progress: Progress
    ) -> Losses:
        """The loss of student ``number``, its terms without their weight, and how its own teacher
        fares.

        ``large`` and ``small``: what the student makes of global and local crops; ``taught``: what
        both teachers make of the global ones.
        """
        student, own, other = self.students()[number], taught[number], taught[1 - number]
        is_resnet = isinstance(student.encoder, ResNet)
        warmup = (
            self.config.cnn_temp_warmup_epochs if is_resnet else self.config.vit_temp_warmup_epochs
        )
        temperature = self._temperature(progress, warmup)
        centre, thead_centre = self._centres(number)
        targets = sharpen(own.head, centre.mean, temperature)  # (2B, K)
        thead_targets = sharpen(own.thead, thead_centre.mean, temperature)
        head, thead = (
            torch.cat([large.head, small.head]),
            torch.cat([large.thead, small.thead]),
        )  # ((2 + J) * B, K)
        terms = {
            "self_head": view_cross_entropy(head, targets),
            "self_thead": view_cross_entropy(thead, thead_targets),
        }
        loss = terms["self_head"] + terms["self_thead"]
        if weight := self.cross_weights[number]:
            # Between the networks the temperature is always the ViT's (main_mokd.py), and what is
            # found has no centre.
            temperature = self._temperature(progress, self.config.vit_temp_warmup_epochs)
            targets_of_other = sharpen(other.head, self._centres(1 - number)[0].mean, temperature)
            found = search(
                self.teachers()[1 - number].thead, other.maps, student.thead.query(small.pooled)
            )
            terms["cross_head"] = view_cross_entropy(head, targets_of_other)
            terms["cross_search"] = search_cross_entropy(
                small.thead, sharpen(found, None, temperature)
            )
            loss = loss + weight * (terms["cross_head"] + terms["cross_search"])
        terms["entropy"] = mean_entropy(targets)
        terms["feature_spread"] = feature_spread(own.pooled)
        return {"loss": loss, **terms}

    def study(self, number: int, images: Tensor, *, crops: int) -> Seen:
        """What student ``number`` makes of ``crops`` crops of each image, crop-major, with
        stochastic depth.
        """
        draw_drop_paths(self.drop_paths[number], self.noise, images, crops=crops)
        return look(self.students()[number], images)

    def _centres(self, number: int) -> list[Centre]:
        """Of the logits of a teacher's head and T-Head."""
        return [
            cast(Centre, self.centres[("", "partner_")[number] + name])
            for name in ("head", "thead")
        ]

    def _temperature(self, progress: Progress, warmup_epochs: int) -> float:
        start, end = self.config.teacher_temp_start, self.config.teacher_temp_end
        return teacher_temperature(progress, start=start, end=end, warmup_epochs=warmup_epochs)

    def _check(self, batch: Batch) -> None:
        """UserError for batches that give the method nothing to compare."""
        if len(batch.views) < 3:
            raise UserError(
                "method=mokd searches global crops for what local crops show, and there are no local ones: set "
                "crops.num_local=1 or more"
            )
        if len(batch) * num_processes() < 2 and self.has_batch_norm:
            raise UserError(
                "method=mokd with a ResNet has batch norms, which need 2 images or more at a time, and gets 1: raise "
                "batch_size, or lower accumulate"
            )

    def after_step(self, progress: Progress) -> None:
        decay = cosine_decay(progress, start=self.config.ema_start, end=self.config.ema_end)
        for teacher, student in zip(
            (self.teacher, self.partner_teacher), self.students(), strict=True
        ):
            teacher.update(decay, **student._asdict())
        for centre in self.centres.values():
            cast(Centre, centre).update()

    def encoders(self) -> dict[str, nn.Module]:
        """Both students and their EMA teachers."""
        return {
            "student": self.encoder,
            "teacher": self.teacher.get_submodule("encoder"),
            "partner": self.partner,
            "partner-teacher": self.partner_teacher.get_submodule("encoder"),
        }

    def param_groups(self) -> list[ParamGroup]:
        """AdamW for a ViT, SGD for a ResNet, each gradient clipped by itself, the prototypes not
        from the first epoch.

        Of a ResNet's T-Head the reference's optimizer is SGD with the learning rate and the decay
        of the ViT's AdamW, and all of its parameters decay, biases, norms and positions too
        (main_mokd.py).
        """
        config = self.config
        groups: list[ParamGroup] = []
        constant, growing = (
            {"weight_decay": config.sgd_weight_decay},
            {"weight_decay_end": config.weight_decay_end},
        )
        for prefix, student in zip(("", "partner_"), self.students(), strict=True):
            encoder, head, thead = (
                prefix.removesuffix("_") or "encoder",
                f"{prefix}head",
                f"{prefix}thead",
            )
            if not isinstance(student.encoder, ResNet):
                groups += self._groups((encoder, head, thead), "adamw", **growing)
                continue
            groups += self._groups(
                (encoder, head), "sgd", blr=config.sgd_blr, min_lr=config.sgd_min_lr, **constant
            )
            as_in_code = config.cnn_thead_optimizer == "sgd"
            groups += self._groups(
                (thead,), config.cnn_thead_optimizer, decay_all=as_in_code, **growing
            )
        return groups

    def _groups(self, parts: tuple[str, ...], optimizer: str, **how: Any) -> list[ParamGroup]:
        """What learns in some of the modules: the prototypes by themselves, and the rest."""
        members = [(name, p) for name, p in self.learning() if name.split(".")[0] in parts]
        prototypes = [(name, p) for name, p in members if "last_layer" in name]
        others = [(name, p) for name, p in members if "last_layer" not in name]
        how = {"clip_norm": self.config.clip_grad, "clip_each": True, **how}
        return [
            ParamGroup(others, optimizer, **how),
            ParamGroup(prototypes, optimizer, frozen_until=self.config.freeze_last_layer, **how),
        ]

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, and for two parts of it, half as wide and high: the part, and where each teacher's
        search heeds it.

        The query is the *other* student's feature of the part, as in training.
        """
        images = batch.views[0]
        students, teachers = self.students(), self.teachers()
        taught = [look(teacher, images) for teacher in teachers]
        rows, columns = (max(seen.maps.shape[axis] for seen in taught) for axis in (2, 3))
        step = math.lcm(
            *(family_of(student.encoder).smallest_side(student.encoder) for student in students)
        )
        panels = [Panel("input", images)]
        for place, part in two_parts(images, step).items():
            panels.append(
                Panel(
                    f"{place} part",
                    F.interpolate(part.float(), size=images.shape[2:], mode="nearest"),
                )
            )
            for number, whose in enumerate(("model", "partner")):
                asking = students[1 - number]
                query = asking.thead.query(look(asking, part).pooled)
                heed = teachers[number].thead.attention_to_query(
                    taught[number].maps, query
                )  # (B, h * w)
                heed = heed.reshape(len(images), 1, *taught[number].maps.shape[2:])
                heat = F.interpolate(heed, size=(rows, columns), mode="nearest")[:, 0]
                panels.append(Panel(f"{place} part sought by {whose}", heat, kind="heat"))
        return panels


def look(network: Network, images: Tensor) -> Seen:
    """What a network makes of images (N, C, H, W) of any size."""
    features = stage_features(
        network.encoder, images, list(family_of(network.encoder).stages(network.encoder))[-1:]
    )
    (maps,) = features.maps
    return Seen(features.pooled, maps, network.head(features.pooled), network.thead(maps))


@torch.no_grad()
def search(thead: TransformerHead, maps: Tensor, queries: Tensor) -> Tensor:
    """A teacher's T-Head logits (J * B, K) of global crop 0, as each local crop of the other
    student asks for them.

    ``maps`` (2B, C, h, w) are the teacher's of both global crops, ``queries`` (J * B, D); neither
    takes a gradient.
    """
    logits: Tensor = thead(maps.chunk(2)[0], queries.detach())
    return logits


def _build_partner(config: MokdSettings, encoder: Encoder) -> Encoder:
    channels = next(p for p in encoder.parameters() if p.ndim == 4).shape[1]
    try:
        partner = build_encoder(
            config.partner_model,
            image_size=family_of(encoder).image_size(encoder),
            channels=channels,
            model_args=config.partner_args,
        )
    except UserError as error:
        raise UserError(
            f"method.partner_model={config.partner_model} with method.partner_args: {error}"
        ) from error
    MOKD.draw_weights(partner)
    return partner


def _thead_width(config: MokdSettings, encoder: Encoder, partner: Encoder) -> int:
    """Width of both T-Heads: each gets queries from the other, and a ViT's tokens enter as they
    are.
    """
    names = {"model": encoder, f"method.partner_model={config.partner_model}": partner}
    widths = {name: each.embed_dim for name, each in names.items() if not isinstance(each, ResNet)}
    if len(set(widths.values())) > 1:
        told = " and ".join(f"{name} is {width} wide" for name, width in widths.items())
        raise UserError(
            f"{told}, but each asks the other's transformer head with a token of its own: choose two vision "
            "transformers of the same embed_dim, in model_args or method.partner_args, or a ResNet beside one of them"
        )
    own = next(iter(widths.values()), None)
    if own is not None and config.thead_width not in (None, own):
        raise UserError(
            f"method.thead_width={config.thead_width}, but the tokens of the vision transformer are {own} wide and "
            "enter its head as they are: leave the setting out"
        )
    width = own or config.thead_width or WIDTH_WITHOUT_VIT
    if width % config.thead_heads:
        fitting = max(heads for heads in range(1, config.thead_heads) if width % heads == 0)
        raise UserError(
            f"method.thead_heads={config.thead_heads} does not divide the transformer heads' width {width}: set "
            f"method.thead_heads={fitting}"
        )
    return width


def _dino_head(config: MokdSettings, encoder: Encoder) -> DinoHead:
    """The gain of the prototypes is learned for a ViT only (main_mokd.py, whatever its command line
    says).
    """
    learned = not isinstance(encoder, ResNet)
    return DinoHead(
        encoder.num_features,
        config.out_dim,
        config.head_hidden,
        config.head_bottleneck,
        trainable_gain=learned,
    )


def _thead(config: MokdSettings, encoder: Encoder, width: int) -> TransformerHead:
    return TransformerHead(
        encoder.num_features,
        width,
        family_of(encoder).map_size(encoder),
        config.out_dim,
        depth=config.thead_depth,
        num_heads=config.thead_heads,
        project=isinstance(encoder, ResNet),
    )
