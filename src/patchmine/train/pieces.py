"""The parts of a checkpoint that several processes write, and what they are joined to again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchmine.ops.shards import first_row, is_sharded, own_part

PartTensors = Mapping[str, Mapping[str, Tensor]]
Host = Callable[[str, Tensor], Tensor]
"""Gives a tensor of a name on the CPU, contiguous; in the same memory, perhaps."""


def on_host(_name: str, tensor: Tensor) -> Tensor:
    """A `Host` that copies only what must be."""
    return tensor.detach().cpu().contiguous()


@dataclass(frozen=True)
class Piece:
    """Which part of a checkpoint a file is: ``number`` of ``count``, of one ``saving``.

    ``rows``: of tensors that it holds some rows of, the first one and how many the whole has.
    """

    number: int
    count: int
    saving: str
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Its name."""
        return f"part-{self.number + 1:05d}-of-{self.count:05d}.safetensors"

    def as_json(self) -> dict[str, Any]:
        """What stands in its head."""
        return asdict(self)


def own_pieces(
    parts: PartTensors, *, first: bool, host: Host = on_host
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, int]]]:
    """What this process writes of sharded tensors, and `Piece.rows` of that.

    ``first``: of the processes, which also writes what all of them hold.  ``host`` takes what is
    written, by names as in a file.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, tuple[int, int]] = {}
    for part, tensors in parts.items():
        kept[part] = {}
        for name, tensor in tensors.items():
            if not is_sharded(tensor):
                if first:
                    kept[part][name] = host(f"{part}.{name}", tensor)
                continue
            (row, keeps), own = first_row(tensor), own_part(tensor)
            if keeps and len(own):
                kept[part][name] = host(f"{part}.{name}", own)
                rows[f"{part}.{name}"] = (row, len(tensor))
    return kept, rows


def part_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in parts.  Raises ValueError where one is missing."""
    found = sorted(path.name for path in folder.glob("part-*.safetensors"))
    count = int(found[0].removesuffix(".safetensors").rpartition("-")[2]) if found else 1
    wanted = [Piece(number, count, "").file for number in range(count)]
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"its file {missing[0]} is missing")
    return [folder / name for name in wanted]


def joined(
    pieces: Sequence[tuple[Mapping[str, Any], dict[str, dict[str, Tensor]]]],
) -> dict[str, dict[str, Tensor]]:
    """The whole tensors of all pieces, given in order with their heads, by part and name.

    Raises ValueError where they do not belong together, or not all rows are there.
    """
    found: dict[str, dict[str, list[tuple[int, int, Tensor]]]] = {part: {} for part in pieces[0][1]}
    saving = pieces[0][0]["saving"]
    for number, (own, parts) in enumerate(pieces):
        if own["saving"] != saving or own["number"] != number or own["count"] != len(pieces):
            raise ValueError(f"its part {number + 1} belongs to another checkpoint")
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                row, total = own["rows"].get(f"{part}.{name}", (0, -1))
                found.setdefault(part, {}).setdefault(name, []).append((row, total, tensor))
    return {
        part: {name: _joined_rows(name, held) for name, held in tensors.items()}
        for part, tensors in found.items()
    }


def _joined_rows(name: str, held: list[tuple[int, int, Tensor]]) -> Tensor:
    held = sorted(held, key=lambda piece: piece[0])
    total, rows = held[0][1], 0
    if total < 0 and len(held) == 1:
        return held[0][2]
    for row, _, tensor in held:
        if row != rows:
            raise ValueError(f"rows of its tensor {name} are missing")
        rows += len(tensor)
    if rows != total:
        raise ValueError(f"rows of its tensor {name} are missing")
    return torch.cat([tensor for _, _, tensor in held])
