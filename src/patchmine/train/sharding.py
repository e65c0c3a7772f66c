"""Weights, gradients and optimizer state divided among processes, by torch's FSDP2.

What is trained is a copy of the task that lies in parts.  The task that everybody else knows, for
pictures, evaluations and exports, is plain modules without weights meanwhile; `Sharded.whole` fills
it with those that the copy has now.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from patchmine.ops.shards import whole_tensor
from patchmine.task import Task
from patchmine.train.blocks import transformer_blocks


class Sharded:
    """A task and the copy of it that is trained.

    Args:
        task: loses its weights to the copy.
        device: where it is trained.

    Attributes:
        copy: still whole, until `divide`.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.copy = task, deepcopy(task, {id(task.noise): task.noise})
        task.to(device)  # tables that no checkpoint holds stay there
        self._empty()
        self.copy.to(device)
        for tensor in [*self.copy.parameters(), *self.copy.buffers()]:
            torch.distributed.broadcast(tensor.detach(), src=0)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the task has the weights of now, in every process; all enter it together.

        What happens to buffers within it stays: maps of the items, say.
        """
        self.fill()
        try:
            yield
        finally:
            _copy_buffers(self.task, self.copy)
            self._empty()

    def fill(self) -> None:
        """Give the task its weights for good."""
        with torch.no_grad():
            for name, parameter in self.copy.named_parameters():
                _put(self.task, name, whole_tensor(parameter).detach(), parameter.requires_grad)
        _copy_buffers(self.copy, self.task)
        self.task.train(self.copy.training)

    def _empty(self) -> None:
        for name, parameter in [*self.task.named_parameters()]:
            _put(self.task, name, parameter.detach().to("meta"), parameter.requires_grad)


def divide(
    step: nn.Module,
    mesh_of: tuple[int, ...],
    device: torch.device,
    precision: str,
    *,
    offload: bool = False,
) -> None:
    """Divide the module of one step in place: each transformer block by itself, then the rest.

    Args:
        step: its forward is the step's.
        mesh_of: processes (shards,), or (copies, shards).
        device: of its weights.
        precision: in bf16 blocks gather, and keep for the backward pass, weights of bf16; gradients
            are added up in float32.
        offload: each process's part lies in the host's memory, and so do its gradients.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    names = ("copies", "shards")[-len(mesh_of) :]
    how: dict[str, Any] = {"mesh": init_device_mesh(device.type, mesh_of, mesh_dim_names=names)}
    if offload:  # pinned memory is the GPU's business
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    half = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    # Norms refuse weights and inputs of different types on processors.
    inner = half if precision == "bf16" and device.type == "cuda" else exact
    for block in transformer_blocks(step):
        fully_shard(block, mp_policy=inner, **how)
        if not hasattr(block, "run_parts"):
            own: Any = MethodType(_run_parts, block)
            block.run_parts = own
        register_fsdp_forward_method(block, "run_parts")
    fully_shard(step, mp_policy=exact, **how)


def _run_parts(block: nn.Module, run: Any, *args: Any) -> Tensor:
    """See `backbones.blocks.run_parts`."""
    result: Tensor = run(block, *args)
    return result


def _put(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=requires_grad))


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    for name, buffer in source.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(path), leaf, buffer)
