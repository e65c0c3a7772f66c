"""Teachers: the moving average of a student, or a frozen network of others."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchmine.backbones.foreign import ForeignTeacher
from patchmine.errors import UserError
from patchmine.models.settings import FeatureTargetSettings
from patchmine.ops.schedules import ema_decay
from patchmine.ops.shards import own_parts
from patchmine.types import Grid, Progress


class Teacher(nn.Module):
    """Exponential moving average of modules under the same names: frozen, in eval mode."""

    # Weights stay float32: bfloat16 would swallow an update of 1e-4.  Buffers are never averaged:
    # with own_statistics batch norms gather the statistics of its batch (docs/methods/mokd.md).

    def __init__(self, *, own_statistics: bool = False, **students: nn.Module) -> None:
        super().__init__()
        self.own_statistics = own_statistics
        for name, student in students.items():
            self.add_module(name, deepcopy(student).requires_grad_(False))
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, but for batch norms that gather their own statistics."""
        super().train(False)
        if self.own_statistics:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.train(mode)
        return self

    @torch.no_grad()
    def update(self, decay: float, **students: nn.Module) -> None:
        """``teacher = decay * teacher + (1 - decay) * student`` in one foreach call."""
        mine: list[Tensor] = [p for name in students for p in self.get_submodule(name).parameters()]
        theirs: list[Tensor] = [p for student in students.values() for p in student.parameters()]
        # Sharded alike, as they are of equal shapes.
        torch._foreach_lerp_(own_parts(mine), own_parts(theirs), 1 - decay)


class Average(Teacher):
    """Average of the weights over a run's steps, used in the place of the last ones."""

    def __init__(self, decay: float, **students: nn.Module) -> None:
        super().__init__(own_statistics=False, **students)
        self.decay = decay

    @torch.no_grad()
    def follow(self, progress: Progress, **students: nn.Module) -> None:
        """Move a little towards the weights that a step has made."""
        # A long memory would keep the first weights for long (TensorFlow's num_updates rule).
        step = progress.step + 1
        self.update(min(self.decay, (1 + step) / (10 + step)), **students)
        # Statistics of batch norms are averages already.
        for name, student in students.items():
            pairs = zip(self.get_submodule(name).buffers(), student.buffers(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)


def ramped_decay(settings: FeatureTargetSettings, progress: Progress) -> float:
    """The decay of an EMA teacher at a step, from ``ema_start`` to ``ema_end``."""
    start, end, ramp = settings.ema_start, settings.ema_end, settings.ema_ramp_epochs
    return ema_decay(progress, start=start, end=end, ramp_epochs=ramp)


def foreign_teacher(settings: FeatureTargetSettings, grid: Grid) -> ForeignTeacher | None:
    """The frozen network whose features are predicted, where ``target`` names one."""
    kind, file = settings.target, settings.target_file
    if kind not in ("dino", "clip"):
        return None
    if len(grid.size) == 3:
        wrong = f"method.target={kind} is a network for images, which does not describe clips"
        raise UserError(f"{wrong}: choose method.target=pixel or method.target=ema")
    return ForeignTeacher(kind, file, grid=grid, renormalise=settings.target_renormalise)
