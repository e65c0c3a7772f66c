"""What methods on DINO's distillation between crops have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from patchmine.errors import UserError
from patchmine.models.processes import num_processes
from patchmine.models.settings import DistillationSettings
from patchmine.types import Batch, ParamGroup


def prototype_groups(
    members: list[tuple[str, nn.Parameter]],
    settings: DistillationSettings,
    optimizer: str,
    **how: Any,
) -> list[ParamGroup]:
    """Two groups, the prototypes second, frozen at first; each gradient is clipped by itself."""
    how = {"clip_norm": settings.clip_grad, "clip_each": True, **how}
    prototypes = [each for each in members if "last_layer" in each[0]]
    others = [each for each in members if "last_layer" not in each[0]]
    return [
        ParamGroup(others, optimizer, **how),
        ParamGroup(prototypes, optimizer, frozen_until=settings.freeze_last_layer, **how),
    ]


def check_crops(batch: Batch, method: str, *, has_batch_norm: bool) -> None:
    """UserError for batches that give a method nothing to compare."""
    if len(batch.views) < 3:
        what = "searches global crops for what local crops show"
        raise UserError(f"method={method} {what}, and has none: set crops.num_local=1 or more")
    if has_batch_norm and len(batch) * num_processes() < 2:
        few = "has batch norms here, which need 2 images or more at a time, and gets 1"
        raise UserError(f"method={method} {few}: raise batch_size, or lower accumulate")
