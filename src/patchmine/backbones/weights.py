"""Encoders out of files: our exports, timm's and transformers' folders, other people's layouts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from patchmine.backbones import description
from patchmine.backbones.architecture import TIMM_EPS, activation_note
from patchmine.backbones.description import Description
from patchmine.backbones.family import (
    create_encoder,
    family_of,
    infer_blueprint,
    refuse_other_family,
)
from patchmine.backbones.loading import COUNTER, LoadReport, Tensors, check_fit, load_tensors
from patchmine.backbones.names import reads_clips
from patchmine.backbones.naming import Weights, beside_encoder, encoder_of
from patchmine.backbones.parts import refuse_other_parts, refuse_other_settings
from patchmine.backbones.positions import (
    give_each_its_own,
    is_position_table,
    move_all_positions,
    source_grid,
)
from patchmine.backbones.reading import ReadFile, read_file
from patchmine.backbones.record import Blueprint, Encoder
from patchmine.backbones.tokens import embedded_prefix, refuse_unfilled
from patchmine.errors import UserError

_MOST_POSITIONS = 2**28  # numbers of a position table, one gibibyte
_SIZES = ("img_size", "patch_size", "in_chans", "num_frames", "tubelet_size")
_log = logging.getLogger("patchmine")


def as_size(value: int | Sequence[int] | None, setting: str) -> tuple[int, int] | None:
    """(height, width) from a number or a pair; UserError, naming ``setting``, for anything else."""
    size = None if value is None else description.as_size(value)
    if size is None and value is not None:
        raise UserError(
            f"{setting}={value!r} is no size: give pixels, one number or (height, width)"
        )
    return size


def load_encoder(path: str | Path, **how: Any) -> Encoder:
    """`open_weights` without the report; what had to be assumed about the file goes to the log."""
    encoder, report = open_weights(path, **how)
    for note in report.assumed:
        _log.warning("%s: %s", report.source, note)
    return encoder


def open_weights(
    path: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    source_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    weights: Weights = "auto",
    prefix: str | None = None,
    setting: str | None = None,
    like: Blueprint | None = None,
) -> tuple[Encoder, LoadReport]:
    """The encoder in a file of weights or in a folder of one, and a report.

    Args:
        path: a .safetensors, .pth, .pt or .bin file in any layout that `naming` knows, an export, a
            run's export, or a folder with timm's or transformers' config.json.
        model: timm's name, where neither the tensors nor a config.json tell it.
        model_args: its arguments.
        image_size: (height, width) in pixels that it is wanted at; positions are moved there
            (`move_positions`).  None: the size that it was trained at.
        source_size: that size, where nothing tells it.
        num_heads: attention heads, where the width is an unusual one.
        weights: the trained network or its average, where the file has both.
        prefix: of the encoder's names, where the file holds several.
        setting: that named the path, for messages.
        like: what the file is of where it does not say another: the model of a run.

    Raises:
        UserError: the path holds no encoder, or weights that do not fit, or numbers that are not
            finite.
    """
    read = read_file(path, weights=weights, prefix=prefix, setting=setting)
    return open_network(
        read,
        model=model,
        model_args=model_args,
        image_size=image_size,
        source_size=source_size,
        num_heads=num_heads,
        like=like,
    )


def open_network(
    read: ReadFile,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    source_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    like: Blueprint | None = None,
    allow: Sequence[str] = (),
) -> tuple[Encoder, LoadReport]:
    """The same of a file that was read; ``allow``: patterns of what may be missing or beside it."""
    known, source, network = read.known, read.source, read.network
    tensors = encoder_of(network.tensors)
    beside = [name for name in network.tensors if beside_encoder(name)]
    report = LoadReport(source, dropped=[*beside, *network.outside], notes=[network.told])
    if model is not None:
        known = _named(known, model, model_args or {}, source)
    elif like is not None and known.model is None:
        known, image_size = (
            replace(known, model=like.model, model_args=_sized(like)),
            like.image_size,
        )
    if known.model is not None:
        name, arguments = known.model, _arguments(known, image_size, source_size, tensors, source)
    else:
        found = infer_blueprint(
            tensors,
            source,
            num_heads=num_heads or (model_args or {}).get("num_heads"),
            image_size=image_size,
            source_size=source_size,
            known=known,
        )
        name, arguments = found.model, found.arguments()
        report.assumed += filter(None, [activation_note(tensors, known)])
    refuse_giants(arguments, tensors, source)
    empty = create_encoder(name, {**arguments, "device": "meta"}, source)
    if getattr(empty, "attn_pool", None) is not None:  # tokens are what is wanted, not one vector
        arguments |= {
            "global_pool": "avg" if empty.cls_token is None else "token",
            "fc_norm": False,
        }
        empty = create_encoder(name, {**arguments, "device": "meta"}, source)
    family = family_of(empty)
    refuse_other_family(empty, name, tensors, source)
    refuse_other_parts(empty.state_dict(), tensors, source)
    stated = {"num_heads": known.num_heads, "act_layer": known.act_layer}
    if known.source:
        refuse_other_settings(stated, empty, source, known.source)
    if family.stores_positions:
        tensors = _fitted(empty, tensors, report, known, source_size, image_size)
    else:
        report.assumed += clip_notes(empty, source_size or known.image_size)
        tensors, moved = family.fitted(empty, tensors, source)
        report.resized += moved
    allow = [f"*.{COUNTER}", *allow]
    # Compared before there is memory for what a small file claims.
    check_fit(empty, tensors, LoadReport(source), allow=allow)
    encoder = create_encoder(name, arguments, source)
    load_tensors(encoder, tensors, report, allow=allow)
    encoder.built_from = _blueprint(name, arguments, encoder)
    if known.model is None:
        report.assumed += _normalised_as_usual(encoder)
    return encoder, report


def _normalised_as_usual(encoder: Encoder) -> list[str]:
    """ImageNet's statistics for what no file names, and a note where timm has others.

    timm's of the name that was inferred are those of its own weights under that name; the files of
    DINO, DINOv2, iBOT, I-JEPA and MAE want ImageNet's.
    """
    own = getattr(encoder, "pretrained_cfg", {})
    usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    is_rgb = encoder.built_from.channels == len(IMAGENET_DEFAULT_MEAN)
    if not own or not is_rgb or {**own, **usual} == own:
        return []
    encoder.pretrained_cfg = {**own, **usual}
    return ["images are to be normalised by ImageNet's mean and std, as the file does not tell"]


def _blueprint(model: str, arguments: Mapping[str, Any], encoder: Encoder) -> Blueprint:
    """What a network of these arguments was built from."""
    family, patch = family_of(encoder), arguments.get("patch_size")
    own = {name: value for name, value in arguments.items() if name not in _SIZES}
    if patch is not None and not isinstance(patch, int):
        own["patch_size"] = patch
    if not own.get("fc_norm"):  # as every encoder of ours is built
        own.pop("fc_norm", None)
    return Blueprint(
        model=model,
        image_size=family.image_size(encoder),
        patch_size=patch if isinstance(patch, int) else None,
        channels=arguments.get("in_chans", 3),
        model_args=own,
        clip=family.clip(encoder),
    )


def shown_encoder(encoder: Encoder) -> str:
    """Its architecture in a few words, for a person."""
    family, built = family_of(encoder), encoder.built_from
    size = "x".join(
        map(str, (*(built.clip or ())[:1], *family.image_size(encoder), built.channels))
    )
    if family.hierarchical:
        return f"{size} ({built.model})"
    heads = encoder.blocks[0].attn.num_heads
    return (
        f"ViT {encoder.embed_dim} wide, {len(encoder.blocks)} blocks, {heads} heads, patch "
        f"{family.smallest_side(encoder)}, {size} ({built.model})"
    )


def _sized(blueprint: Blueprint) -> dict[str, Any]:
    """Arguments of a blueprint without the image size, which is wanted and not the file's."""
    return {name: each for name, each in blueprint.arguments().items() if name != "img_size"}


def _named(
    known: Description, model: str, model_args: Mapping[str, Any], source: str
) -> Description:
    """What is known, with a name from the user, which a config.json must not contradict."""
    name = Blueprint(model).architecture
    if known.model is None:
        return replace(known, model=name, model_args=dict(model_args))
    if Blueprint(known.model).architecture != name:
        raise UserError(
            f"model={model}, but {known.source} says that {source} is a {known.model}: leave model "
            "out"
        )
    return known


def _arguments(
    known: Description,
    image_size: tuple[int, int] | None,
    source_size: tuple[int, int] | None,
    tensors: Tensors,
    source: str,
) -> dict[str, Any]:
    """Of the described network, at the size that is wanted."""
    model, arguments = str(known.model), dict(known.model_args)
    family = family_of(model)
    clips = reads_clips(model)
    if not clips and not timm.is_model(model):
        raise UserError(
            f"{source}: timm {timm.__version__} knows no architecture {model!r}; a newer timm may"
        )
    size = image_size or arguments.get("img_size") or known.image_size or source_size
    if size is not None:
        arguments["img_size"] = size
    if family.hierarchical:
        return arguments
    if clips and known.clip is not None:
        arguments |= dict(zip(("num_frames", "tubelet_size"), known.clip, strict=True))
    arguments = family.file_arguments(tensors, arguments)
    if not clips and known.norm_eps not in (None, TIMM_EPS):
        arguments["norm_eps"] = known.norm_eps
    return arguments


def refuse_giants(arguments: Mapping[str, Any], tensors: Tensors, source: str) -> None:
    """Bounds before work: a description of a few bytes can ask for any number of blocks, pixels."""
    stages = (arguments.get(name, ()) for name in ("layers", "depths"))
    counts = [arguments.get("depth", 0)]
    counts += [n for each in stages if isinstance(each, list | tuple) for n in each]
    if any(isinstance(count, int) and count > len(tensors) for count in counts):
        raise UserError(
            f"{source}: its description asks for {max(counts)} blocks, the file has fewer tensors"
        )
    first = tensors.get("patch_embed.proj.weight")
    if first is None or first.ndim < 4 or 0 in first.shape:
        return
    width, patch = first.shape[0], first.shape[-1]
    size = arguments.get("img_size", 0)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    tokens = math.prod(side // patch for side in sides) * arguments.get("num_frames", 1)
    if tokens * max(width, arguments.get("embed_dim", width)) > _MOST_POSITIONS:
        shown = "x".join(map(str, sides))
        raise UserError(
            f"{source}: at {shown} pixels it has {tokens:,} patches, more than can be held: choose "
            "a lower size"
        )


def _fitted(
    encoder: Encoder,
    tensors: Tensors,
    report: LoadReport,
    known: Description,
    source_size: tuple[int, int] | None,
    image_size: tuple[int, int] | None,
) -> Tensors:
    """The file's tensors with positions of the encoder's grid."""
    embed, rows = encoder.patch_embed, embedded_prefix(encoder)
    refuse_unfilled(embed.img_size, embed.patch_size, report.source)
    table = next((tensors[name] for name in filter(is_position_table, tensors)), None)
    if table is None or table.ndim not in (2, 3):
        return tensors
    patch, source = embed.patch_size, report.source
    try:
        found = source_grid(table, (rows,), patch, source, known, source_size, image_size)
    except UserError:
        _refuse_other_prefix(encoder, table, source)
        raise
    report.assumed += [found.note] if found.note else []
    tensors, moved = move_all_positions(tensors, found.grid, embed.grid_size, rows)
    tensors, shared_out = give_each_its_own(tensors, encoder.state_dict())
    report.resized += moved
    report.notes += shared_out
    return tensors


def _refuse_other_prefix(encoder: Encoder, table: Tensor, source: str) -> None:
    """UserError where a table is that of a square if class and register tokens have rows in it."""
    alone = bool(embedded_prefix(encoder))  # the file's patches then stand alone
    count = table.shape[-2] - (0 if alone else encoder.num_prefix_tokens)
    if table.ndim == 3 and encoder.num_prefix_tokens and math.isqrt(max(0, count)) ** 2 == count:
        places = "places of patches only" if alone else "a place of every class and register token"
        raise UserError(
            f"{source}: its position table has {places}: set "
            f"model_args.no_embed_class={str(alone).lower()}"
        )


def clip_notes(encoder: Encoder, trained_at: tuple[int, int] | None) -> list[str]:
    """What is to be known about the positions of a video model, which no file stores."""
    family = family_of(encoder)
    clip, image_size = family.clip(encoder), family.image_size(encoder)
    if clip is None or trained_at == image_size:
        return []
    size = "x".join(map(str, (clip[0], *image_size)))
    if trained_at is None:
        return [
            f"clips of {size} are assumed, because the file does not tell; "
            "image_size=[height,width] says another"
        ]
    return [
        f"trained at {trained_at[0]}x{trained_at[1]} pixels: its positions are VideoMAE's fixed "
        f"table over all cubes, computed anew for clips of {size}, where a number stands for "
        "another place"
    ]
