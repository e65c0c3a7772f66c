"""Checkpoints of the official MAE, HPM, VideoMAE and DINO code: their layout, and their names for our tensors.

Formats: facebookresearch/mae (``{"model": ...}``), Haochen-Wang409/HPM (``{"state_dict": ..., "ema_state_dict":
...}``), MCG-NJU/VideoMAE (`models.videomae`), facebookresearch/dino (the bare dictionary, or ``{"teacher": ...,
"student": ...}``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from patchmine.errors import UserError
from patchmine.models.architecture import (
    DECODER_HEADS,
    VIDEO_DECODER_HEADS,
    Architecture,
    count_blocks,
    infer_architecture,
    known_heads,
)
from patchmine.models.loading import Tensors, read_checkpoint, resample_positions, tensors_only
from patchmine.models.videomae import from_videomae_names, is_videomae, teacher_of

T = TypeVar("T")
Weights = Literal["student", "teacher"]

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
# HPM's secondary mask token, off in all its recipes (spec hpm.md, section 3.1).
_UNUSED = ("vis_mask_token",)


def from_reference_names(tensors: Mapping[str, T], *, teacher: bool = False) -> dict[str, T]:
    """MAE's and HPM's names -> ours.  The fixed table ``decoder_pos_embed`` has no counterpart in our state and is
    left out.

    ``teacher``: the names within our HPM's teacher, which has no pixel decoder: that is left out too.
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
    """Our names -> MAE's and HPM's, of the student or of the ``teacher``.  The inverse of `from_reference_names`."""
    if teacher:
        inside = {
            name.removeprefix("teacher."): value for name, value in tensors.items() if name.startswith("teacher.")
        }
        return to_reference_names(inside)
    return {
        _reference_name(name): value for name, value in tensors.items() if not name.startswith(("teacher.", "foreign."))
    }


def _reference_name(name: str) -> str:
    for theirs, own in _NAMES.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name.removeprefix("encoder.")


def encoder_tensors(content: Mapping[str, Any], source: str, weights: Weights = "student") -> Tensors:
    """The encoder's tensors of a checkpoint in any known layout, under timm's names; decoders and heads left out."""
    tensors, _ = _networks(content, source, weights)
    return {name: tensor for name, tensor in tensors.items() if not _beside_encoder(name)}


def _beside_encoder(name: str) -> bool:
    return name.startswith(("mask_token", "decoder_", "head.", *_UNUSED))


def _networks(content: Mapping[str, Any], source: str, weights: Weights) -> tuple[Tensors, Tensors | None]:
    """The wanted weights of a checkpoint, and HPM's EMA weights where there are any, under MAE's names."""
    stored = content.get("ema_state_dict")
    teacher = tensors_only(stored) if isinstance(stored, Mapping) else None
    if weights == "teacher" and _has_teacher(content):
        return _state_dict(content, source, weights), teacher
    tensors = _state_dict(content, source, "student")
    if is_videomae(tensors):  # student and teacher lie in one dictionary
        taught = teacher_of(tensors)
        teacher = None if taught is None else from_videomae_names(taught)
        tensors = from_videomae_names(tensors)
    if weights == "student":
        return tensors, teacher
    if teacher is None:
        raise UserError(f"{source} holds no teacher weights (no ema_state_dict): use weights=student")
    return teacher, teacher


def _has_teacher(content: Mapping[str, Any]) -> bool:
    return any(isinstance(content.get(key), Mapping) for key in ("ema_state_dict", "teacher"))


def _state_dict(content: Mapping[str, Any], source: str, weights: Weights) -> Tensors:
    """The one state dict of a checkpoint that is wanted, without prefixes."""
    # Of DINO's two networks the teacher is the one to use, as its authors say.
    order = ("ema_state_dict", "teacher") if weights == "teacher" else ("state_dict", "model", "module", "teacher")
    inner = next((content[key] for key in order if isinstance(content.get(key), Mapping)), content)
    tensors = tensors_only(inner)
    for prefix in ("teacher.backbone.", "backbone."):
        if any(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if not tensors:
        raise UserError(
            f"{source} holds no tensors under a known name (model, module, state_dict, ema_state_dict, teacher): "
            "give a state dict"
        )
    return tensors


@dataclass(frozen=True)
class DecoderShape:
    """Width, blocks, heads and output values of a reference decoder."""

    width: int
    depth: int
    num_heads: int
    values: int


@dataclass(frozen=True)
class Checkpoint:
    """An official file, taken apart.

    ``tensors`` are the chosen weights and ``teacher`` HPM's EMA weights, all under reference names; ``decoder`` is
    None where only the encoder is there or wanted.  ``settings`` are the command-line arguments that the file kept, if
    any; ``resized`` tells which position tables were resampled.
    """

    source: str
    method: Literal["mae", "hpm"]
    architecture: Architecture
    tensors: Tensors
    teacher: Tensors | None
    decoder: DecoderShape | None
    settings: dict[str, Any]
    resized: list[str]

    @property
    def encoder(self) -> Tensors:
        """The encoder's tensors under timm's names."""
        return {name: tensor for name, tensor in self.tensors.items() if not _beside_encoder(name)}

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
    weights: Weights = "student",
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    with_decoder: bool = True,
) -> Checkpoint:
    """Take an official MAE, VideoMAE or HPM checkpoint apart; sizes are read off the tensors.

    ``image_size`` is the size that the model is wanted at; positions of another one are resampled.  ``num_heads`` and
    ``decoder_num_heads`` are needed for unusual widths only.  Raises UserError for a file that is missing, broken or of
    another kind.
    """
    content = read_checkpoint(file)
    source = str(file)
    tensors, teacher = _networks(content, source, weights)
    encoder = {name: tensor for name, tensor in tensors.items() if not _beside_encoder(name)}
    architecture = infer_architecture(encoder, source, num_heads=num_heads, image_size=image_size)
    is_hpm = teacher is not None or any(name.startswith("decoder_pred_losspred.") for name in tensors)
    resized = _fit_positions(tensors, architecture.grid)
    if teacher is not None and _fit_positions(teacher, architecture.grid):
        resized.append("teacher's pos_embed likewise")
    usual = DECODER_HEADS if architecture.clip is None else VIDEO_DECODER_HEADS
    args = content.get("args")
    return Checkpoint(
        source=source,
        method="hpm" if is_hpm else "mae",
        architecture=architecture,
        tensors=tensors,
        teacher=teacher,
        decoder=_decoder_shape(tensors, source, usual, decoder_num_heads) if with_decoder else None,
        settings=vars(args) if isinstance(args, argparse.Namespace) else {},
        resized=resized,
    )


def _fit_positions(tensors: Tensors, grid: tuple[int, int]) -> list[str]:
    """Resample ``pos_embed`` in place where it has another number of patches; says so in a list of one."""
    prefix = 1 if "cls_token" in tensors else 0
    count = tensors["pos_embed"].shape[1] - prefix if "pos_embed" in tensors else grid[0] * grid[1]
    if count == grid[0] * grid[1]:
        return []
    tensors["pos_embed"] = resample_positions(tensors["pos_embed"], grid, prefix)
    side = math.isqrt(count)
    return [f"pos_embed from {side}x{side} to {grid[0]}x{grid[1]} patches"]


def _decoder_shape(
    tensors: Tensors, source: str, usual: Mapping[int, int], num_heads: int | None
) -> DecoderShape | None:
    names = ("decoder_embed.weight", "decoder_pred.weight", "mask_token", "decoder_blocks.0.norm1.weight")
    present = [name for name in names if name in tensors]
    if not any(name.startswith("decoder_") for name in tensors):
        return None
    if len(present) < len(names):
        lacking = ", ".join(name for name in names if name not in present)
        raise UserError(f"{source} holds a part of a decoder only (no {lacking}): is the file complete?")
    width = tensors["decoder_embed.weight"].shape[0]
    heads = known_heads(width, usual, "decoder_num_heads", num_heads)
    return DecoderShape(width, count_blocks(tensors, "decoder_blocks."), heads, tensors["decoder_pred.weight"].shape[0])


def dropped_names(checkpoint: Checkpoint, *, full: bool) -> list[str]:
    """Known tensors of the file with no place in what is imported.

    Without the decoder that is all but the encoder; otherwise the fixed table, and the pixel decoder of HPM's teacher.
    """
    if not full:
        return [name for name in checkpoint.tensors if _beside_encoder(name)]
    dropped = [name for name in checkpoint.tensors if name in (_POSITIONS, *_UNUSED) or name.startswith("head.")]
    kept = to_reference_names(from_reference_names(checkpoint.teacher or {}, teacher=True), teacher=True)
    return dropped + [f"ema_state_dict.{name}" for name in checkpoint.teacher or {} if name not in kept]


def check_decoder_positions(tensors: Tensors, table: Tensor, source: str) -> None:
    """Compare the file's decoder positions with our fixed ``table`` (L, W), where both are of the same size.

    Raises UserError when they differ, because the decoder would be fed positions that it was not trained with.
    """
    stored = tensors.get(_POSITIONS)
    if stored is None or stored.shape[1] != table.shape[0] + 1:
        return
    difference = float((stored[0, 1:] - table).abs().max())
    if difference > 1e-4 or not torch.all(stored[0, 0] == 0):
        raise UserError(
            f"{source}: {_POSITIONS} differs from the fixed sine-cosine table by up to {difference:.3g}, so it was "
            "trained and cannot be used here: import the encoder only"
        )
