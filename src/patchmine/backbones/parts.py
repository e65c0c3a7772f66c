"""Parts that only some vision transformers have: seen in tensors, given to a model by a setting.

A network without such a part computes something else, so that none is ever passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from patchmine.backbones.record import Encoder
from patchmine.errors import UserError, shown_name

FC1, FC2 = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}  # timm's words
_SWIGLU = "model=vit_giant_patch14_dinov2 (with model_args.embed_dim, depth and num_heads)"


@dataclass(frozen=True)
class Part:
    """``names`` of its tensors, as a regular expression, and the settings with and without it."""

    what: str
    names: str
    given_by: str
    left_out_by: str


_PARTS = (
    Part(
        "LayerScale",
        r"blocks\.\d+\.ls[12]\.gamma",
        "model_args.init_values=1.0",
        "model_args.init_values=null",
    ),
    Part(
        "register tokens",
        r"reg_token",
        "model_args.reg_tokens={count} model_args.no_embed_class={alone}",
        "model_args.reg_tokens=0 model_args.no_embed_class=false",
    ),
    Part(
        "norms of queries and keys",
        r"blocks\.\d+\.attn\.[qk]_norm\.\w+",
        "model_args.qk_norm=true",
        "model_args.qk_norm=false",
    ),
    Part(
        "a norm before its blocks",
        r"norm_pre\.\w+",
        "model_args.pre_norm=true",
        "model_args.pre_norm=false",
    ),
    Part(
        "a class token", r"cls_token", "model_args.class_token=true", "model_args.class_token=false"
    ),
    Part(
        "biases of queries, keys and values",
        r"blocks\.\d+\.attn\.qkv\.bias",
        "model_args.qkv_bias=true",
        "model_args.qkv_bias=false",
    ),
)
# Of other parts too the network is another one: BEiT's scales, norms in attention, rotary angles.
_COMPUTED_WITH = re.compile(
    r"(blocks|layers|stages)\.\d+\..*|(\w+_)?tokens?|pos_embed"
    r"|(\w*norm\w*|head\.norm|stem|patch_embed|rel_pos\w*|rope)\..*"
)


def is_gated(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the MLPs are SwiGLUs: the first matrix makes a gate beside the values."""
    first, second = tensors.get(FC1), tensors.get(FC2)
    if first is None or second is None or not first.ndim == second.ndim == 2:
        return False
    return first.shape[0] == 2 * second.shape[1]


def computed_with(names: Iterable[str]) -> list[str]:
    """Those of an encoder's names without which its features are others."""
    return [name for name in names if _COMPUTED_WITH.fullmatch(name.removeprefix("encoder."))]


def refuse_other_parts(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str, prefix: str = ""
) -> None:
    """UserError where a file has parts that the model lacks, or the other way round.

    ``prefix`` stands before the encoder's names in both.
    """
    own, tensors = (_below(each, prefix) for each in (own, tensors))
    if FC1 not in own:  # no vision transformer with an MLP of this form
        return
    lacking, beyond = [], []
    for part in _PARTS:
        there, wanted = (any(re.fullmatch(part.names, n) for n in each) for each in (tensors, own))
        if there and not wanted:
            lacking.append(part)
        elif wanted and not there:
            beyond.append(part)
    gated = is_gated(tensors) - is_gated(own)
    has = [*(part.what for part in lacking), *(["SwiGLU in its MLPs"] if gated > 0 else [])]
    lacks = [*(part.what for part in beyond), *(["SwiGLU in its MLPs"] if gated < 0 else [])]
    if not has and not lacks:
        return
    settings = [_filled(part.given_by, tensors) for part in lacking]
    settings += [part.left_out_by for part in beyond]
    if gated:
        settings.insert(0, _SWIGLU if gated > 0 else "a model without SwiGLU")
    told = [f"has {_listed(has)}, which the model lacks"] if has else []
    told += [f"lacks {_listed(lacks)}, which the model has"] if lacks else []
    raise UserError(
        f"{source} {' and '.join(told)}, so that it would compute something else: set "
        f"{' '.join(settings)}, or name the model that the file is of"
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _filled(setting: str, tensors: Mapping[str, Tensor]) -> str:
    """The setting with the number of register tokens, which may stand before the positions."""
    if "{" not in setting:
        return setting
    count, table = tensors["reg_token"].shape[1], tensors.get("pos_embed")
    rows = 0 if table is None else table.shape[1] - 1 - count
    alone = "false" if rows > 0 and int(rows**0.5) ** 2 == rows else "true"
    return setting.format(count=count, alone=alone)


def refuse_passing_over(unexpected: Iterable[str], source: str) -> None:
    """UserError where tensors that an encoder computes with have no place in the model."""
    held = computed_with(unexpected)
    if held:
        raise UserError(
            f"{source}: {len(held)} tensor(s) of the encoder have no place in the model, "
            f"{shown_name(held[0])} first, and without them it computes something else, so that "
            "allow does not pass over them: name the model that the file is of, as in "
            "model=vit_small_patch14_dinov2"
        )


def unseen(encoder: Encoder) -> dict[str, Any]:
    """What no tensor shows of a vision transformer and decides about what it computes."""
    blocks = getattr(encoder, "blocks", None)
    if not blocks:
        return {}
    act = type(getattr(blocks[0].mlp, "act", None)).__name__
    return {"num_heads": blocks[0].attn.num_heads, "act_layer": _ACTIVATIONS.get(act, act)}


def refuse_other_settings(
    stated: Mapping[str, Any], encoder: Encoder, source: str, who: str
) -> None:
    """UserError where a model computes otherwise than its weights were trained to (`unseen`)."""
    for name, own in unseen(encoder).items():
        if stated.get(name) not in (None, own):
            raise UserError(
                f"{source}: {who} has {name}={stated[name]}, the model {name}={own}: set "
                f"model_args.{name}={stated[name]}"
            )
