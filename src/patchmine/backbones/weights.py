"""Encoders out of files: our exports, timm's and transformers' folders, other people's layouts."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model_in_modules

from patchmine.backbones import description
from patchmine.backbones.architecture import TIMM_EPS
from patchmine.backbones.description import Description, describe_weights, find_weights
from patchmine.backbones.family import create_encoder, family_of, infer_blueprint
from patchmine.backbones.loading import (
    COUNTER,
    LoadReport,
    Tensors,
    check_fit,
    load_tensors,
    read_checkpoint,
)
from patchmine.backbones.names import reads_clips
from patchmine.backbones.naming import Weights, encoder_of, find_network
from patchmine.backbones.official import with_usual_eps
from patchmine.backbones.positions import (
    give_each_its_own,
    is_position_table,
    move_all_positions,
    source_grid,
)
from patchmine.backbones.record import Blueprint, Encoder
from patchmine.backbones.tokens import embedded_prefix, refuse_unfilled
from patchmine.errors import UserError, shown_name

_MOST_POSITIONS = 2**28  # numbers of a position table, one gibibyte
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

    Raises:
        UserError: the path holds no encoder, or weights that do not fit, or numbers that are not
            finite.
    """
    file = find_weights(Path(path), setting or "file")
    source = shown_name(path) if setting is None else f"{setting}={shown_name(path)}"
    content = read_checkpoint(file, setting or "file")
    network = find_network(content, source, weights, prefix)
    tensors = encoder_of(network.tensors)
    known = with_usual_eps(describe_weights(file, content), network)
    if "partner" in network.place.prefix:
        # config.yaml names the first network of a pair
        known = replace(known, model=None, model_args={})
    if model is not None:
        known = _named(known, model, model_args or {}, source)
    report = LoadReport(source, dropped=network.outside, notes=[network.told])
    if known.model is not None:
        name, arguments = known.model, _arguments(known, image_size, tensors, source)
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
    refuse_giants(arguments, tensors, source)
    empty = create_encoder(name, {**arguments, "device": "meta"}, source)
    family = family_of(empty)
    if family.stores_positions:
        tensors = _fitted(empty, tensors, report, known, source_size, image_size)
    else:
        report.assumed += clip_notes(empty, source_size or known.image_size)
    # Compared before there is memory for what a small file claims.
    allow = [f"*.{COUNTER}"]
    check_fit(empty, tensors, LoadReport(source), allow=allow)
    encoder = create_encoder(name, arguments, source)
    load_tensors(encoder, tensors, report, allow=allow)
    if family.convolutional:
        arguments.pop("img_size", None)  # timm's ResNets know no such argument
    encoder.built_from = Blueprint(
        model=name,
        image_size=family.image_size(encoder),
        channels=arguments.get("in_chans", 3),
        model_args=arguments,
        clip=family.clip(encoder),
    )
    return encoder, report


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
    known: Description, image_size: tuple[int, int] | None, tensors: Tensors, source: str
) -> dict[str, Any]:
    """Of the described network, at the size that is wanted."""
    model, arguments = str(known.model), dict(known.model_args)
    family = family_of(model)
    clips = reads_clips(model)
    if not clips and not timm.is_model(model):
        raise UserError(
            f"{source}: timm {timm.__version__} knows no architecture {model!r}; a newer timm may"
        )
    size = image_size or arguments.get("img_size") or known.image_size
    if size is not None:
        arguments["img_size"] = size
    if family.convolutional:
        return arguments
    if clips and known.clip is not None:
        arguments |= dict(zip(("num_frames", "tubelet_size"), known.clip, strict=True))
    if is_model_in_modules(model, {"beit"}) and "fc_norm.weight" not in tensors:
        arguments.setdefault("global_pool", "token")  # timm's default normalises after pooling
    if not clips and known.norm_eps not in (None, TIMM_EPS):
        arguments["norm_eps"] = known.norm_eps
    return arguments


def refuse_giants(arguments: Mapping[str, Any], tensors: Tensors, source: str) -> None:
    """Bounds before work: a description of a few bytes can ask for any number of blocks, pixels."""
    layers = arguments.get("layers", ())
    counts = [arguments.get("depth", 0), *(layers if isinstance(layers, list | tuple) else ())]
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
    found = source_grid(table, (rows,), patch, source, known, source_size, image_size)
    report.assumed += [found.note] if found.note else []
    tensors, moved = move_all_positions(tensors, found.grid, embed.grid_size, rows)
    tensors, shared_out = give_each_its_own(tensors, encoder.state_dict())
    report.resized += moved
    report.notes += shared_out
    return tensors


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


def resize_encoder(encoder: Encoder, image_size: tuple[int, int]) -> None:
    """Make an encoder expect another image size (height, width), in place; positions are moved."""
    family = family_of(encoder)
    trained_at = family.image_size(encoder)
    if family.convolutional or trained_at == tuple(image_size):
        return
    source, patch = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size
    refuse_unfilled(image_size, patch, "the weights")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm indexes relative tables
        encoder.set_input_size(image_size)
    for note in clip_notes(encoder, trained_at):
        _log.warning(note)
    if family.stores_positions:
        # Written anew, because not every timm knows that a table may be of a rectangle.
        grid, rows = encoder.patch_embed.grid_size, embedded_prefix(encoder)
        encoder.load_state_dict(move_all_positions(before, source, grid, rows)[0])
    built = getattr(encoder, "built_from", None)
    if built is not None:
        own = {name: value for name, value in built.model_args.items() if name != "img_size"}
        encoder.built_from = replace(built, image_size=tuple(image_size), model_args=own)


def fill(encoder: Encoder, other: Encoder, source: str) -> LoadReport:
    """Load the weights of ``other``, positions moved from its grid; what became of every tensor."""
    report, tensors = LoadReport(source), other.state_dict()
    families = family_of(other), family_of(encoder)
    if all(family.stores_positions for family in families):
        grids = [tuple(each.patch_embed.grid_size) for each in (other, encoder)]
        rows = embedded_prefix(other)
        tensors, report.resized = move_all_positions(tensors, grids[0], grids[1], rows)
        tensors, report.notes = give_each_its_own(tensors, encoder.state_dict())
    elif families[0] is families[1]:
        report.assumed += clip_notes(encoder, families[0].image_size(other))
    load_tensors(encoder, tensors, report, allow=[f"*.{COUNTER}"])
    return report
