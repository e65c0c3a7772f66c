"""Devices, processes and precision of a run, and all that the loop needs of "many processes"."""

from __future__ import annotations

import atexit
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from patchmine.errors import Say, UserError
from patchmine.models.batch_norm import synchronise_batch_norms
from patchmine.models.onednn import Product, multiplying, usual_product
from patchmine.system.heap import keep_freed
from patchmine.task import Task
from patchmine.train.blocks import compute_again
from patchmine.train.group import LONGEST, Group
from patchmine.train.hardware import share_cores
from patchmine.train.launch import Launch, read_launch
from patchmine.train.settings import Remat, Sharding
from patchmine.train.sharding import Sharded, divide
from patchmine.types import Batch, Losses, Progress

T = TypeVar("T")

# Of the blocks' code, one for each width, number of tokens and mode: a pair of networks with their
# teachers and heads has ten, and behind the eighth torch gives up.
_GRAPHS = 64


Forward = Callable[[Batch, Progress], Losses]
"""A wrapped task: called like the task's forward."""


class _Step(nn.Module):
    """The module that is wrapped: one task's forward in the run's precision."""

    def __init__(
        self, task: Task, contexts: Sequence[Callable[[], AbstractContextManager[Any]]]
    ) -> None:
        super().__init__()
        self.task, self.contexts = task, contexts

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            losses: Losses = self.task(batch, progress)
        return {name: loss.float() for name, loss in losses.items()}


class Engine:
    """Where and in what precision a run computes.  Making one brings its processes together, where
    there are several.

    Args:
        device: "auto", "cpu" or "cuda".
        devices: processes on this machine; a launcher (torchrun, srun) that started them has said
        so already.
        num_nodes: machines; likewise.
        precision: "fp32", "bf16" (autocast) or "auto" = bf16 on GPUs that have it.
        sharding: "ddp": every process holds all weights; "fsdp": its part of them; "hybrid": its
            part of those of its machine.
        say: hears, in one process on each machine, for whom we wait.

    Attributes:
        product: how a processor multiplies matrices in forwards that are wrapped from now on.

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
        say: Say = lambda text: None,
        sharding: Sharding = "ddp",
    ) -> None:
        kind = choose_device(device)
        launch = read_launch(os.environ, devices, num_nodes)
        if kind == "cpu":
            _refuse_crowding(launch)
            keep_freed()
        self.device = (
            torch.device("cuda", _choose_gpu(launch)) if kind == "cuda" else torch.device("cpu")
        )
        self.precision = _choose_precision(precision, kind)
        self.product: Product = usual_product(self.precision)
        self.rank, self.world_size, self.local_size = (
            launch.rank,
            launch.world_size,
            launch.local_size,
        )
        refuse_unshardable(sharding, launch)
        self.sharding = sharding
        if launch.note is not None:
            say(launch.note)
        self._host_group: Any = None
        self._group: Group | None = None
        share_cores(self.local_size)
        if self.world_size > 1:
            self._group = Group(launch, self.device, say if launch.speaks else lambda text: None)
            self._host_group = _new_host_group()
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
        every = [defaultdict(lambda: "not there", each) for each in self.gather(own)]
        for rank, theirs in enumerate(every):
            known = [*every[0], *theirs]
            differing = next((what for what in known if theirs[what] != every[0][what]), None)
            if differing is not None and self._group is not None:
                hosts = self._group.hosts
                raise UserError(
                    f"the processes of this run differ: {differing} is {every[0][differing]} on "
                    f"{hosts[0]} (rank 0) and {theirs[differing]} on {hosts[rank]} (rank {rank}); "
                    "give all of them the same"
                )

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; by way of the host."""
        return _gathered(self._host_group, self.world_size, value)

    def another_gather(self) -> Callable[[Any], list[Any]]:
        """A `gather` for a thread beside the loop's, over connections of its own.

        All processes make it together.
        """
        group = None if self._host_group is None else _new_host_group()
        return partial(_gathered, group, self.world_size)

    def advise(self, advice: str) -> None:
        """What to tell the user to do when a process ends without a word."""
        if self._group is not None:
            self._group.peers.advice = advice

    def undisturbed(self) -> AbstractContextManager[None]:
        """Around the writing of a file: the end of another process does not cut it off."""
        return nullcontext() if self._group is None else self._group.peers.undisturbed()

    def divided(self, task: Task) -> Sharded | None:
        """The task and the copy of it that is to be wrapped, where weights are sharded."""
        return None if self.sharding == "ddp" else Sharded(task, self.device)

    def wrap(
        self,
        task: Task,
        *,
        compile_blocks: bool = False,
        remat: Remat = "none",
        offload: bool = False,
    ) -> Forward:
        """Move a task to the device and return its forward, autocast and synchronised.

        ``remat="blocks"``: what a block computed is computed again for its gradient.  ``offload``:
        see `divide`.
        """
        if remat == "blocks":
            compute_again(task, self.product if self.device.type == "cpu" else "torch")
        if compile_blocks:
            _compile_blocks(task)
        contexts: list[Callable[[], AbstractContextManager[Any]]] = [self.autocast]
        if self.device.type == "cpu" and not compile_blocks:
            contexts.append(partial(multiplying, self.product))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size == 1:
            return _Step(task.to(self.device), contexts)
        synchronise_batch_norms(task)
        if self.sharding != "ddp":
            step = _Step(task, contexts)
            copies = self.world_size // self.local_size
            mesh = (copies, self.local_size) if self.sharding == "hybrid" else (self.world_size,)
            divide(step, mesh, self.device, self.precision, offload=offload)
            return step
        with warnings.catch_warnings():
            # torch 2.15; 2.11 has no other
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            # Buffers move by rule and are equal on all ranks; every trained parameter takes part in
            # every loss.
            wrapped = DistributedDataParallel(
                _Step(task.to(self.device), contexts),
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=False,
                gradient_as_bucket_view=True,
            )
        for buffer in task.buffers():  # DDP does so for parameters
            torch.distributed.broadcast(buffer, src=0)
        return wrapped

    def autocast(self) -> AbstractContextManager[None]:
        """The run's precision, for forwards outside of the loop too (pictures)."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def no_sync(self, forward: Forward, skip: bool) -> AbstractContextManager[None]:
        """Around a micro-batch after which gradients need not be exchanged.

        Those of shards are, so that each process keeps its part of them only.
        """
        if skip and isinstance(forward, DistributedDataParallel):
            return forward.no_sync()
        return nullcontext()

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


def _new_host_group() -> Any:
    """Of all processes, connected from host to host."""
    return torch.distributed.new_group(backend="gloo", timeout=LONGEST)


def _gathered(group: Any, count: int, value: T) -> list[T]:
    if group is None:
        return [value]
    every: list[Any] = [None] * count
    torch.distributed.all_gather_object(every, value, group=group)
    return every


def refuse_unshardable(sharding: Sharding, launch: Launch) -> None:
    """UserError where there is nobody to share weights with."""
    if sharding == "ddp":
        return
    nodes = launch.world_size // launch.local_size
    if launch.world_size == 1:
        raise UserError(
            f"sharding={sharding} divides the weights among processes, and this run has one: set "
            "sharding=ddp, or start more (devices, num_nodes, torchrun, srun)"
        )
    if sharding == "hybrid" and (nodes == 1 or launch.local_size == 1):
        raise UserError(
            "sharding=hybrid divides the weights within each machine and repeats them on the "
            f"others, but this run has {launch.local_size} processes on each of {nodes} machines: "
            "set sharding=fsdp"
        )


def choose_device(device: str) -> str:
    """The kind of device that a setting means; UserError where there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            "device=cuda, but torch sees no GPU here; use device=cpu, or install a torch that "
            "fits the driver"
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
            f"devices={launch.local_size} would start as many processes, but this machine has "
            f"{cores} cores and no GPU is used: set devices={cores} or fewer"
        )


def _compile_blocks(method: nn.Module) -> None:
    """Compile the transformer blocks in place: state names stay, and equal blocks share one
    compilation.
    """
    from timm.models.vision_transformer import Block

    from patchmine.models.cross_decoder import CrossBlock

    torch._dynamo.config.recompile_limit = _GRAPHS
    for module in method.modules():
        if isinstance(module, (Block, CrossBlock)):
            module.compile()
