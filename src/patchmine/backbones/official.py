"""Checkpoints of the official MAE, HPM, VideoMAE and DINO code: their layout, and their names for
our tensors.

Formats: facebookresearch/mae (``{"model": ...}``), Haochen-Wang409/HPM (``{"state_dict": ...,
"ema_state_dict": ...}``), MCG-NJU/VideoMAE (`models.videomae`), facebookresearch/dino (the bare
dictionary, or ``{"teacher": ..., "student": ...}``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from patchmine.backbones.architecture import (
    DECODER_HEADS,
    VIDEO_DECODER_HEADS,
    Architecture,
    count_blocks,
    infer_architecture,
    known_heads,
)
from patchmine.backbones.description import Description, describe, find_weights
from patchmine.backbones.loading import Tensors, read_checkpoint
from patchmine.backbones.naming import Network, Weights, find_network, flatten
from patchmine.backbones.positions import fixed_table, move_all_positions
from patchmine.errors import UserError, foreign_parser, shown_name

T = TypeVar("T")

# Beginnings of names that are no encoder's: classifiers, projections and other things that are
# trained and thrown away.
_HEADS = (
    *("head.", "heads.", "head_dist.", "fc.", "classifier.", "pooler."),
    *("neck.", "predictor.", "projector.", "projection_head.", "queue", "vis_mask_token"),
)
_TRANSFORMERS_EPS = 1e-12
_CLIP = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")

# Reference prefix -> ours; the encoder's names are timm's and only get `encoder.` in front.
_NAMES = {
    "mask_token": "decoder_input.mask_token",
    "decoder_embed.": "decoder_input.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
    "decoder_blocks_losspred.": "predictor.blocks.",
    "decoder_norm_losspred.": "predictor.norm.",
    "decoder_pred_losspred.": "predictor.head.",
}
_POSITIONS = "decoder_pos_embed"


def from_reference_names(tensors: Mapping[str, T], *, teacher: bool = False) -> dict[str, T]:
    """MAE's and HPM's names -> ours.  The fixed table ``decoder_pos_embed`` has no counterpart in
    our state and is left out.

    ``teacher``: the names within our HPM's teacher, which has no pixel decoder: that is left out
    too.
    """
    ours = {}
    for name, value in tensors.items():
        own = _own_name(name)
        if name == _POSITIONS or (teacher and own.startswith("decoder.")):
            continue
        ours[f"teacher.{own}" if teacher else own] = value
    return ours


def _own_name(name: str) -> str:
    for theirs, own in _NAMES.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return f"encoder.{name}"


def to_reference_names(tensors: Mapping[str, T], *, teacher: bool = False) -> dict[str, T]:
    """Our names -> MAE's and HPM's, of the student or of the ``teacher``.  The inverse of
    `from_reference_names`.
    """
    if teacher:
        inside = {
            name.removeprefix("teacher."): value
            for name, value in tensors.items()
            if name.startswith("teacher.")
        }
        return to_reference_names(inside)
    return {
        _reference_name(name): value
        for name, value in tensors.items()
        if not name.startswith(("teacher.", "foreign."))
    }


def _reference_name(name: str) -> str:
    for theirs, own in _NAMES.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name.removeprefix("encoder.")


def encoder_tensors(content: Mapping[str, Any], source: str, weights: Weights = "auto") -> Tensors:
    """The encoder's tensors of a checkpoint in any known layout, under timm's names; decoders and
    heads left out.
    """
    return encoder_of(require_network(content, source, weights).tensors)


def encoder_of(tensors: Tensors) -> Tensors:
    """A network's tensors without its decoder, classifier and projection heads."""
    return {name: tensor for name, tensor in tensors.items() if not _beside_encoder(name)}


def _beside_encoder(name: str) -> bool:
    return name.startswith(("mask_token", "decoder", *_HEADS))


def require_network(
    content: Mapping[str, Any], source: str, weights: Weights = "auto", prefix: str | None = None
) -> Network:
    """The network of a file that is wanted (`find_network`).  Raises UserError where the file holds
    none.
    """
    with foreign_parser(
        lambda reason: UserError(
            f"{source} cannot be understood as an encoder's weights ({reason})"
        )
    ):
        network = find_network(content, source, weights=weights, prefix=prefix)
    if network is not None:
        return network
    names = list(flatten(content))
    if not names:
        raise UserError(
            f"{source} holds no tensors under a known name (model, module, state_dict, ema_state_dict, teacher): "
            "give a state dict"
        )
    if any(name.endswith(_CLIP) for name in names):
        raise UserError(f"{source} is a CLIP network: to learn from it set method.target=clip")
    lacking = "patch_embed.proj.weight, or what mmpretrain, transformers and torchvision call it, no pos_embed"
    held = ", ".join(shown_name(name) for name in names[:3])
    raise UserError(
        f"{source} holds no plain vision transformer (no {lacking}); it holds {held}, ..."
    )


def with_usual_eps(known: Description, network: Network) -> Description:
    """What is known, with the eps of transformers' ViT and ViTMAE, whose files do not tell it
    without a config.json.
    """
    if (
        known.norm_eps is None
        and network.place.naming == "transformers"
        and "blocks.0.ls1.gamma" not in network.tensors
    ):
        return replace(known, norm_eps=_TRANSFORMERS_EPS)
    return known


@dataclass(frozen=True)
class DecoderShape:
    """Width, blocks, heads, output values, MLP ratio and biases of a reference decoder."""

    width: int
    depth: int
    num_heads: int
    values: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """An official file, taken apart.

    ``tensors`` are the chosen weights and ``teacher`` HPM's EMA weights, all under reference names;
    ``decoder`` is None where only the encoder is there or wanted.  ``settings`` are the
    command-line arguments that the file kept, if any; ``resized`` tells which position tables were
    resampled.
    """

    source: str
    method: Literal["mae", "hpm"]
    architecture: Architecture
    tensors: Tensors
    teacher: Tensors | None
    decoder: DecoderShape | None
    settings: dict[str, Any]  # of the method, as far as the file tells
    resized: list[str]
    dropped: list[str] = field(
        default_factory=list
    )  # names in the file that are no part of the network
    notes: list[str] = field(default_factory=list)

    @property
    def encoder(self) -> Tensors:
        """The encoder's tensors under timm's names."""
        return encoder_of(self.tensors)

    def describe(self) -> str:
        """File, method and sizes in one line."""
        if self.decoder is None:
            parts = "encoder only"
        else:
            parts = f"decoder {self.decoder.width} wide, {self.decoder.depth} blocks, {self.decoder.num_heads} heads"
            parts += ", EMA teacher" if self.teacher is not None else ""
        return f"{self.source}: {self.method.upper()}, {self.architecture.describe()}, {parts}"


def read_official(
    file: str | Path,
    *,
    weights: Weights = "auto",
    prefix: str | None = None,
    image_size: tuple[int, int] | None = None,
    source_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    with_decoder: bool = True,
) -> Checkpoint:
    """Open the checkpoint ``file``, which may also be a folder with a config.json; sizes are read
    off the tensors.

    Args:
        file: any layout that `naming` knows.
        weights: the trained network or its average.
        prefix: of the encoder's tensors, where the file holds several encoders.
        image_size: the size that the model is wanted at; positions of another one are moved.
        source_size: the size that it was trained at, where nothing else tells.
        num_heads: needed for unusual widths only, as ``decoder_num_heads``.
        decoder_num_heads: of the decoder.
        with_decoder: read the decoder too, where there is one.

    Raises:
        UserError: the file is missing, broken or of another kind.
    """
    path = find_weights(Path(file)) if Path(file).is_dir() else Path(file)
    content = read_checkpoint(path)
    source = str(file)
    network = require_network(content, source, weights, prefix)
    known = with_usual_eps(describe(path, content), network)
    tensors, teacher = network.tensors, network.average
    is_hpm = any(name.startswith("decoder_pred_losspred.") for name in tensors)
    architecture = infer_architecture(
        encoder_of(tensors),
        source,
        num_heads=num_heads,
        image_size=image_size,
        source_size=source_size,
        known=known,
    )
    teacher = teacher if is_hpm else None
    tensors, resized = _fit_positions(tensors, architecture)
    if teacher is not None:
        teacher, likewise = _fit_positions(teacher, architecture)
        resized += ["teacher's pos_embed likewise"] if likewise else []
    usual = DECODER_HEADS if architecture.clip is None else VIDEO_DECODER_HEADS
    heads = decoder_num_heads or known.decoder_num_heads
    decoder = _decoder_shape(tensors, source, usual, heads) if with_decoder else None
    used = set(network.average_names) if teacher is not None and decoder is not None else set()
    return Checkpoint(
        source=source,
        method="hpm" if is_hpm else "mae",
        architecture=architecture,
        tensors=tensors,
        teacher=teacher,
        decoder=decoder,
        settings=_method_settings(content.get("args"), known),
        resized=resized,
        dropped=[name for name in network.outside if name not in used],
        notes=[note for note in (network.told, architecture.note) if note],
    )


def _method_settings(args: Any, known: Description) -> dict[str, Any]:
    """Settings of the method that the file or its config.json tells; of another script's arguments
    only these count.
    """
    stated = {**known.method, **(vars(args) if isinstance(args, argparse.Namespace) else {})}
    ratio, normalised = stated.get("mask_ratio"), stated.get("norm_pix_loss")
    found: dict[str, Any] = {}
    if isinstance(ratio, float) and 0 < ratio < 1:
        found["mask_ratio"] = ratio
    if isinstance(normalised, bool):
        found["norm_pix_loss"] = normalised
    eps = stated.get("decoder_norm_eps", known.norm_eps)  # transformers gives both parts the same
    if isinstance(eps, float) and 0 < eps < 1:
        found["decoder_norm_eps"] = eps
    return found


def _fit_positions(tensors: Tensors, architecture: Architecture) -> tuple[Tensors, list[str]]:
    """The tensors with their positions moved to the grid that is wanted, and a list that says so."""
    if "pos_embed" not in tensors:
        return tensors, []
    num_prefix = tensors["pos_embed"].shape[1] - math.prod(architecture.table_grid)
    return move_all_positions(tensors, architecture.table_grid, architecture.grid, num_prefix)


def _decoder_shape(
    tensors: Tensors, source: str, usual: Mapping[int, int], num_heads: int | None
) -> DecoderShape | None:
    if not any(name.startswith("decoder_") for name in tensors):
        return None
    ranks = {
        "decoder_embed.weight": 2,
        "decoder_pred.weight": 2,
        "mask_token": 3,
        "decoder_blocks.0.norm1.weight": 1,
        "decoder_blocks.0.mlp.fc1.weight": 2,
    }
    lacking = [
        name for name, rank in ranks.items() if name not in tensors or tensors[name].ndim != rank
    ]
    if lacking:
        raise UserError(
            f"{source} holds a part of a decoder only (no {', '.join(lacking)}): is the file complete?"
        )
    width = tensors["decoder_embed.weight"].shape[0]
    heads = known_heads(width, usual, "decoder_num_heads", num_heads)
    return DecoderShape(
        width,
        count_blocks(tensors, source, "decoder_blocks."),
        heads,
        tensors["decoder_pred.weight"].shape[0],
        tensors["decoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        "decoder_blocks.0.attn.qkv.bias" in tensors,
    )


def dropped_names(checkpoint: Checkpoint, *, full: bool) -> list[str]:
    """Known tensors of the file with no place in what is imported.

    Without the decoder that is all but the encoder; otherwise the fixed table, and the pixel
    decoder of HPM's teacher.
    """
    if not full:
        return [name for name in checkpoint.tensors if _beside_encoder(name)]
    dropped = [name for name in checkpoint.tensors if name == _POSITIONS or name.startswith(_HEADS)]
    kept = to_reference_names(
        from_reference_names(checkpoint.teacher or {}, teacher=True), teacher=True
    )
    return dropped + [
        f"ema_state_dict.{name}" for name in checkpoint.teacher or {} if name not in kept
    ]


def check_decoder_positions(tensors: Tensors, size: tuple[int, int], source: str) -> None:
    """Compare the file's decoder positions with the fixed table of its own grid, ``size`` in
    patches.

    Raises UserError when they differ, because the decoder would be fed positions that it was not
    trained with.
    """
    stored = tensors.get(_POSITIONS)
    if stored is None:
        return
    if stored.ndim != 3 or stored.shape[1] != math.prod(size) + 1:
        raise UserError(
            f"{source}: {_POSITIONS} has shape {tuple(stored.shape)}, not that of {size[0]}x{size[1]} patches: import "
            "the encoder only, with what=encoder"
        )
    table = fixed_table(stored.shape[2], size)
    difference = float((stored[0, 1:] - table).abs().max())
    if not difference <= 1e-4 or not torch.all(stored[0, 0] == 0):
        raise UserError(
            f"{source}: {_POSITIONS} differs from the fixed sine-cosine table by up to {difference:.3g}, so it was "
            "trained and cannot be used here: import the encoder only, with what=encoder"
        )
