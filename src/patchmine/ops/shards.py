"""Tensors of which each process holds some rows (torch's DTensor); any other tensor is whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold a part of it only."""
    return hasattr(tensor, "device_mesh")  # importing DTensor takes a second that few runs need


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`own_part` of each."""
    return [own_part(tensor) for tensor in tensors]


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor with the rows of all processes, which have to ask together."""
    if not is_sharded(tensor):
        return tensor
    there = tensor.to(_talking_device(tensor))
    whole: Tensor = there.full_tensor()  # type: ignore[attr-defined]
    return whole


def like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A ``whole`` tensor divided as ``tensor`` is; as it is where that is whole or of other shape.

    Every process has all of ``whole``, so that none is asked.
    """
    if not is_sharded(tensor) or whole.shape != tensor.shape:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    on_device = whole.to(tensor.device)
    found = distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return found.to(tensor.device)  # which is not the mesh's where parts are offloaded


def first_row(tensor: Tensor) -> tuple[int, bool]:
    """(which row of the whole tensor the own part begins with, whether it is kept by this process).

    Of processes that hold the same part, as those of several machines may, the first one keeps it.
    """
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    mesh, at = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert at is not None
    first, rows, keeps = 0, tensor.shape[0], True
    for placement, count, place in zip(tensor.placements, mesh.shape, at, strict=True):
        if placement.is_shard():
            first = min(rows, -(-rows // count) * place)  # torch.chunk's rule
        else:
            keeps = keeps and place == 0
    return first, keeps


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each whole tensor, 0-d; all of them are sharded alike, or none is."""
    own = torch._foreach_norm(own_parts(tensors))
    if not is_sharded(tensors[0]):
        return list(own)
    squares = torch.stack(own).square().to(_talking_device(tensors[0]))  # (T,)
    torch.distributed.all_reduce(squares, group=_shard_group(tensors[0]))
    return list(squares.sqrt().to(own[0].device).unbind())


def _talking_device(tensor: Tensor) -> str:
    """The kind of device by which the processes talk, where the parts need not lie."""
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return str(tensor.device_mesh.device_type)


def _shard_group(tensor: Tensor) -> torch.distributed.ProcessGroup:
    """The processes that hold one tensor together."""
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    divided = [number for number, kind in enumerate(tensor.placements) if kind.is_shard()]
    return tensor.device_mesh.get_group(divided[0])
