"""From a method's parameter groups to updated weights: optimizers, learning rates, clipping,
skipped steps.

Nothing here waits for the device.  Whether a gradient is finite is a tensor that stays where the
gradient is, and the fused optimizers read it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patchmine.ops.schedules import LrSchedule, learning_rate
from patchmine.types import ParamGroup, Progress

MOMENTUM = (
    0.9  # SGD and LARS; the value of every recipe that uses them (MAE linear probe, MOKD, SCFS)
)
FUSED_DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Clip:
    """Parameters whose gradient is limited to ``norm``: all together, or each by itself."""

    params: list[nn.Parameter]
    norm: float
    each: bool


@dataclass
class Optimizers:
    """All optimizers of a run, by name, and what has to be known about their parameters."""

    by_name: dict[str, Optimizer]
    params: dict[str, nn.Parameter]
    clips: list[Clip] = field(default_factory=list)
    frozen: list[tuple[int, list[nn.Parameter]]] = field(default_factory=list)

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none=True)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: two or more dimensions and no bias (timm's rule; MAE's 3-D
    tokens decay).
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def build_optimizers(
    groups: Sequence[ParamGroup], *, weight_decay: float, blr: float, betas: tuple[float, float]
) -> Optimizers:
    """One torch optimizer per distinct name of a group, for parameters that are already on their
    device.

    ``weight_decay`` and ``blr`` hold where a group says nothing.  Raises ValueError for an unknown
    optimizer, for one name with two kinds of them, for a parameter that stands in two groups, and
    when there is nothing to train.
    """
    params: dict[str, nn.Parameter] = {}
    kinds: dict[str, str] = {}
    torch_groups: dict[str, list[dict[str, Any]]] = {}
    clips: dict[tuple[str, float, bool], Clip] = {}
    frozen: list[tuple[int, list[nn.Parameter]]] = []
    for group in groups:
        _refuse_repeated(group, params)
        params.update(group.params)
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        name = group.name or group.optimizer
        if kinds.setdefault(name, group.optimizer) != group.optimizer:
            raise ValueError(
                f"param_groups() asks for {kinds[name]} and {group.optimizer} under one name, {name!r}"
            )
        torch_groups.setdefault(name, []).extend(_split_by_decay(group, decay, blr))
        members = [parameter for _, parameter in group.params]
        if group.clip_norm is not None:
            key = (name, group.clip_norm, group.clip_each)
            clips.setdefault(key, Clip([], group.clip_norm, group.clip_each)).params.extend(members)
        if group.frozen_until > 0:
            frozen.append((group.frozen_until, members))
    if not params:
        raise ValueError("the method names no parameter to train (param_groups() is empty)")
    by_name = {name: _make(kinds[name], parts, betas) for name, parts in torch_groups.items()}
    return Optimizers(by_name, params, list(clips.values()), frozen)


def _refuse_repeated(group: ParamGroup, known: Mapping[str, nn.Parameter]) -> None:
    names = [name for name, _ in group.params]
    repeated = sorted({name for name in names if name in known or names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"param_groups() names {repeated[0]!r} twice; a parameter belongs to one group"
        )


def _split_by_decay(group: ParamGroup, weight_decay: float, blr: float) -> list[dict[str, Any]]:
    """torch's parameter groups, with what moves their rate and decay carried along under keys of
    our own.
    """
    base = blr if group.blr is None else group.blr
    end = weight_decay if group.weight_decay_end is None else group.weight_decay_end
    matrices = [p for name, p in group.params if is_decayed(name, p)]
    others = [p for name, p in group.params if not is_decayed(name, p)]
    curve = (weight_decay, end)
    parts = [(matrices, curve, True), (others, curve if group.decay_all else (0.0, 0.0), False)]
    # LARS adapts the rate of matrices whether or not they are decayed, and of nothing else (MAE
    # util/lars.py).
    return [
        {
            "params": members,
            "weight_decay": decay[0],
            "decay_curve": decay,
            "blr": base,
            "min_lr": group.min_lr,
            "always_adapt": adapted,
        }
        for members, decay, adapted in parts
        if members
    ]


def _make(name: str, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    fused = all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"])
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, **how)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, **how)
        # torch would leave this buffer uninitialised when the very first step is skipped for a NaN.
        for parameter in (p for group in groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name == "lars":
        from timm.optim.lars import Lars

        lars: Optimizer = Lars(groups, lr=0.0, momentum=MOMENTUM)
        return lars
    raise ValueError(f"unknown optimizer {name!r}; there are adamw, sgd, lars")


def decay_strength(progress: Progress, start: float, end: float) -> float:
    """Half a cosine from ``start`` to ``end`` over the whole run, without warm-up (DINO
    ``utils.cosine_scheduler``).
    """
    if start == end:
        return start
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress.fraction))


def set_rates(
    optimizers: Optimizers, progress: Progress, *, batch_size: int, schedule: LrSchedule
) -> dict[str, float]:
    """Set every group's rate and weight decay for this step (peak rate = blr x global batch / 256).

    A group's own ``min_lr`` goes before that of ``schedule``.  Returns the rates for the log: of
    each optimizer's first group.
    """
    rates: dict[str, float] = {}
    for name, optimizer in optimizers.by_name.items():
        for group in optimizer.param_groups:
            peak = group["blr"] * batch_size / 256
            own = schedule if group["min_lr"] is None else replace(schedule, min_lr=group["min_lr"])
            group["lr"] = learning_rate(progress, peak, own)
            group["weight_decay"] = decay_strength(progress, *group["decay_curve"])
        rates["lr" if not rates else f"lr_{name}"] = float(optimizer.param_groups[0]["lr"])
    return rates


def clip_gradients(optimizers: Optimizers, progress: Progress) -> Tensor:
    """Drop the gradients of frozen parameters and clip the others; returns their norm before
    clipping, 0-d.
    """
    for frozen_until, members in optimizers.frozen:
        if progress.epoch < frozen_until:
            for parameter in members:
                parameter.grad = None
    params = [p for p in optimizers.params.values() if p.grad is not None]
    if not params:
        return torch.zeros((), device=next(iter(optimizers.params.values())).device)
    norms = dict(
        zip(params, torch._foreach_norm(_gradients(params)), strict=True)
    )  # {parameter: 0-d}
    for clip in optimizers.clips:
        _clip(clip, norms)
    return _norm(torch.stack(list(norms.values())))


def _clip(clip: Clip, norms: Mapping[nn.Parameter, Tensor]) -> None:
    """Same numbers as ``torch.nn.utils.clip_grad_norm_``, or as DINO's clipping of each parameter
    by itself.
    """
    params = [p for p in clip.params if p in norms]
    if not params:
        return
    grads = _gradients(params)
    own = torch.stack([norms[p] for p in params])  # (P,)
    if clip.each:
        factors = (clip.norm / (own + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factors.unbind())
    else:
        torch._foreach_mul_(grads, (clip.norm / (_norm(own) + 1e-6)).clamp(max=1.0))


def _gradients(params: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm


def update(optimizers: Optimizers, bad: Tensor) -> None:
    """One step of every optimizer, or none where ``bad`` (0-d float, 1 = skip) says so.

    The fused optimizers read ``bad`` on the device; LARS cannot, and has to wait for it.
    """
    for optimizer in optimizers.by_name.values():
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # the door that torch's GradScaler uses
            optimizer.step()
        elif not bool(bad):
            optimizer.step()


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """All optimizer state under ``PARAMETER.KEY``, say ``encoder.norm.weight.exp_avg``."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in optimizers.params.items():
        for optimizer in optimizers.by_name.values():
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(optimizers: Optimizers, tensors: Mapping[str, Tensor]) -> None:
    """Undo ``optimizer_tensors``.  Raises ValueError for state that is not whole, or of what is not
    trained.
    """
    by_parameter: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter_name, key = name.rsplit(".", 1)
        if parameter_name not in optimizers.params:
            raise ValueError(f"optimizer state for {parameter_name!r}, which is not trained")
        by_parameter.setdefault(optimizers.params[parameter_name], {})[key] = value
    for optimizer in optimizers.by_name.values():
        state = optimizer.state_dict()
        members = [p for group in optimizer.param_groups for p in group["params"]]
        if len({frozenset(by_parameter[p]) for p in members if p in by_parameter}) > 1:
            raise ValueError("optimizer state of some parameters is incomplete")
        state["state"] = {i: by_parameter[p] for i, p in enumerate(members) if p in by_parameter}
        optimizer.load_state_dict(state)
