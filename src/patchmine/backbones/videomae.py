"""VideoMAE's names of tensors, and HPM's on clips, for those of MAE's reference code, which
`models.official` reads.

Format: MCG-NJU/VideoMAE, a dictionary under ``model`` or ``module`` (spec hpm-video.md, section
10).  Its names of the encoder are timm's, but queries and values have a bias of their own and keys
none.  Fine-tuned files hold the encoder without prefix, ``fc_norm`` and a classifier.  The file of
HPM on clips is ours: ``losspred.*`` is its second decoder, ``ema.*`` its teacher.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from patchmine.backbones.loading import Tensors

# VideoMAE's prefix -> MAE's; what has none of these is the encoder's.
_PREFIXES = {
    "encoder_to_decoder.": "decoder_embed.",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
    "decoder.head.": "decoder_pred.",
    "losspred.blocks.": "decoder_blocks_losspred.",
    "losspred.norm.": "decoder_norm_losspred.",
    "losspred.head.": "decoder_pred_losspred.",
    "mask_token": "mask_token",
}
TEACHER = "ema."


def is_videomae(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the patches of a state dict have three dimensions."""
    names = ("encoder.patch_embed.proj.weight", "patch_embed.proj.weight")
    return any(name in tensors and tensors[name].ndim == 5 for name in names)


def teacher_of(tensors: Mapping[str, Tensor]) -> Tensors | None:
    """The teacher's tensors in a file of HPM on clips, their prefix taken off; None where there is
    none.
    """
    return {
        name.removeprefix(TEACHER): t for name, t in tensors.items() if name.startswith(TEACHER)
    } or None


def from_videomae_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """VideoMAE's names -> MAE's; the teacher's are left out.

    ``attn.qkv.bias`` is put together of ``q_bias``, zeros and ``v_bias``.
    """
    ours: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if name.startswith(TEACHER) or part == "v_bias":
            continue
        if part == "q_bias":
            value = tensors[f"{stem}.v_bias"]
            ours[_reference_name(f"{stem}.qkv.bias")] = torch.cat(
                [tensor, torch.zeros_like(tensor), value]
            )
        else:
            ours[_reference_name(name)] = tensor
    return ours


def to_videomae_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """MAE's names -> VideoMAE's.  The inverse of `from_videomae_names`, but that the keys' bias,
    which has no influence on anything, is left out."""
    theirs: Tensors = {}
    for name, tensor in tensors.items():
        plain = _videomae_name(name)
        if plain.endswith(".attn.qkv.bias"):
            stem = plain.removesuffix("qkv.bias")
            theirs[f"{stem}q_bias"], _, theirs[f"{stem}v_bias"] = tensor.chunk(3)
        else:
            theirs[plain] = tensor
    return theirs


def _reference_name(name: str) -> str:
    for theirs, reference in _PREFIXES.items():
        if name.startswith(theirs):
            return reference + name.removeprefix(theirs)
    return name.removeprefix("encoder.")


def _videomae_name(name: str) -> str:
    for theirs, reference in _PREFIXES.items():
        if name.startswith(reference):
            return theirs + name.removeprefix(reference)
    return f"encoder.{name}"
