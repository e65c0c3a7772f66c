"""Devices, processes and precision of a run, and a thin door on Lightning Fabric, which wraps the
method.

Importing Fabric takes seconds, so it is done late: mistakes in settings and data are told before.

Everything that the loop needs from "many processes" is here and small; sharding (FSDP2) would be
another ``strategy`` in ``_strategy``, and full tensors gathered where the loop saves.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from patchmine.errors import UserError
from patchmine.models.batch_norm import synchronise_batch_norms
from patchmine.models.onednn import fast_linear
from patchmine.task import Task
from patchmine.train.group import LONGEST, Group
from patchmine.train.launch import Launch, read_launch
from patchmine.types import Batch, Losses, Progress

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.strategy import Strategy

T = TypeVar("T")
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


class _Arguments:
    """Batch and progress as a plain object: Fabric rounds floats in collections to bf16; targets
    must stay fp32.
    """

    def __init__(self, batch: Batch, progress: Progress) -> None:
        self.batch = batch
        self.progress = progress


class _Step(nn.Module):
    """The module that is wrapped: one method's forward."""

    def __init__(self, method: Task, arithmetic: Callable[[], AbstractContextManager[Any]]) -> None:
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
    """Where and in what precision a run computes.  Making one brings its processes together, where
    there are several.

    Args:
        device: "auto", "cpu" or "cuda".
        devices: processes on this machine; a launcher (torchrun, srun) that started them has said
        so already.
        num_nodes: machines; likewise.
        precision: "fp32", "bf16" (autocast) or "auto" = bf16 on GPUs that have it.
        say: hears, in one process on each machine, for whom we wait.

    Raises:
        UserError: for what this machine cannot do, for a launcher's variables that do not fit
            together, and naming the processes that did not come in time.
    """

    def __init__(
        self,
        device: str = "auto",
        devices: int = 1,
        num_nodes: int = 1,
        precision: str = "auto",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        kind = _choose_device(device)
        launch = read_launch(os.environ, devices, num_nodes)
        if kind == "cpu":
            _refuse_crowding(launch)
        self.device = (
            torch.device("cuda", _choose_gpu(launch)) if kind == "cuda" else torch.device("cpu")
        )
        self.precision = _choose_precision(precision, kind)
        self.rank, self.world_size, self.local_size = (
            launch.rank,
            launch.world_size,
            launch.local_size,
        )
        if launch.note is not None:
            say(launch.note)
        self._fabric_made: Fabric | None = None
        self._host_group: Any = None
        self._group: Group | None = None
        if self.world_size > 1:
            self._group = Group(launch, self.device, say if launch.speaks else lambda text: None)
            self._host_group = torch.distributed.new_group(backend="gloo", timeout=LONGEST)
            atexit.register(
                self.close
            )  # threads of an open group end the interpreter with "terminate called"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a run: whatever ends it in one process ends it in all, with one sentence and one
        exit code.

        Raises:
            UserError: a mistake met here, or in another process, or naming a process that ended
            without a word.
            EndedElsewhereError: a SystemExit where another process on this machine says so.
        """
        if self._group is None:
            yield
            return
        try:
            yield
        except BaseException as error:
            shown = self._group.peers.ending(error)
            if shown is error:
                raise
            raise shown from error
        self.close()

    def agree(self, facts: Mapping[str, object]) -> None:
        """Compare what each process found with what the first one did.

        Raises:
            UserError: in all of them, naming a process, its host, and what differs there.
        """
        own = {what: str(value) for what, value in facts.items()}
        every = self.gather(own)
        for rank, theirs in enumerate(every):
            differing = next((what for what in every[0] if theirs[what] != every[0][what]), None)
            if differing is not None and self._group is not None:
                hosts = self._group.hosts
                raise UserError(
                    f"the processes of this run differ: {differing} is {every[0][differing]} on "
                    f"{hosts[0]} (rank 0) and {theirs[differing]} on {hosts[rank]} (rank {rank}); "
                    "give all of them the same"
                )

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; by way of the host."""
        if self._host_group is None:
            return [value]
        every: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(every, value, group=self._host_group)
        return every

    def advise(self, advice: str) -> None:
        """What to tell the user to do when a process ends without a word."""
        if self._group is not None:
            self._group.peers.advice = advice

    def undisturbed(self) -> AbstractContextManager[None]:
        """Around the writing of a file: the end of another process does not cut it off."""
        return nullcontext() if self._group is None else self._group.peers.undisturbed()

    @property
    def _fabric(self) -> Fabric:
        if self._fabric_made is None:
            self._fabric_made = _make_fabric(
                self.device, self.rank, self.world_size, self.precision
            )
        return self._fabric_made

    def wrap(self, method: Task, *, compile_blocks: bool = False) -> Forward:
        """Move a method to the device and return its forward, autocast and synchronised."""
        if compile_blocks:
            _compile_blocks(method)
        if self.world_size > 1:
            synchronise_batch_norms(method)
        arithmetic = (
            fast_linear if self.device.type == "cpu" and not compile_blocks else nullcontext
        )
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`broadcast_buffers` is deprecated"
            )  # torch 2.15; 2.11 has no other
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
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total / self.world_size

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers.  Goes from host to host, so that no GPU is waited
        for.
        """
        if self._host_group is None:
            return number
        held = torch.tensor(number)
        torch.distributed.all_reduce(
            held, op=torch.distributed.ReduceOp.MAX, group=self._host_group
        )
        return int(held)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.largest(0)

    def close(self) -> None:
        """Part from the other processes."""
        if self._group is not None:
            self._group.close()
            self._group = None
            self._host_group = None


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


def _choose_gpu(launch: Launch) -> int:
    """The GPU of this process; one that is alone to be seen was chosen by the launcher."""
    count = torch.cuda.device_count()
    if launch.local_rank < count and launch.starts < count:
        return launch.local_rank
    if count == 1 and launch.by != "patchmine":
        return 0
    raise UserError(f"devices={launch.local_size}, but this machine has {count} GPUs")


def _refuse_crowding(launch: Launch) -> None:
    """Raise UserError for many more processes than this machine has cores; a few more are how a
    small one tries it.
    """
    cores = os.cpu_count() or 1
    if launch.starts >= max(8, cores):
        raise UserError(
            f"devices={launch.local_size} would start as many processes, but this machine has {cores} cores and no GPU"
            f" is used: set devices={cores} or fewer"
        )


def _make_fabric(device: torch.device, rank: int, world_size: int, precision: str) -> Fabric:
    """Fabric for one process and its device; that there are others is not its concern."""
    fabric_class = _import_fabric()
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    class Environment(LightningEnvironment):
        """Everything is started and connected already."""

        creates_processes_externally = True

        def world_size(self) -> int:
            return world_size

        def global_rank(self) -> int:
            return rank

        def local_rank(self) -> int:
            return 0

        def node_rank(self) -> int:
            return rank

        def set_world_size(self, size: int) -> None:
            pass

        def set_global_rank(self, rank: int) -> None:
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = fabric_class(
            accelerator=device.type,
            devices=[device.index] if device.type == "cuda" else 1,
            num_nodes=world_size,
            strategy=_strategy(world_size),
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            plugins=[Environment()],
        )
        fabric.launch()
    return fabric


def _strategy(processes: int) -> Strategy | str:
    if processes == 1:
        return "auto"
    from lightning.fabric.strategies.ddp import DDPStrategy

    # Buffers move by rule and are equal on all ranks; every trained parameter takes part in every
    # loss.
    return DDPStrategy(
        broadcast_buffers=False, find_unused_parameters=False, gradient_as_bucket_view=True
    )


def _import_fabric() -> type[Fabric]:
    asked = os.environ.get(_NVML_CHECK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning.fabric import Fabric
    if asked is None:
        # Fabric switches this on; without a GPU every optimizer step would then look for the driver
        # anew (0.1 ms).
        os.environ.pop(_NVML_CHECK, None)
    # "Using bfloat16 ...", "All distributed processes registered", tips: nothing that our user
    # asked for.
    for name in (
        "lightning",
        "lightning.fabric",
        "lightning.pytorch",
        "lightning.fabric.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Fabric


def _compile_blocks(method: nn.Module) -> None:
    """Compile the transformer blocks in place: state names stay, and equal blocks share one
    compilation.
    """
    from timm.models.vision_transformer import Block

    for module in method.modules():
        if isinstance(module, Block):
            module.compile()
