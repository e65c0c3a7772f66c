"""Names of tensors in the code of MAE, HPM and VideoMAE, and ours: tables of prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from patchmine.backbones.loading import Tensors

T = TypeVar("T")
TEACHER = "ema."  # of HPM on clips, in a file of ours under VideoMAE's names

# Prefixes of MAE's and HPM's code, and ours; the encoder's names are timm's below `encoder.`.
_MAE_TO_OURS = {
    "mask_token": "decoder_input.mask_token",
    "decoder_embed.": "decoder_input.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
    "decoder_blocks_losspred.": "predictor.blocks.",
    "decoder_norm_losspred.": "predictor.norm.",
    "decoder_pred_losspred.": "predictor.head.",
}
# Prefixes of VideoMAE's code (MCG-NJU/VideoMAE; ``losspred`` is ours, of HPM on clips), and MAE's.
_VIDEOMAE_TO_MAE = {
    "encoder_to_decoder.": "decoder_embed.",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
    "decoder.head.": "decoder_pred.",
    "losspred.blocks.": "decoder_blocks_losspred.",
    "losspred.norm.": "decoder_norm_losspred.",
    "losspred.head.": "decoder_pred_losspred.",
    "mask_token": "mask_token",
}


def _swapped(name: str, prefixes: Mapping[str, str], drop: str = "", add: str = "") -> str:
    """The name with its prefix exchanged; one that is in no table loses ``drop``, gets ``add``."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return add + name.removeprefix(drop)


def _reversed(prefixes: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in prefixes.items()}


def from_reference_names(tensors: Mapping[str, T], *, teacher: bool = False) -> dict[str, T]:
    """MAE's and HPM's names -> ours, or those within our HPM's ``teacher``, which has less."""
    ours = {}
    for name, value in tensors.items():
        own = _swapped(name, _MAE_TO_OURS, add="encoder.")
        if name != "decoder_pos_embed" and not (teacher and own.startswith("decoder.")):
            ours[f"teacher.{own}" if teacher else own] = value
    return ours


def to_reference_names(tensors: Mapping[str, T], *, teacher: bool = False) -> dict[str, T]:
    """Our names -> MAE's and HPM's, of the student or of the ``teacher``."""
    table = _reversed(_MAE_TO_OURS)
    theirs = {}
    for name, value in tensors.items():
        if name.startswith("teacher.") == teacher and not name.startswith("foreign."):
            theirs[_swapped(name.removeprefix("teacher."), table, drop="encoder.")] = value
    return theirs


def from_videomae_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """VideoMAE's names -> MAE's, without a teacher's.  Its keys have no bias: zeros stand there."""
    ours: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if name.startswith(TEACHER) or part == "v_bias":
            continue
        if part == "q_bias":
            name = f"{stem}.qkv.bias"
            tensor = torch.cat([tensor, torch.zeros_like(tensor), tensors[f"{stem}.v_bias"]])
        ours[_swapped(name, _VIDEOMAE_TO_MAE, drop="encoder.")] = tensor
    return ours


def to_videomae_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """MAE's names -> VideoMAE's; the keys' bias, which has no influence, is left out."""
    table = _reversed(_VIDEOMAE_TO_MAE)
    theirs: Tensors = {}
    for name, tensor in tensors.items():
        plain = _swapped(name, table, add="encoder.")
        if plain.endswith(".attn.qkv.bias"):
            stem = plain.removesuffix("qkv.bias")
            theirs[f"{stem}q_bias"], _, theirs[f"{stem}v_bias"] = tensor.chunk(3)
        else:
            theirs[plain] = tensor
    return theirs
