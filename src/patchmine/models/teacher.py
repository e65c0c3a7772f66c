"""A slow copy of the student."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """Exponential moving average of some of a method's modules: frozen, always in eval mode, a part of the module tree.

    ``Teacher(encoder=encoder, predictor=predictor)`` holds copies under the same names.  The students are passed to
    `update` instead of being kept, so that every parameter has one owner.  Weights stay float32: bfloat16 would swallow
    an update of 1e-4.
    """

    def __init__(self, **students: nn.Module) -> None:
        super().__init__()
        for name, student in students.items():
            self.add_module(name, deepcopy(student).requires_grad_(False))
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def update(self, decay: float, **students: nn.Module) -> None:
        """``teacher = decay * teacher + (1 - decay) * student`` for every parameter, in one foreach call."""
        mine: list[Tensor] = [p for name in students for p in self.get_submodule(name).parameters()]
        theirs: list[Tensor] = [p for student in students.values() for p in student.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)
