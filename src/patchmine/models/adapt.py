"""Which parameters of an encoder are trained, and at which share of the rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchmine.backbones.family import family_of
from patchmine.backbones.record import Encoder
from patchmine.errors import UserError
from patchmine.models.lora import add_lora, merged_state
from patchmine.models.settings import parse_trainable
from patchmine.types import ParamGroup

USUAL_DECAY = 0.75  # of the rates, layer by layer
AS_USED = {"trainable": "all", "ema_decay": None}
"""Settings of pre-training of which a finished encoder shows nothing."""
_MLP_HALF = {"norm2", "mlp", "ls2", "gamma_2"}  # of a block: timm's ViTs, and BEiT's layer scale


def select_trainable(encoder: Encoder, trainable: str, *, frozen_positions: bool = False) -> None:
    """Say in place which parameters of an encoder take a gradient.

    Args:
        encoder: any family's.  What stays frozen may still hold batch norms: see
            `hold_statistics`.
        trainable: the setting, as `parse_trainable` reads it.  ``all``: everything, positions
            included, as MAE fine-tunes.  ``none``: nothing, so that only a head learns.
            ``last:4``: the last four blocks and the final norm; a half is the MLP of one more block
            (arXiv 2111.06377, figure 9), ``last:25%`` a quarter of all.  ``bias``: all of one
            dimension: biases, gains of norms, layer scales.  ``lora:16``: products of that rank
            beside attention's projections.
        frozen_positions: the table of positions stays as it is, as DropPos fine-tunes.

    Raises:
        UserError: the encoder does not have what ``trainable`` names.
    """
    insert_lora(encoder, trainable)
    encoder.requires_grad_(True)
    freeze_others(encoder, trainable)
    if frozen_positions and getattr(encoder, "pos_embed", None) is not None:
        encoder.pos_embed.requires_grad_(False)


def insert_lora(encoder: Encoder, trainable: str) -> None:
    """Put LoRA's layers into an encoder where ``trainable`` asks for them; else do nothing."""
    wanted = parse_trainable(trainable)
    if wanted.kind == "lora":
        add_lora(encoder, int(wanted.amount))


def freeze_others(encoder: Encoder, trainable: str) -> None:
    """Take the gradient from all that ``trainable`` does not choose; nothing frozen thaws.

    Raises UserError as `select_trainable` does.
    """
    kind = parse_trainable(trainable).kind
    last = _last_blocks(encoder, trainable) if kind == "last" else set()
    for name, parameter in encoder.named_parameters():
        chosen = {
            "all": True,
            "none": False,
            "last": name in last,
            "bias": parameter.ndim == 1,
            "lora": name.endswith((".lora_a", ".lora_b")),
        }
        if not chosen[kind]:
            parameter.requires_grad_(False)


def _last_blocks(encoder: Encoder, trainable: str) -> set[str]:
    """Names of all in the last blocks, as many as ``trainable`` says, and behind them."""
    layers, depth = _layers(encoder)
    wanted = parse_trainable(trainable)
    count = max(1, round(wanted.share * depth)) if wanted.share else wanted.amount
    if count > depth:
        raise UserError(
            f"trainable={trainable}, but the model has {depth} blocks: choose a number below "
            "that, or trainable=all"
        )
    first = depth - int(count) + 1  # of the whole blocks, which are layers 1 to depth
    chosen = {name for name, layer in layers.items() if layer >= first}
    if count % 1:
        block = [name for name, layer in layers.items() if layer == first - 1]
        attends = any(".attn." in name for name in block)
        half = {name for name in block if attends and {*name.split(".")} & _MLP_HALF}
        if not half:
            raise UserError(
                f"trainable={trainable} is half of a block of this {type(encoder).__name__}, "
                f"which has no MLP behind attention: choose trainable=last:{int(count) + 1}"
            )
        chosen |= half
    return chosen


def decay_of(layer_decay: float | None, trainable: str) -> float:
    """The layer decay that is meant: 0.75 where none is set, 1 where few of the layers move."""
    if layer_decay is not None:
        return layer_decay
    return USUAL_DECAY if parse_trainable(trainable).kind in ("all", "last") else 1.0


def hold_statistics(encoder: Encoder) -> None:
    """Let frozen batch norms use the statistics that they have; to be called after ``train()``."""
    for module in encoder.modules():
        if isinstance(module, _BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


def _layers(encoder: Encoder) -> tuple[dict[str, int], int]:
    """The layer of every parameter, and the number of blocks.

    Layer 0 is the stem, then come the blocks; with the head is what stands behind them.
    """
    # timm counts a final norm to the last block; BEiT, MAE and SimMIM to the head, as what is
    # behind the pooling.
    after = ("head.",) if family_of(encoder).hierarchical else ("norm.", "fc_norm.")
    found = group_parameters(encoder, encoder.group_matcher(), reverse=True)
    depth = max(layer for name, layer in found.items() if not name.startswith(after))
    layers = {name: depth + 1 if name.startswith(after) else layer for name, layer in found.items()}
    return layers, depth


def layer_scales(encoder: Encoder, layer_decay: float) -> dict[str, float]:
    """What the rate of every parameter is multiplied by: ``layer_decay ** (layers behind it)``.

    The head, which is no part of the encoder, and the final norm have 1, the stem (patches,
    positions, prefix tokens; a ResNet's first convolution) the smallest.  Blocks of stages count
    one by one, and a Swin's final norm, which is in front of the pooling, to the last of them.
    """
    layers, depth = _layers(encoder)
    return {name: layer_decay ** (depth + 1 - layer) for name, layer in layers.items()}


def rate_groups(
    encoder: Encoder, head: nn.Module, layer_decay: float, **how: Any
) -> list[ParamGroup]:
    """All that takes a gradient in groups of one rate each, from the stem to the head.

    Args:
        encoder: its parameters are named ``encoder.*``.
        head: its parameters are named ``head.*``.
        layer_decay: see `layer_scales`.
        **how: of every `ParamGroup`.

    Returns:
        What has several dimensions and yet no weight decay (timm's ``no_weight_decay``: positions,
        prefix tokens, relative positions) is in groups of its own.  The optimizer finds by itself
        what has one dimension.

    Raises:
        UserError: ``layer_decay`` is not 1, and makes no difference.
    """
    scales = layer_scales(encoder, layer_decay)
    spared: set[str] = getattr(encoder, "no_weight_decay", set)()
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            key = scales[name], name in spared
            groups.setdefault(key, []).append((f"encoder.{name}", parameter))
    learning = [(f"head.{name}", p) for name, p in head.named_parameters() if p.requires_grad]
    if learning:
        groups.setdefault((1.0, False), []).extend(learning)
    if layer_decay != 1 and len({scale for scale, _ in groups}) == 1:
        raise UserError(
            f"layer_decay={layer_decay:g} changes nothing, because all that is trained has one "
            "rate: set layer_decay=1, or train more of the encoder, as in trainable=all"
        )
    undecayed = {**how, "weight_decay": 0.0}
    return [
        ParamGroup(groups[scale, spare], scale=scale, **(undecayed if spare else how))
        for scale, spare in sorted(groups)
    ]


def layer_groups(
    groups: Sequence[ParamGroup], encoder: Encoder, layer_decay: float, *, frozen_share: float = 0.0
) -> list[ParamGroup]:
    """The groups of a method, divided so that the encoder's layers have rates of their own.

    Args:
        groups: the encoder's parameters in them are named ``encoder.*``.
        encoder: see `layer_scales`, as ``layer_decay``.
        layer_decay: 1 slows nothing.
        frozen_share: of the run, in which the encoder does not move.

    Returns:
        Each group in parts of one rate; what is not the encoder's is as it was.
    """
    scales = {f"encoder.{name}": s for name, s in layer_scales(encoder, layer_decay).items()}
    divided: list[ParamGroup] = []
    for group in groups:
        parts: dict[float | None, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in group.params:
            parts.setdefault(scales.get(name), []).append((name, parameter))
        for scale, members in parts.items():
            part = replace(group, params=members)
            if scale is not None:
                part = replace(part, scale=group.scale * scale, frozen_share=frozen_share)
            divided.append(part)
    return divided


def tensors_used(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a method whose run is done: averages in their place, LoRA's products merged.

    They are of a method with the settings `AS_USED`.
    """
    prefix = "average."
    last = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
    averages = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    return merged_state({**last, **averages})
