"""Encoders out of files: our exports, timm's and transformers' folders, checkpoints in other
people's layouts.
"""

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
from timm.models.beit import Beit
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer

from patchmine.backbones.architecture import TIMM_EPS, infer_architecture
from patchmine.backbones.description import LARGEST_SIDE, Description, describe, find_weights
from patchmine.backbones.export import export_encoder, is_export
from patchmine.backbones.family import create_encoder, family_of
from patchmine.backbones.grids import source_grid
from patchmine.backbones.loading import (
    COUNTER,
    LoadReport,
    Tensors,
    check_fit,
    load_tensors,
    read_checkpoint,
)
from patchmine.backbones.names import reads_clips
from patchmine.backbones.naming import Weights
from patchmine.backbones.official import encoder_of, require_network, with_usual_eps
from patchmine.backbones.positions import RELATIVE, move_all_positions
from patchmine.backbones.record import Encoder
from patchmine.backbones.resnet import infer_resnet, is_resnet
from patchmine.backbones.tokens import embedded_prefix
from patchmine.backbones.video import VideoTransformer
from patchmine.errors import UserError, shown_name

__all__ = [
    "as_size",
    "export_encoder",
    "fill",
    "is_export",
    "load_encoder",
    "open_weights",
    "resize_encoder",
]

_MOST_POSITIONS = 2**28  # numbers of a position table, one gibibyte
_log = logging.getLogger("patchmine")


def as_size(value: int | Sequence[int] | None, setting: str) -> tuple[int, int] | None:
    """(height, width) from a number or a pair.  Raises UserError, naming ``setting``, for anything
    else.
    """
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise UserError(
            f"{setting}={value!r} is no size: give pixels, one number or (height, width)"
        )
    return sides[0], sides[1]


def load_encoder(path: str | Path, **how: Any) -> Encoder:
    """The encoder in a file or folder of weights; ``how`` and errors are those of `open_weights`.

    What had to be assumed about the file goes to the log.
    """
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
    """The encoder in an export folder, in a run's export, or in a .safetensors, .pth, .pt or .bin
    file, and a report.

    Args:
        path: a file in any layout that `naming` knows, or a folder of it with timm's or
        transformers' config.json.
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
    network = require_network(content, source, weights, prefix)
    tensors = encoder_of(network.tensors)
    known = with_usual_eps(describe(file, content), network)
    if "partner" in network.place.prefix:
        known = known.without_model()  # config.yaml names the first network of a pair
    if model is not None:
        known = _named(known, model, model_args or {}, source)
    report = LoadReport(source, dropped=network.outside)
    report.notes.append(network.told)
    heads = num_heads or (model_args or {}).get("num_heads")
    if known.model is None and is_resnet(tensors):
        name, arguments = infer_resnet(tensors, source)
    elif known.model is None:
        architecture = infer_architecture(
            tensors,
            source,
            num_heads=heads,
            image_size=image_size,
            source_size=source_size,
            known=known,
        )
        name, arguments = architecture.model, architecture.arguments()
    else:
        name, arguments = known.model, _arguments(known, image_size, tensors, source)
    _refuse_giants(arguments, tensors, source)
    empty = create_encoder(name, {**arguments, "device": "meta"}, source)
    if isinstance(empty, VideoTransformer):
        report.assumed += _clip_notes(empty, source_size or known.image_size)
    elif not isinstance(empty, ResNet):
        tensors = _fitted(empty, tensors, report, known, source_size, image_size)
    allow = [f"*.{COUNTER}"]
    check_fit(
        empty, tensors, LoadReport(source), allow=allow
    )  # before there is memory for what a small file claims
    encoder = create_encoder(name, arguments, source)
    load_tensors(encoder, tensors, report, allow=allow)
    return encoder, report


def _named(
    known: Description, model: str, model_args: Mapping[str, Any], source: str
) -> Description:
    """What is known, with a name from the user; a config.json beside the file that names another
    one contradicts.
    """
    name = model.removeprefix("timm/").split(".")[0]
    if known.model is None:
        return replace(known, model=name, model_args=dict(model_args))
    if known.model.removeprefix("timm/").split(".")[0] != name:
        raise UserError(
            f"model={model}, but {known.source} says that {source} is a {known.model}: leave model out"
        )
    return known


def _arguments(
    known: Description, image_size: tuple[int, int] | None, tensors: Tensors, source: str
) -> dict[str, Any]:
    """Of the described network, at the size that is wanted."""
    arguments = dict(known.model_args)
    assert known.model is not None
    if not reads_clips(known.model) and not timm.is_model(known.model):
        raise UserError(
            f"{source}: timm {timm.__version__} knows no architecture {known.model!r}; a newer timm may"
        )
    if family_of(known.model).convolutional:
        return arguments
    size = image_size or arguments.get("img_size") or known.image_size
    if size is not None:
        arguments["img_size"] = size
    if is_model_in_modules(known.model, {"beit"}) and "fc_norm.weight" not in tensors:
        arguments.setdefault("global_pool", "token")  # timm's default normalises after pooling
    if reads_clips(known.model) and known.clip is not None:
        arguments |= dict(zip(("num_frames", "tubelet_size"), known.clip, strict=True))
    if not reads_clips(known.model) and known.norm_eps not in (None, TIMM_EPS):
        arguments["norm_eps"] = known.norm_eps
    return arguments


def _refuse_giants(arguments: Mapping[str, Any], tensors: Tensors, source: str) -> None:
    """Bounds before work: a description of a few bytes can ask for any number of blocks, pixels and
    channels.
    """
    layers = arguments.get("layers", ())
    counts = [arguments.get("depth", 0), *(layers if isinstance(layers, list | tuple) else ())]
    if any(isinstance(count, int) and count > len(tensors) for count in counts):
        raise UserError(
            f"{source}: its description asks for {max(counts)} blocks and the file has fewer tensors"
        )
    first = tensors.get("patch_embed.proj.weight")
    if first is None or first.ndim < 4 or 0 in first.shape:
        return
    width, patch = first.shape[0], first.shape[-1]
    size = arguments.get("img_size", 0)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    times = arguments.get("num_frames", 1)
    tokens = math.prod(side // patch for side in sides) * times
    if tokens * max(width, arguments.get("embed_dim", width)) > _MOST_POSITIONS:
        shown = "x".join(map(str, sides))
        raise UserError(
            f"{source}: at {shown} pixels it has {tokens:,} patches, more than can be held: choose a lower size"
        )


def _fitted(
    encoder: VisionTransformer | Beit,
    tensors: Tensors,
    report: LoadReport,
    known: Description,
    source_size: tuple[int, int] | None,
    image_size: tuple[int, int] | None,
) -> Tensors:
    """The file's tensors with positions of the encoder's grid."""
    _check_filled(encoder, encoder.patch_embed.img_size, report.source)
    table = next(
        (t for name, t in tensors.items() if name == "pos_embed" or name.endswith(RELATIVE)), None
    )
    if table is None or table.ndim not in (2, 3):
        return tensors
    patch, rows = encoder.patch_embed.patch_size, embedded_prefix(encoder)
    found = source_grid(table, (rows,), patch, report.source, known, source_size, image_size)
    report.assumed += [found.note] if found.note else []
    tensors, moved = move_all_positions(tensors, found.grid, encoder.patch_embed.grid_size, rows)
    report.resized += moved
    return tensors


def _clip_notes(encoder: VideoTransformer, trained_at: tuple[int, int] | None) -> list[str]:
    """What is to be known about the positions of a video model, which no file stores."""
    embed = encoder.patch_embed
    size = "x".join(map(str, (embed.num_frames, *embed.img_size)))
    if trained_at is None:
        return [
            f"clips of {size} are assumed, because the file does not tell; image_size=[height,width] says another"
        ]
    if trained_at == embed.img_size:
        return []
    before = "x".join(map(str, trained_at))
    return [
        f"trained at {before} pixels: its positions are VideoMAE's fixed table over all cubes, computed anew for clips "
        f"of {size}, where a number stands for another place"
    ]


def _check_filled(
    encoder: VisionTransformer | Beit, image_size: tuple[int, int], source: str
) -> None:
    patch = encoder.patch_embed.patch_size[-2:]
    if any(side % step for side, step in zip(image_size, patch, strict=True)):
        size, step = (
            "x".join(map(str, image_size)),
            patch[0] if patch[0] == patch[1] else "x".join(map(str, patch)),
        )
        raise UserError(f"image_size={size} is not a multiple of the patch size {step} of {source}")


def resize_encoder(encoder: Encoder, image_size: tuple[int, int]) -> None:
    """Make an encoder expect images of ``image_size`` (height, width), in place; its positions are
    moved there.

    A ResNet takes any.  Raises UserError for a size that its patches do not fill.
    """
    if isinstance(encoder, ResNet) or tuple(encoder.patch_embed.img_size) == tuple(image_size):
        return
    _check_filled(encoder, image_size, "the weights")
    source = encoder.patch_embed.grid_size
    if isinstance(encoder, VideoTransformer):
        trained_at = encoder.patch_embed.img_size
        encoder.set_input_size(image_size)
        for note in _clip_notes(encoder, trained_at):
            _log.warning(note)
        return
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm indexes relative tables
        encoder.set_input_size(image_size)
    # Written anew, because not every timm that we allow knows that a table may be of a rectangle.
    moved, _ = move_all_positions(
        before, source, encoder.patch_embed.grid_size, embedded_prefix(encoder)
    )
    encoder.load_state_dict(moved)


def fill(encoder: Encoder, other: Encoder, source: str) -> LoadReport:
    """Load the weights of ``other``; positions, absolute and relative, are moved from its grid.

    Returns what became of every tensor.  Raises UserError, naming ``source``, for tensors that do
    not fit.
    """
    report = LoadReport(source)
    tensors = other.state_dict()
    videos = [isinstance(each, VideoTransformer) for each in (other, encoder)]
    if all(videos):
        report.assumed += _clip_notes(encoder, other.patch_embed.img_size)
    elif not any(videos) and not isinstance(other, ResNet) and not isinstance(encoder, ResNet):
        grids = [tuple(each.patch_embed.grid_size) for each in (other, encoder)]
        tensors, report.resized = move_all_positions(
            tensors, grids[0], grids[1], embedded_prefix(other)
        )
    load_tensors(encoder, tensors, report, allow=[f"*.{COUNTER}"])
    return report
