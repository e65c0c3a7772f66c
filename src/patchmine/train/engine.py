"""A thin door on Lightning Fabric: devices, processes, precision, wrapping.  Importing Fabric takes seconds, so it is
done late.

Everything that the loop needs from "many processes" is here and small; sharding (FSDP2) would be another ``strategy``
in ``_strategy``, and full tensors gathered where the loop saves.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor, nn

from patchmine.errors import UserError
from patchmine.method import Method
from patchmine.ops.batch_norm import synchronise_batch_norms
from patchmine.ops.linear import fast_linear
from patchmine.types import Batch, Losses, Progress

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.strategy import Strategy

T = TypeVar("T")

_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


class _Arguments:
    """Batch and progress as a plain object: Fabric rounds floats in collections to bf16; targets must stay fp32."""

    def __init__(self, batch: Batch, progress: Progress) -> None:
        self.batch = batch
        self.progress = progress


class _Step(nn.Module):
    """The module that is wrapped: one method's forward."""

    def __init__(self, method: Method, arithmetic: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.method = method
        self.arithmetic = arithmetic

    def forward(self, arguments: _Arguments) -> Losses:
        with self.arithmetic():
            losses: Losses = self.method(arguments.batch, arguments.progress)
        return losses


class Forward:
    """A wrapped method: call it like the method's forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, batch: Batch, progress: Progress) -> Losses:
        losses: Losses = self.module(_Arguments(batch, progress))
        return losses


class Engine:
    """Where and in what precision a run computes.  Making one starts the other processes, where there are any.

    ``device``: "auto", "cpu" or "cuda".  ``devices`` per node and ``num_nodes`` are taken from torchrun or SLURM where
    one of them started us.  ``precision``: "fp32", "bf16" (autocast) or "auto" = bf16 on GPUs that have it.  Raises
    UserError for what this machine cannot do.
    """

    def __init__(self, device: str = "auto", devices: int = 1, num_nodes: int = 1, precision: str = "auto") -> None:
        kind = _choose_device(device)
        devices, num_nodes = _launched_by(devices, num_nodes)
        if kind == "cuda" and devices > torch.cuda.device_count():
            raise UserError(f"devices={devices}, but this machine has {torch.cuda.device_count()} GPUs")
        self.precision = _choose_precision(precision, kind)
        fabric_class = _import_fabric()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._fabric: Fabric = fabric_class(
                accelerator=kind,
                devices=devices,
                num_nodes=num_nodes,
                strategy=_strategy(devices * num_nodes),
                precision="bf16-mixed" if self.precision == "bf16" else "32-true",
            )
            self._fabric.launch()
        self.device = self._fabric.device
        self.rank = self._fabric.global_rank
        self.world_size = self._fabric.world_size
        self._host_group: Any = torch.distributed.new_group(backend="gloo") if self.world_size > 1 else None
        atexit.register(self.close)  # threads of an open group end the interpreter with "terminate called"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def wrap(self, method: Method, *, compile_blocks: bool = False) -> Forward:
        """Move a method to the device and return its forward, autocast and synchronised."""
        if compile_blocks:
            _compile_blocks(method)
        if self.world_size > 1:
            synchronise_batch_norms(method)
        arithmetic = fast_linear if self.device.type == "cpu" and not compile_blocks else nullcontext
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.15; 2.11 has no other
            forward = Forward(self._fabric.setup_module(_Step(method, arithmetic)))
        if self.world_size > 1:
            for buffer in method.buffers():  # DDP does so for parameters
                torch.distributed.broadcast(buffer, src=0)
        return forward

    def autocast(self) -> AbstractContextManager[None]:
        """The run's precision, for forwards outside of the loop (pictures, features)."""
        return self._fabric.autocast()

    def no_sync(self, forward: Forward, skip: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch after which gradients need not be exchanged."""
        if not skip or self.world_size == 1:
            return nullcontext()
        return self._fabric.no_backward_sync(forward.module)

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        """Add the gradient of ``weight * loss``; both 0-d."""
        self._fabric.backward(loss, gradient=weight)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes."""
        return cast(Tensor, self._fabric.all_reduce(tensor, reduce_op="mean"))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers.  Goes from host to host, so that no GPU is waited for."""
        if self._host_group is None:
            return number
        held = torch.tensor(number)
        torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX, group=self._host_group)
        return int(held)

    def broadcast(self, thing: T) -> T:
        """The main process's ``thing``, everywhere (pickled)."""
        return self._fabric.broadcast(thing)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self._fabric.barrier()

    def close(self) -> None:
        """Part from the other processes."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _choose_device(device: str) -> str:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            "device=cuda, but torch sees no GPU here; use device=cpu, or install a torch that fits the driver"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device} is not known; use auto, cpu or cuda")
    return "cuda" if available and device != "cpu" else "cpu"


def _choose_precision(precision: str, kind: str) -> str:
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision={precision} is not known; use auto, fp32 or bf16")
    if precision != "auto":
        return precision
    # From Ampere (8.0) on; older GPUs only emulate it.
    return "bf16" if kind == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else "fp32"


def _launched_by(devices: int, num_nodes: int) -> tuple[int, int]:
    """(devices per node, nodes) as the launcher says, or as asked for when there is none."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        launcher, local = "torchrun", int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        launcher, nodes = "SLURM", int(os.environ.get("SLURM_NNODES", "1"))
        local = int(os.environ["SLURM_NTASKS"]) // nodes
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(local))  # Fabric refuses to start without it
    else:
        return devices, num_nodes
    if devices not in (1, local):
        raise UserError(
            f"devices={devices}, but {launcher} started {local} processes on this node; leave the setting out"
        )
    return local, nodes


def _strategy(processes: int) -> Strategy | str:
    if processes == 1:
        return "auto"
    from lightning.fabric.strategies.ddp import DDPStrategy

    # Buffers move by rule and are equal on all ranks; every trained parameter takes part in every loss.
    return DDPStrategy(broadcast_buffers=False, find_unused_parameters=False, gradient_as_bucket_view=True)


def _import_fabric() -> type[Fabric]:
    asked = os.environ.get(_NVML_CHECK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning.fabric import Fabric
    if asked is None:
        # Fabric switches this on; without a GPU every optimizer step would then look for the driver anew (0.1 ms).
        os.environ.pop(_NVML_CHECK, None)
    # "Using bfloat16 ...", "All distributed processes registered", tips: nothing that our user asked for.
    for name in ("lightning", "lightning.fabric", "lightning.pytorch", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Fabric


def _compile_blocks(method: nn.Module) -> None:
    """Compile the transformer blocks in place: state names stay, and equal blocks share one compilation."""
    from timm.models.vision_transformer import Block

    for module in method.modules():
        if isinstance(module, Block):
            module.compile()
