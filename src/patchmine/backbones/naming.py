"""Which networks lie in a file, and which of them is wanted.

A file is a dictionary, often of dictionaries; its tensors are looked at under one dotted name each.
An encoder is recognised by its first layer, and what stands before that layer's name is the
encoder's prefix, whatever wrappers it is made of: ``state_dict.model._orig_mod.backbone.vit.``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patchmine.backbones.loading import Tensors, nested_tensors, plain_tensor
from patchmine.backbones.reference import from_videomae_names
from patchmine.backbones.renaming import FIRST_LAYER, as_timm, timm_name
from patchmine.errors import UserError, foreign_parser, shown_name

Weights = Literal["auto", "student", "raw", "teacher", "ema"]
"""Which of several networks in a file: the trained one (student, raw), or its average."""

# Not networks: states of optimizers and of training loops.
_PASSED_OVER = (
    *("optimizer", "lr_scheduler", "scaler", "loss_scaler", "amp"),
    *("callbacks", "loops", "args", "config"),
)
# torch's wrappers of a module leave their names anywhere in those of its tensors.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_AVERAGE = re.compile(r"(^|_)(ema|teacher|momentum|target|swa)(_|$)|^encoder_k$")
# Our checkpoints hold further networks (frozen teachers, the second of a pair) beside these two.
_OWN = {False: "model.encoder.", True: "model.teacher.encoder."}
# No encoder's: decoders, classifiers, projections, and what else is trained and thrown away.
_BESIDE_ENCODER = (
    *("mask_token", "decoder", "head.", "heads.", "head_dist.", "fc.", "classifier.", "pooler."),
    *("neck.", "predictor.", "projector.", "projection_head.", "queue", "vis_mask_token"),
    *("attn_pool.", "masked_embed"),  # SigLIP's pooling; iBOT's token of what is hidden
)
_BEFORE_CLASSIFIER = "head.norm."  # a ConvNeXt's last norm
_OPENAI_CLIP = "visual.conv1.weight"


def beside_encoder(name: str) -> bool:
    """Whether a tensor of a network under MAE's names is no part of its encoder."""
    return name.startswith(_BESIDE_ENCODER) and not name.startswith(_BEFORE_CLASSIFIER)


def encoder_of(tensors: Tensors) -> Tensors:
    """A network's tensors without its decoder, classifier and projection heads."""
    return {name: tensor for name, tensor in tensors.items() if not beside_encoder(name)}


@dataclass(frozen=True)
class Place:
    """An encoder in a file: its ``prefix``, the ``naming`` of its tensors, whether an average."""

    prefix: str
    naming: str
    is_average: bool

    @property
    def root(self) -> str:
        """What precedes the names of the encoder *and* of the decoder that it was trained with."""
        inner = {"VideoMAE": "encoder.", "transformers": "vit."}.get(self.naming, "")
        return self.prefix.removesuffix(inner)


@dataclass(frozen=True)
class Network:
    """One network of a file under MAE's names (the encoder's are timm's), in float32.

    ``average``: its EMA weights, where the file has both, and ``average_names`` theirs in the file;
    ``outside``: names of all tensors in the file that are no part of it, these among them;
    ``told``: in a few words, where it was found.
    """

    place: Place
    tensors: Tensors
    average: Tensors | None
    average_names: list[str]
    outside: list[str]
    told: str


def flatten(content: Mapping[str, Any]) -> Tensors:
    """Every tensor of nested dictionaries by dotted name, without the marks of torch's wrappers."""
    found = nested_tensors(content)
    return {
        _WRAPPERS.sub("", name): t for name, t in found.items() if not name.startswith(_PASSED_OVER)
    }


def find_places(flat: Mapping[str, Tensor]) -> list[Place]:
    """The encoders in a file, recognised by their first layers."""
    places = []
    for name, tensor in flat.items():
        for naming, layer in FIRST_LAYER.items():
            if name != layer and not name.endswith(f".{layer}"):
                continue
            prefix = name.removesuffix(layer)
            if naming == "ResNet" and f"{prefix}conv1.weight" not in flat:
                continue
            if naming == "timm" and tensor.ndim == 5 and f"{prefix}blocks.0.attn.q_bias" in flat:
                naming = "VideoMAE"
            if naming == "timm" and f"{prefix}layers.0.downsample.reduction.weight" in flat:
                naming = "Swin's authors"
            if naming == "timm" and f"{prefix}storage_tokens" in flat:
                naming = "DINOv3"
            average = any(_AVERAGE.search(part) for part in prefix.split("."))
            places.append(Place(prefix, naming, average))
    return places


def find_network(
    content: Mapping[str, Any], source: str, weights: Weights = "auto", prefix: str | None = None
) -> Network:
    """The network of a file that is wanted; UserError where none is, or several are.

    ``auto`` is the trained one, but for self-distillation, where file and authors (DINO, iBOT) call
    the two student and teacher and advise the teacher.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{source} cannot be understood as an encoder's weights ({reason})")

    with foreign_parser(refuse):
        flat = flatten(content)
        places = find_places(flat)
        if not places:
            raise _nothing_known(list(flat), source)
        place = _choose(places, flat, source, weights, prefix)
        like = [other for other in places if other.is_average and other.naming == place.naming]
        average = like[0] if len(like) == 1 else None  # HPM's teacher
        inside = set(_names_below(place, places, flat))
        return Network(
            place,
            _below(place, places, flat),
            _below(average, places, flat) if average else None,
            _names_below(average, places, flat) if average else [],
            [name for name in flat if name not in inside],
            _told(place, places),
        )


def _nothing_known(names: list[str], source: str) -> UserError:
    if not names:
        return UserError(
            f"{source} holds no tensors under a known name (model, module, state_dict, "
            "ema_state_dict, teacher): give a state dict"
        )
    if any(name.endswith(_OPENAI_CLIP) for name in names):
        return UserError(
            f"{source} is a CLIP network under OpenAI's names, which are not read: take the "
            "model.safetensors of timm's vit_base_patch16_clip_quickgelu_224.openai"
        )
    held = ", ".join(shown_name(name) for name in names[:3])
    return UserError(
        f"{source} holds no plain vision transformer (no patch_embed.proj.weight, or what "
        f"mmpretrain, transformers and torchvision call it, no pos_embed); it holds {held}, ..."
    )


def _told(place: Place, places: Sequence[Place]) -> str:
    told = f"names as in {place.naming}"
    if place.prefix:
        told += f" under {shown_name(place.prefix)}"
    if len({other.is_average for other in places}) == 2:
        chosen, other = ("EMA", "raw") if place.is_average else ("raw", "ema")
        return f"{told}; the {chosen} weights are taken (weights={other} takes the others)"
    return f"{told}; the file has EMA weights only" if place.is_average else told


def _choose(
    places: Sequence[Place],
    flat: Mapping[str, Tensor],
    source: str,
    weights: Weights,
    prefix: str | None,
) -> Place:
    """The one place that is asked for; UserError where it is none or several."""
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        for place in places:
            if place.prefix == wanted:
                return place
        raise UserError(
            f"{source} holds no encoder under prefix={prefix!r}: there is {_listed(places)}"
        )
    trained = [place for place in places if not place.is_average]
    averages = [place for place in places if place.is_average]
    if weights in ("teacher", "ema") and not averages:
        raise UserError(
            f"{source} holds no teacher weights (no ema_state_dict, model_ema, teacher): use "
            "weights=student"
        )
    if weights in ("student", "raw") and not trained:
        raise UserError(
            f"{source} holds EMA weights only, under {_listed(averages)}: use weights=ema"
        )
    distilled = any(
        part.startswith("student") for place in trained for part in place.prefix.split(".")
    )
    average = weights in ("teacher", "ema") or (
        weights == "auto" and bool(averages) and (distilled or not trained)
    )
    fitting = averages if average else trained
    own = [place for place in fitting if place.prefix == _OWN[average]]
    fitting = own or _distinct(fitting, flat)
    if len(fitting) > 1:
        example = shown_name(fitting[0].prefix or "''")
        raise UserError(
            f"{source} holds {len(fitting)} encoders, {_listed(fitting)}: say which with "
            f"prefix={example}"
        )
    return fitting[0]


def _listed(places: Sequence[Place]) -> str:
    return ", ".join(shown_name(place.prefix) or "one without prefix" for place in places[:6])


def _distinct(places: Sequence[Place], flat: Mapping[str, Tensor]) -> list[Place]:
    """The places without those of the same network under a second name, as modules may have."""
    kept: dict[str, tuple[Place, Tensors]] = {}
    for place in places:
        tensors = _below(place, places, flat)
        same = (
            tensors.keys() == other.keys()
            and all(torch.equal(tensors[name], other[name]) for name in tensors)
            for _, other in kept.values()
        )
        if not any(same):
            kept[place.prefix] = place, tensors
    return [place for place, _ in kept.values()]


def _names_below(place: Place, places: Sequence[Place], flat: Mapping[str, Tensor]) -> list[str]:
    """Names after a network's root that are not another network's, which has a longer root."""
    roots = {other.root for other in places}
    longer = tuple(root for root in roots if root != place.root and root.startswith(place.root))
    return [
        name
        for name in flat
        if name.startswith(place.root) and not name.startswith(longer or ("\0",))
    ]


def _below(place: Place, places: Sequence[Place], flat: Mapping[str, Tensor]) -> Tensors:
    """A network's tensors under MAE's names."""
    inner = place.prefix.removeprefix(place.root) if place.naming == "transformers" else ""
    tensors: Tensors = {}
    for name in _names_below(place, places, flat):
        tensor = plain_tensor(flat[name], name)
        if tensor is not None:
            short = name.removeprefix(place.root).removeprefix(inner)
            tensors[timm_name(short, place.naming)] = tensor
    if place.naming == "VideoMAE":
        return from_videomae_names(tensors)
    return as_timm(tensors)
