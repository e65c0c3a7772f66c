"""One small map per item of a data set, kept in a byte a number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from patchmine.models.processes import num_processes
from patchmine.ops.alignment import align, spread
from patchmine.ops.mining import ranks
from patchmine.types import Batch, Grid

MEMORY_RATE = 0.5  # how far a visit moves an item's map


class ItemMaps(nn.Module):
    """A table (items, length) of numbers in [0, 1], in steps of 1/255; ``start`` where no item has
    a map yet.
    """

    values: Tensor

    def __init__(self, length: int, start: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.register_buffer("values", torch.zeros(0, length, dtype=torch.uint8))

    def forward(self, index: Tensor) -> Tensor:
        """The maps of the items in ``index`` (B,): (B, length) float32."""
        items, length = self.values.shape
        if not items:
            return torch.full((len(index), length), self.start, device=index.device)
        maps = self.values[index.clamp(max=items - 1)].float() / 255
        # The last items of the data set may have been unreadable, and so beyond the table.
        return torch.where(index[:, None] < items, maps, self.start)

    def grow(self, items: int) -> None:
        """Make room for so many items."""
        more = items - len(self.values)
        if more > 0:
            fresh = self.values.new_full((more, self.values.shape[1]), round(self.start * 255))
            self.values = torch.cat([self.values, fresh])

    @torch.no_grad()
    def put(self, index: Tensor, maps: Tensor) -> None:
        """New maps (B, length) of the items in ``index`` (B,), those of all processes together.

        A step may call it: nothing waits for the device, but processes meet.  Nothing is kept
        before `grow`.
        """
        maps = (maps * 255).round().to(torch.uint8)
        processes = num_processes()
        if processes > 1:
            index, maps = _gathered(index, processes), _gathered(maps, processes)
        if len(self.values):
            self.values[index] = maps

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


class VisitMaps(ItemMaps):
    """What earlier visits of each item said of its patches: their order, from 0 (easy) to 1.

    Patches of which nothing is known have 0.5.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid.num_patches, start=0.5)
        self.grid = grid

    def recall(self, batch: Batch, noise: Tensor) -> Tensor:
        """What is known of the patches of each view, (B, L); ``noise`` (B, L) orders ties."""
        aligned = align(self(batch.index), self.grid, batch.box, batch.flip)
        return aligned + noise / 255  # below a step of the table

    @torch.no_grad()
    def remember(self, batch: Batch, values: Tensor, places: Tensor) -> None:
        """Move the items' maps towards the order of ``values`` (B, n) at the patches ``places``.

        Of views that are crops, every cell of the whole image moves as far as it was seen; values
        that are -inf say nothing.
        """
        known = values.isfinite()
        # What says nothing comes first in the order, and the rest counts from 0.
        order = ranks(values.where(known, -torch.inf)) - (~known).sum(dim=1, keepdim=True)
        order = order / (known.sum(dim=1, keepdim=True) - 1).clamp(min=1)
        empty = torch.zeros(len(values), self.grid.num_patches, device=values.device)
        placed = empty.scatter(1, places, order)
        seen, covered = spread(
            placed, empty.scatter(1, places, known.float()), self.grid, batch.box, batch.flip
        )
        old = self(batch.index)
        self.put(batch.index, old + MEMORY_RATE * covered * (seen - old))


def _gathered(rows: Tensor, processes: int) -> Tensor:
    """The rows of all processes, which have equally many."""
    parts = [torch.empty_like(rows) for _ in range(processes)]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
