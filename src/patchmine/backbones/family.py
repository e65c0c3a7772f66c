"""Which family an encoder is of, and what can be asked of every encoder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from jaxtyping import Float, Int
from timm.models import is_model_in_modules
from torch import Tensor, nn

from patchmine.backbones import tokens
from patchmine.backbones.beit import BEIT
from patchmine.backbones.convnext import CONVNEXT
from patchmine.backbones.eva import EVA
from patchmine.backbones.names import reads_clips
from patchmine.backbones.record import Blueprint as Blueprint
from patchmine.backbones.record import Encoder as Encoder
from patchmine.backbones.record import Family as Family
from patchmine.backbones.record import StageFeatures as StageFeatures
from patchmine.backbones.resnet import RESNET
from patchmine.backbones.settings import ModelSettings
from patchmine.backbones.swin import SWIN, SWINV2
from patchmine.backbones.video import VIDEO
from patchmine.backbones.vit import VIT
from patchmine.data.items import IMAGE
from patchmine.errors import UserError, shown_name

# Of a state dict's tensors the first that recognises them says what they are.
_ALL = (EVA, SWIN, SWINV2, VIT, BEIT, RESNET, CONVNEXT, VIDEO)
FAMILIES = {family.name: family for family in _ALL}
_CANNOT_BUILD = (TypeError, ValueError, AssertionError, RuntimeError)  # what timm raises
_BY_MODULE = {family.module: family for family in FAMILIES.values()}


def family_of(encoder: nn.Module | str) -> Family:
    """The family of an encoder, or of the model of that name: the only place that tells them apart.

    Unknown names count as timm's plain ViTs, whose ``build`` says what is wrong.  Raises TypeError
    for a module that no family knows (`is_encoder`).
    """
    if isinstance(encoder, str):
        if reads_clips(encoder):
            return VIDEO
        name = Blueprint(encoder).architecture
        found = (f for f in FAMILIES.values() if is_model_in_modules(name, f.timm_modules))
        return next(found, VIT)
    for kind in type(encoder).__mro__:
        if kind in _BY_MODULE:
            return _BY_MODULE[kind]
    raise TypeError(f"{type(encoder).__name__} is no encoder that a family knows")


def is_encoder(module: nn.Module) -> bool:
    """Whether some family knows the module."""
    return isinstance(module, tuple(_BY_MODULE))


def build_encoder(
    model: str | ModelSettings,
    *,
    image_size: tuple[int, int] = (224, 224),
    patch_size: int | None = None,
    channels: int = 3,
    model_args: Mapping[str, Any] | None = None,
    clip: tuple[int, int] | None = None,
) -> Encoder:
    """An encoder without classifier, freshly drawn, that knows its blueprint (``built_from``).

    Args:
        model: a name of timm's or ours; or settings that say all of this but ``clip``.
        image_size: (height, width) in pixels.
        patch_size: pixels; None is the model's own.
        channels: of an image.
        model_args: more arguments of timm's; ``{"cifar_stem": True}`` gives a ResNet a stem for
            small images.
        clip: (frames, frames in a tubelet), which a video model needs and no other looks at.

    Raises:
        UserError: a name that is unknown or of no family, and a patch that does not divide the
            image or the clip.
    """
    if isinstance(model, str):
        own = (image_size, patch_size, channels, model_args or {})
    else:
        own = (model.image_size, model.patch_size, model.channels, model.model_args)
        model = model.model
    blueprint = Blueprint(model, *own, clip if reads_clips(model) else None)
    family = family_of(blueprint.model)
    try:
        encoder = family.build(blueprint)
        family.initialise(encoder)
    except _CANNOT_BUILD as error:
        usual = ", or choose a plain vision transformer such as vit_small_patch16_224"
        name, remedy = shown_name(blueprint.model), "" if blueprint.model in usual else usual
        raise UserError(
            f"model='{name}' cannot be built ({error}): check model_args{remedy}"
        ) from error
    encoder.built_from = blueprint
    return encoder


def create_encoder(
    model: str, arguments: Mapping[str, Any], source: str, num_classes: int = 0
) -> Encoder:
    """The network that ``source`` describes, its weights not meaningful; 0: without classifier.

    Nothing is downloaded.  Raises UserError where it cannot be built, or is of no family.
    """
    family = family_of(model)
    if not reads_clips(model) and not timm.is_model(model):
        raise UserError(
            f"{source}: timm {timm.__version__} knows no architecture {model!r}; a newer timm may"
        )
    try:
        encoder = family.create(model, {**arguments, "num_classes": num_classes})
    except _CANNOT_BUILD as error:
        shown = {name: value for name, value in arguments.items() if name != "device"}
        raise UserError(f"{source}: timm cannot build {model} with {shown} ({error})") from error
    if not is_encoder(encoder):
        raise UserError(
            f"{source}: {model} is a {type(encoder).__name__}, not a plain vision transformer, "
            "ResNet, ConvNeXt or Swin Transformer"
        )
    return encoder


def infer_blueprint(tensors: Mapping[str, Tensor], source: str, **wanted: Any) -> Blueprint:
    """What an encoder of these tensors is built from; keywords are `infer_architecture`'s."""
    found = (family.infer for family in FAMILIES.values() if family.recognises(tensors))
    infer = next((each for each in found if each is not None), VIT.infer)
    assert infer is not None
    return infer(tensors, source, **wanted)


def refuse_other_family(
    encoder: Encoder, model: str, tensors: Mapping[str, Tensor], source: str
) -> None:
    """UserError where tensors name another family than that of the encoder, ``model``.

    Or in its family another network than any that ``model_args`` make of ``model``: a DINOv3 has
    the names of EVA-02.
    """
    recognised = (family for family in FAMILIES.values() if family.recognises(tensors))
    found = next(recognised, VIT)  # whose names are those of others, too
    if found is VIT or found.infer is None:
        return
    if found.recognises(encoder.state_dict()):  # both versions of Swin have the same names
        return
    kind = f"of timm's kind {found.module.__name__}, and model={model} is none"
    if found is family_of(encoder):
        usual = create_encoder(model, {"device": "meta"}, source)
        if found.recognises(usual.state_dict()):
            return
        kind = f"of another kind than model={model}"
    theirs = found.infer(tensors, source).model
    raise UserError(
        f"{source} holds a network {kind}: name the one that the file is of, as in model={theirs}"
    )


def input_size(encoder: Encoder) -> tuple[int, ...]:
    """(channels, height, width) that it is built for; with frames behind channels for clips."""
    family = family_of(encoder)
    clip = family.clip(encoder)
    frames = () if clip is None else clip[:1]
    return (encoder.built_from.channels, *frames, *family.image_size(encoder))


def initialise_encoder(encoder: Encoder) -> None:
    """Fresh weights in place, as the encoder's family draws them."""
    family_of(encoder).initialise(encoder)


def block_outputs(
    encoder: Encoder,
    embedded: Float[Tensor, "B N D"],
    counts: Collection[int],
    index: Int[Tensor, "B V"] | None = None,
    size: tuple[int, ...] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Each of ``counts`` with the tokens (B, N, D) after so many blocks, as they come; no norm.

    ``index``: which patches are behind the prefix; None: all, in raster order.  ``size``: of the
    grid, rows and columns; None: the encoder's own.
    """
    enter_blocks = family_of(encoder).enter_blocks
    return tokens.block_outputs(encoder, embedded, counts, enter_blocks, index, size)


def transform(
    encoder: Encoder, embedded: Float[Tensor, "B N D"], index: Int[Tensor, "B V"] | None = None
) -> Float[Tensor, "B N D"]:
    """Embedded tokens after all blocks and the final norm; ``index`` as in `block_outputs`."""
    ((_, last),) = block_outputs(encoder, embedded, [len(encoder.blocks)], index)
    return encoder.norm(last)


def encode(
    encoder: Encoder, images: Float[Tensor, "B C *S"], visible: Int[Tensor, "B V"] | None = None
) -> Float[Tensor, "B N D"]:
    """Normed tokens, prefix first, then the patches in ``visible`` (or all)."""
    patches = tokens.embed_patches(encoder, images, visible)
    prefix = tokens.prefix_tokens(encoder, patches.shape[0])
    return transform(encoder, torch.cat([prefix, patches], dim=1), visible)


def pooled(encoder: Encoder, images: Float[Tensor, "B C *S"], pool: str) -> Float[Tensor, "B D"]:
    """What a linear classifier stands on; of what has no tokens the mean over its last map.

    ``pool="mean"``: the mean of the patch tokens, then the encoder's last norm (timm's ``fc_norm``,
    MAE's fine-tuning); ``"cls"``: the class token after that norm.
    """
    if family_of(encoder).hierarchical:
        return family_of(encoder).features(encoder, images, ()).pooled
    patches = tokens.embed_patches(encoder, images)
    prefix = tokens.prefix_tokens(encoder, patches.shape[0])
    embedded = torch.cat([prefix, patches], dim=1)
    ((_, last),) = block_outputs(encoder, embedded, [len(encoder.blocks)])
    first = prefix.shape[1]
    if pool == "cls":
        return encoder.norm(last[:, 0])
    # One of the two does nothing: an exported classifier has its last norm under timm's name.
    return encoder.fc_norm(encoder.norm(last[:, first:].mean(1)))


def stage_features(encoder: Encoder, images: Tensor, stages: Sequence[str] = ()) -> StageFeatures:
    """The features of ``images`` (N, C, H, W), also of other sizes than the encoder was built for.

    Raises UserError for images that patches do not fill, and for another size where positions are
    relative.
    """
    return family_of(encoder).features(encoder, images, stages)


def stage_widths(encoder: Encoder, stages: Sequence[str]) -> list[int]:
    """Channels of each stage's map; UserError, naming ``method.stages``, where there is no such."""
    known = family_of(encoder).stages(encoder)
    if unknown := [stage for stage in stages if stage not in known]:
        names = list(known)
        listed = ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"
        raise UserError(
            f"method.stages={unknown[0]}, but the backbone's stages are {listed}: choose among them"
        )
    return [known[stage] for stage in stages]


def refuse_unfit(encoder: Encoder, method: str, families: Collection[str], relative: bool) -> None:
    """UserError where a method does not train this family, or not with this attention."""
    family = family_of(encoder)
    if family.name not in families and family.hierarchical:
        raise UserError(
            f"method={method} hides patches, which {family.why_whole}: choose a vision "
            "transformer, as in model=vit_small_patch16_224, or a method that compares views"
        )
    if family.name not in families and family.item is IMAGE:
        rotary = family.angles(encoder, family.map_size(encoder)) is not None
        why = (
            ", whose rotary positions tell attention where each patch is, so that no position can "
            "be withheld"
        )
        raise UserError(
            f"method={method} does not train timm's models of the kind {type(encoder).__name__}"
            f"{why if rotary else ''}: choose model=vit_small_patch16_224"
        )
    if family.name not in families:
        raise UserError(
            f"method={method} does not train on {family.item.noun}s: choose method=mae or "
            "method=hpm, or an image model such as model=vit_small_patch16_224"
        )
    # Relative tables belong to the full grid; a sequence with patches missing has no place in them.
    if not relative and family.relative_positions(encoder):
        raise UserError(
            f"method={method} leaves patches out, which an encoder with relative positions does "
            "not allow: set model_args.use_rel_pos_bias=false model_args.use_abs_pos_emb=true, or "
            "choose vit_base_patch16_224"
        )
