"""From a task's parameter groups to updated weights: optimizers, rates, clipping, skipped steps.

Nothing here waits for the device: whether a gradient is finite is a tensor that stays where the
gradient is, and the fused optimizers read it there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patchmine.errors import UserError
from patchmine.ops import shards
from patchmine.ops.schedules import learning_rate
from patchmine.ops.shards import own_parts
from patchmine.train.settings import OptimizerName, ScheduleSettings
from patchmine.types import LrSchedule, ParamGroup, Progress

MOMENTUM = 0.9  # SGD and LARS; of every recipe that uses them (MAE linear probe, MOKD, SCFS)
FUSED_DEVICES = ("cuda", "cpu")
# What Muon is for: weights within blocks, no embeddings, heads or tables of positions (its author's
# advice, https://kellerjordan.github.io/posts/muon/).
_IN_BLOCK = re.compile(r"(.+\.)?blocks\.\d+\..+\.weight")


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
    frozen: list[ParamGroup] = field(default_factory=list)

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none=True)


def schedule_of(settings: ScheduleSettings) -> LrSchedule:
    """How the rates of a run move, of groups that have no curve of their own."""
    return LrSchedule(
        kind=settings.lr_schedule,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.warmup_lr,
        warmup_prefix=settings.warmup_prefix,
        min_lr=settings.min_lr,
        milestones=tuple(settings.lr_milestones),
        gamma=settings.lr_gamma,
    )


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: two or more dimensions and no bias (timm's rule)."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def render_groups(
    groups: Sequence[ParamGroup], *, weight_decay: float, blr: float, batch_size: int
) -> str:
    """A table of what is trained at which rate, for people: a line for each highest rate.

    Settings count where a group says nothing; ``decayed`` are parameters with weight decay.
    """
    rows: dict[tuple[float, float], list[int]] = {}
    for group in groups:
        rate = group.scale * (blr if group.blr is None else group.blr) * batch_size / 256
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        row = rows.setdefault((rate, group.scale), [0, 0, 0])
        for name, parameter in group.params:
            decays = decay > 0 and (group.decay_all or is_decayed(name, parameter))
            size = parameter.numel()
            row[:] = row[0] + 1, row[1] + size, row[2] + size * decays
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [
        (f"{rate:.2e}", f"{scale:.4f}", *(f"{count:,}" for count in rows[rate, scale]))
        for rate, scale in sorted(rows)
    ]
    head = ("rate", "scale", "tensors", "parameters", "decayed")
    lines = [head, *lines, ("all", "", *(f"{count:,}" for count in total))]
    return "\n".join("".join(f"{cell:>13}" for cell in line) for line in lines)


def build_optimizers(
    groups: Sequence[ParamGroup],
    *,
    weight_decay: float,
    blr: float,
    betas: tuple[float, float],
    optimizer: OptimizerName = "adamw",
) -> Optimizers:
    """One torch optimizer per distinct name of a group, for parameters that are on their device.

    ``weight_decay`` and ``blr`` hold where a group says nothing, and ``optimizer`` takes the place
    of AdamW.  Raises ValueError for groups that contradict each other, and when there is nothing to
    train; UserError where there is nothing that the optimizer is for.
    """
    refuse_idle(optimizer, groups)
    params: dict[str, nn.Parameter] = {}
    kinds: dict[str, str] = {}
    torch_groups: dict[str, list[dict[str, Any]]] = {}
    clips: dict[tuple[str, float, bool], Clip] = {}
    for group in groups:
        for key, parameter in group.params:
            if key in params:
                raise ValueError(f"param_groups() names {key!r} twice; it belongs to one group")
            params[key] = parameter
        name = group.name or group.optimizer
        if kinds.setdefault(name, group.optimizer) != group.optimizer:
            both = f"{kinds[name]} and {group.optimizer}"
            raise ValueError(f"param_groups() asks for {both} under one name, {name!r}")
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        base = blr if group.blr is None else group.blr
        for kind, part in _by_kind(group, optimizer).items():
            own = name if kind == group.optimizer else (group.name and f"{name}_{kind}") or kind
            kinds[own] = kind
            torch_groups.setdefault(own, []).extend(_split_by_decay(part, decay, base))
        members = [parameter for _, parameter in group.params]
        if group.clip_norm is not None:
            limit = (name, group.clip_norm, group.clip_each)
            clips.setdefault(limit, Clip([], *limit[1:])).params.extend(members)
    if not params:
        raise ValueError("the method names no parameter to train (param_groups() is empty)")
    by_name = {name: _make(kinds[name], parts, betas) for name, parts in torch_groups.items()}
    frozen = [group for group in groups if group.frozen_until or group.frozen_share]
    return Optimizers(by_name, params, list(clips.values()), frozen)


def refuse_idle(optimizer: OptimizerName, groups: Sequence[ParamGroup]) -> None:
    """UserError where the optimizer of a run's settings would train nothing."""
    if optimizer == "adamw" or any(optimizer in _by_kind(group, optimizer) for group in groups):
        return
    others = sorted({group.optimizer for group in groups} - {"adamw"})
    if others and optimizer == "nadamw":
        what = f"takes AdamW's place, and here {' and '.join(others)} trains everything"
    else:
        what = "is for the matrices of transformer blocks, and here none of them learns by AdamW"
    raise UserError(f"optimizer={optimizer} {what}: leave it out")


def _by_kind(group: ParamGroup, optimizer: OptimizerName) -> dict[str, ParamGroup]:
    """The parts of a group by what trains them, of which ``optimizer`` takes AdamW's place."""
    if group.optimizer != "adamw" or optimizer == "adamw":
        return {group.optimizer: group}
    if optimizer == "nadamw":
        return {optimizer: group}
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in group.params:
        turned = parameter.ndim == 2 and _IN_BLOCK.fullmatch(name)
        parts.setdefault("muon" if turned else "adamw", []).append((name, parameter))
    return {kind: replace(group, params=members) for kind, members in parts.items()}


def _split_by_decay(group: ParamGroup, weight_decay: float, blr: float) -> list[dict[str, Any]]:
    """torch's groups, with what moves their rate and decay under keys of our own."""
    end = weight_decay if group.weight_decay_end is None else group.weight_decay_end
    curve = (weight_decay, end)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in group.params:
        (matrices if is_decayed(name, parameter) else others).append(parameter)
    # LARS adapts the rate of matrices whether or not they are decayed, and of nothing else (MAE
    # util/lars.py).
    parts = [(matrices, curve, True), (others, curve if group.decay_all else (0.0, 0.0), False)]
    return [
        {
            "params": members,
            "weight_decay": decay[0],
            "decay_curve": decay,
            "blr": blr,
            "of": replace(group, params=()),  # scale, curve and min_lr
            "always_adapt": adapted,
        }
        for members, decay, adapted in parts
        if members
    ]


def _muon(groups: list[dict[str, Any]]) -> Optimizer:
    # So scaled, updates are as large as AdamW's and take its rates (arXiv 2502.16982, section 2.2).
    return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")


def _sgd(
    groups: list[dict[str, Any]], params: list[nn.Parameter], how: dict[str, Any]
) -> Optimizer:
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, **how)
    # torch would leave this buffer uninitialised when the very first step is skipped for a NaN.
    for parameter in params:
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _make(name: str, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    params = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.device.type in FUSED_DEVICES for p in params)
    if name == "sgd" and shards.is_sharded(params[0]):  # torch has no fused one of those
        fused = False
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, **how)
    if name == "nadamw":
        from timm.optim.nadamw import NAdamW

        # In torch 2.11 shards lack one of the operations on lists.
        each = shards.is_sharded(params[0])
        nadamw: Optimizer = NAdamW(groups, lr=0.0, betas=betas, foreach=not each)
        return nadamw
    if name == "muon":
        return _muon(groups)
    if name == "sgd":
        return _sgd(groups, params, how)
    if name == "lars":
        from timm.optim.lars import Lars

        lars: Optimizer = Lars(groups, lr=0.0, momentum=MOMENTUM)
        return lars
    raise ValueError(f"unknown optimizer {name!r}; there are adamw, sgd, lars")


def decay_strength(progress: Progress, start: float, end: float) -> float:
    """Half a cosine from ``start`` to ``end`` over the run (DINO ``utils.cosine_scheduler``)."""
    if start == end:
        return start
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress.fraction))


def set_rates(
    optimizers: Optimizers, progress: Progress, *, batch_size: int, schedule: LrSchedule
) -> dict[str, float]:
    """Set every group's rate and weight decay for this step (peak rate = blr x global batch / 256).

    A group's own curve and ``min_lr`` go before ``schedule``.  Returns the largest rate of each
    optimizer, for the log.
    """
    rates: dict[str, float] = {}
    for name, optimizer in optimizers.by_name.items():
        for group in optimizer.param_groups:
            of: ParamGroup = group["of"]
            curve = of.curve or schedule
            if of.min_lr is not None:
                curve = replace(curve, min_lr=of.min_lr)
            group["lr"] = of.scale * learning_rate(progress, group["blr"] * batch_size / 256, curve)
            group["weight_decay"] = decay_strength(progress, *group["decay_curve"])
        largest = max(float(group["lr"]) for group in optimizer.param_groups)
        rates["lr" if not rates else f"lr_{name}"] = largest
    return rates


def clip_gradients(optimizers: Optimizers, progress: Progress) -> Tensor:
    """Drop the gradients of frozen parameters and clip the others; their norm before that, 0-d."""
    for group in optimizers.frozen:
        if progress.epoch < group.frozen_until or progress.fraction < group.frozen_share:
            for _, parameter in group.params:
                parameter.grad = None
    params = [p for p in optimizers.params.values() if p.grad is not None]
    if not params:
        return torch.zeros((), device=next(iter(optimizers.params.values())).device)
    norms = dict(zip(params, shards.norms(_gradients(params)), strict=True))
    for clip in optimizers.clips:
        # The numbers of torch's clip_grad_norm_, or of DINO's clipping of each by itself.
        clipped = [p for p in clip.params if p in norms]
        if not clipped:
            continue
        own = torch.stack([norms[p] for p in clipped])  # (P,)
        if clip.each:
            factors = (clip.norm / (own + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(own_parts(_gradients(clipped)), factors.unbind())
        else:
            whole: Tensor = torch.linalg.vector_norm(own)
            factor = (clip.norm / (whole + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(own_parts(_gradients(clipped)), factor)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return norm


def _gradients(params: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def update(optimizers: Optimizers, bad: Tensor) -> None:
    """One step of every optimizer, or none where ``bad`` (0-d float, 1 = skip) says so.

    The fused optimizers read ``bad`` on the device; the others (NAdamW, Muon, LARS, SGD of shards)
    cannot, and have to wait for it.
    """
    for optimizer in optimizers.by_name.values():
        if all(group.get("fused") for group in optimizer.param_groups):
            # The door of torch's GradScaler.
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.step()
        elif not bool(bad):
            optimizer.step()


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """All optimizer state under ``PARAMETER.KEY``, say ``encoder.norm.weight.exp_avg``."""
    return {
        f"{name}.{key}": value
        for name, parameter in optimizers.params.items()
        for optimizer in optimizers.by_name.values()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def fitting_state(
    params: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The part of `optimizer_tensors` that is of these parameters, by names and shapes."""
    fitting = {}
    for name, value in tensors.items():
        parameter = params.get(name.rsplit(".", 1)[0])
        if parameter is not None and (value.ndim == 0 or value.shape == parameter.shape):
            fitting[name] = value
    return fitting


def load_optimizer_tensors(optimizers: Optimizers, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`; ValueError for state that is not whole or of something else."""
    by_parameter: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter_name, key = name.rsplit(".", 1)
        if parameter_name not in optimizers.params:
            raise ValueError(f"optimizer state for {parameter_name!r}, which is not trained")
        parameter = optimizers.params[parameter_name]
        by_parameter.setdefault(parameter, {})[key] = shards.like(parameter, value)
    for optimizer in optimizers.by_name.values():
        state = optimizer.state_dict()
        members = [p for group in optimizer.param_groups for p in group["params"]]
        if len({frozenset(by_parameter[p]) for p in members if p in by_parameter}) > 1:
            raise ValueError("optimizer state of some parameters is incomplete")
        state["state"] = {i: by_parameter[p] for i, p in enumerate(members) if p in by_parameter}
        optimizer.load_state_dict(state)
