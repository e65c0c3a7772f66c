"""The running mean of a teacher's logits, as a part of a method."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn

from patchmine.models.processes import num_processes
from patchmine.ops.distill import new_centre


class Centre(nn.Module):
    """What is subtracted from a teacher's logits; it moves in `update`, after an optimizer step."""

    mean: Tensor  # buffer (K,), float32

    def __init__(self, width: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.momentum = momentum
        self._seen: Tensor | None = None
        self._parts = 0

    @torch.no_grad()
    def see(self, logits: Tensor) -> None:
        """Take the mean of logits (N, K) of one part of the batch; parts have equally many rows.

        In eval mode nothing is taken, as batch norms keep their statistics there.
        """
        if not self.training:
            return
        mean = logits.float().mean(dim=0, keepdim=True)  # (1, K)
        self._seen = mean if self._seen is None else self._seen + mean
        self._parts += 1

    @torch.no_grad()
    def update(self) -> None:
        """Move to the mean of all logits since the last call; every process must call this."""
        if self._seen is not None:
            mean = self._seen / self._parts  # (1, K)
            if num_processes() > 1:
                torch.distributed.all_reduce(mean)
                mean = mean / num_processes()
            self.mean.copy_(new_centre(self.mean, mean, self.momentum))
        self._seen, self._parts = None, 0
