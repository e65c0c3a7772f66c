"""Whole files of other people's pre-training: an encoder and, of MAE and HPM, what trained it.

Formats: facebookresearch/mae (``{"model": ...}``), Haochen-Wang409/HPM (``{"state_dict": ...,
"ema_state_dict": ...}``), MCG-NJU/VideoMAE, facebookresearch/dino, and what `naming` knows.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from patchmine.backbones.architecture import (
    DECODER_HEADS,
    VIDEO_DECODER_HEADS,
    Architecture,
    count_blocks,
    infer_architecture,
    known_heads,
)
from patchmine.backbones.description import Description
from patchmine.backbones.loading import Tensors
from patchmine.backbones.naming import beside_encoder, encoder_of
from patchmine.backbones.positions import fixed_table, move_all_positions
from patchmine.backbones.reading import ReadFile
from patchmine.backbones.reference import from_reference_names, to_reference_names
from patchmine.errors import UserError

_POSITIONS = "decoder_pos_embed"
# Which of MAE's published files with a decoder predict normalised pixels.  Kaiming He, when he
# named the full ones in facebookresearch/mae (10 January 2022): "these models reconstruct
# normalized pixels"; those for pictures do not (its PRETRAIN.md: "for visualization [...] turn off
# --norm_pix_loss").
_PUBLISHED = {
    re.compile(r"mae_pretrain_vit_(base|large|huge)_full\.pth"): True,
    re.compile(r"mae_visualize_vit_(base|large|huge)(_ganloss)?\.pth"): False,
}
_RANKS = {  # of the tensors that a decoder's shape is read off
    "decoder_embed.weight": 2,
    "decoder_pred.weight": 2,
    "mask_token": 3,
    "decoder_blocks.0.norm1.weight": 1,
    "decoder_blocks.0.mlp.fc1.weight": 2,
}


@dataclass(frozen=True)
class OfficialFile:
    """A file taken apart.

    ``tensors`` are the chosen weights and ``teacher`` HPM's EMA weights, all under reference names;
    ``decoder`` has the settings that make one, None where only the encoder is there or wanted;
    ``settings`` are others of the method that the file tells; ``resized`` tells which position
    tables were moved; ``dropped`` are names in the file that are no part of the network.
    """

    source: str
    method: Literal["mae", "hpm"]
    architecture: Architecture
    tensors: Tensors
    teacher: Tensors | None
    decoder: dict[str, Any] | None
    settings: dict[str, Any]
    resized: list[str]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def encoder(self) -> Tensors:
        """The encoder's tensors under timm's names."""
        return encoder_of(self.tensors)

    def summary(self) -> str:
        """File, method and sizes in one line."""
        parts = "encoder only"
        if self.decoder is not None:
            width, depth, heads, *_ = self.decoder.values()
            parts = f"decoder {width} wide, {depth} blocks, {heads} heads"
            parts += ", EMA teacher" if self.teacher is not None else ""
        return f"{self.source}: {self.method.upper()}, {self.architecture.summary()}, {parts}"

    def unused(self) -> list[str]:
        """Known tensors with no place in what is imported.

        Without the decoder that is all but the encoder; otherwise the fixed table, heads, and the
        pixel decoder of HPM's teacher.
        """
        beside = [name for name in self.tensors if beside_encoder(name)]
        if self.decoder is None:
            return beside
        heads = [name for name in beside if not name.startswith(("mask_token", "decoder_"))]
        teacher = self.teacher or {}
        taught = to_reference_names(from_reference_names(teacher, teacher=True), teacher=True)
        return [
            *(name for name in beside if name == _POSITIONS or name in heads),
            *(f"ema_state_dict.{name}" for name in teacher if name not in taught),
        ]


def take_apart(
    read: ReadFile,
    *,
    image_size: tuple[int, int] | None = None,
    source_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    with_decoder: bool = True,
) -> OfficialFile:
    """What a file of a whole method holds; arguments as of `open_weights`."""
    source, network, known = read.source, read.network, read.known
    is_hpm = any(name.startswith("decoder_pred_losspred.") for name in network.tensors)
    architecture = infer_architecture(
        encoder_of(network.tensors),
        source,
        num_heads=num_heads,
        image_size=image_size,
        source_size=source_size,
        known=known,
    )
    tensors, resized = _fit_positions(network.tensors, architecture)
    teacher = network.average if is_hpm else None
    if teacher is not None:
        teacher, likewise = _fit_positions(teacher, architecture)
        resized += ["teacher's pos_embed likewise"] if likewise else []
    decoder = None
    if with_decoder and any(name.startswith("decoder_") for name in tensors):
        heads = decoder_num_heads or known.decoder_num_heads
        decoder = _decoder(tensors, source, architecture, heads)
    published, told = _of_published(Path(source).name) if decoder is not None else ({}, "")
    used = set(network.average_names) if teacher is not None and decoder is not None else set()
    return OfficialFile(
        source=source,
        method="hpm" if is_hpm else "mae",
        architecture=architecture,
        tensors=tensors,
        teacher=teacher,
        decoder=decoder,
        settings=_method_settings(read.arguments, known) | published,
        resized=resized,
        dropped=[name for name in network.outside if name not in used],
        notes=[note for note in (network.told, architecture.note, told) if note],
    )


def _of_published(name: str) -> tuple[dict[str, Any], str]:
    """What is known of one of MAE's own files, and a line that says so."""
    for pattern, normalised in _PUBLISHED.items():
        if pattern.fullmatch(name):
            stated = str(normalised).lower()
            told = f"method.norm_pix_loss={stated}, as its authors say of the file of this name"
            return {"norm_pix_loss": normalised}, told
    return {}, ""


def _method_settings(args: Any, known: Description) -> dict[str, Any]:
    """Settings of the method that the file, its config.json or a script's arguments tell."""
    stated = {**known.method, **(vars(args) if isinstance(args, argparse.Namespace) else {})}
    eps = stated.get("decoder_norm_eps", known.norm_eps)  # transformers gives both parts the same
    shares = {"mask_ratio": stated.get("mask_ratio"), "decoder_norm_eps": eps}
    found: dict[str, Any] = {
        name: value for name, value in shares.items() if isinstance(value, float) and 0 < value < 1
    }
    if isinstance(stated.get("norm_pix_loss"), bool):
        found["norm_pix_loss"] = stated["norm_pix_loss"]
    return found


def _fit_positions(tensors: Tensors, architecture: Architecture) -> tuple[Tensors, list[str]]:
    """The tensors with positions of the grid that is wanted, and a list that says so."""
    if "pos_embed" not in tensors:
        return tensors, []
    num_prefix = tensors["pos_embed"].shape[1] - math.prod(architecture.table_grid)
    return move_all_positions(tensors, architecture.table_grid, architecture.grid, num_prefix)


def _decoder(
    tensors: Tensors, source: str, architecture: Architecture, num_heads: int | None
) -> dict[str, Any]:
    """Settings of a decoder that has these tensors."""
    lacking = [n for n, rank in _RANKS.items() if n not in tensors or tensors[n].ndim != rank]
    if lacking:
        raise UserError(
            f"{source} holds a part of a decoder only (no {', '.join(lacking)}): is the file "
            "complete?"
        )
    width, usual = tensors["decoder_embed.weight"].shape[0], DECODER_HEADS
    values, pixels = tensors["decoder_pred.weight"].shape[0], architecture.values_of_a_patch
    if architecture.clip is not None:
        usual = VIDEO_DECODER_HEADS
    if values != pixels:
        raise UserError(
            f"{source}: its decoder predicts {values} numbers a patch, not its {pixels} pixel "
            "values: import the encoder only, with what=encoder"
        )
    return {
        "decoder_embed_dim": width,
        "decoder_depth": count_blocks(tensors, source, "decoder_blocks."),
        "decoder_num_heads": known_heads(width, usual, "decoder_num_heads", num_heads),
        "decoder_mlp_ratio": tensors["decoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        "decoder_qkv_bias": "decoder_blocks.0.attn.qkv.bias" in tensors,
    }


def check_decoder_positions(tensors: Tensors, size: tuple[int, int], source: str) -> None:
    """UserError where the file's decoder positions are not the fixed table of its own grid."""
    stored, remedy = tensors.get(_POSITIONS), "import the encoder only, with what=encoder"
    if stored is None:
        return
    if stored.ndim != 3 or stored.shape[1] != math.prod(size) + 1:
        raise UserError(
            f"{source}: {_POSITIONS} has shape {tuple(stored.shape)}, not that of "
            f"{size[0]}x{size[1]} patches: {remedy}"
        )
    difference = float((stored[0, 1:] - fixed_table(stored.shape[2], size)).abs().max())
    if not difference <= 1e-4 or not torch.all(stored[0, 0] == 0):
        raise UserError(
            f"{source}: {_POSITIONS} differs from the fixed sine-cosine table by up to "
            f"{difference:.3g}, so it was trained and cannot be used here: {remedy}"
        )
