"""What a benchmark reads off the machine: the rate of a matrix product, work and memory of a function, the hardware."""

from __future__ import annotations

import os
import platform
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall-clock seconds of one call, the mean of ``repeats`` calls in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def matmul_side(device: torch.device) -> int:
    """Side of a square matrix product: large enough to reach the device's rate, short enough to be repeated."""
    return 8192 if device.type == "cuda" else 2048


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """A function that times one large square matrix product and returns its rate; the operands are made once."""
    side = matmul_side(device)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    product = lambda: torch.mm(left, right, out=out)  # noqa: E731
    repeats = 10 if device.type == "cuda" else 1
    product()
    return lambda: 2 * side**3 / seconds(product, device, repeats)


def count_flops(function: Callable[[], object]) -> int:
    """Multiplications and additions of the matrix products, convolutions and attentions in ``function``, backward too.

    Counted from the operators that really run, not from a formula.  Attention's backward counts as twice its forward:
    what a fused kernel computes again to save memory is no work of the model.  Element-wise operators do not count.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention_backward(_grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
        return 2 * sdpa_flop_count(query, key, value)

    aten = torch.ops.aten
    backwards = [
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward,
    ]
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(backwards, attention_backward)) as counter:
        function()
    return int(counter.get_total_flops())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes in tensors that ``function`` holds at one time, above what was there before it.

    On CUDA from the allocator's own count; on a CPU by following every tensor that an operator returns, which leaves
    out scratch space inside a kernel.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveTensors() as live:
        function()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Follows the bytes in storages that operators create, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A storage that comes in was there before; one that goes out and did not come in is new.
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), inputs)
        return result

    def _note(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in inputs or key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, threads, accelerator, versions."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
