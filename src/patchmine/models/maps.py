"""One small map per item of a data set, kept in a byte a number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from patchmine.models.processes import num_processes


class ItemMaps(nn.Module):
    """A table (items, length) of numbers in [0, 1], in steps of 1/255; zeros before `replace`."""

    values: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(0, length, dtype=torch.uint8))

    def forward(self, index: Tensor) -> Tensor:
        """The maps of the items in ``index`` (B,): (B, length) float32."""
        items, length = self.values.shape
        if not items:
            return torch.zeros(len(index), length, device=index.device)
        maps = self.values[index.clamp(max=items - 1)].float() / 255
        # The last items of the data set may have been unreadable, and so beyond the table.
        return torch.where(index[:, None] < items, maps, 0.0)

    @torch.no_grad()
    def replace(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take over every process's (items (B,), maps (B, length)); ValueError for none at all."""
        device, length = self.values.device, self.values.shape[1]
        found = [
            (index.to(device), (maps * 255).round().to(device, torch.uint8))
            for index, maps in parts
        ]
        items = torch.zeros((), dtype=torch.int64, device=device)
        if found:
            items = torch.stack([index.max() + 1 for index, _ in found]).max()
        together = num_processes() > 1
        if together:
            torch.distributed.all_reduce(items, op=torch.distributed.ReduceOp.MAX)
        if not items:
            raise ValueError("maps are to be renewed, but there was no image to make one of")
        values = torch.zeros(int(items), length, dtype=torch.uint8, device=device)
        for index, maps in found:
            values[index] = maps
        if together:
            # A sum in which each row has one term that is not zero.
            torch.distributed.all_reduce(values)
        self.values = values

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}values")
        length = self.values.shape[1]
        if isinstance(stored, Tensor) and stored.ndim == 2 and stored.shape[1] == length:
            self.values = self.values.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
