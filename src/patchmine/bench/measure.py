"""What a benchmark reads off the machine: the rate of a matrix product, work and memory of a
function, the hardware.
"""

from __future__ import annotations

import math
import os
import platform
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchmine.models.onednn import onednn_linear, onednn_usable
from patchmine.train.hardware import cpu_name, device_name


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
    """Side of a square matrix product: large enough to reach the device's rate, short enough to be
    repeated.
    """
    return 8192 if device.type == "cuda" else 2048


def matmul_products(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Ways to do one large square matrix product, by name; the fastest is the rate that the machine
    can reach.
    """
    left, right = (
        torch.randn(matmul_side(device), matmul_side(device), device=device, dtype=dtype)
        for _ in range(2)
    )
    products: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(left, right)}
    if device.type == "cpu" and dtype == torch.float32 and onednn_usable():
        products["oneDNN"] = lambda: onednn_linear(left, right)
    for product in products.values():
        product()
    return products


def count_flops(function: Callable[[], object]) -> int:
    """Multiplications and additions of the matrix products, convolutions and attentions in
    ``function``, backward too.

    Counted from the operators that really run, not from a formula.  Attention's backward counts as
    twice its forward: what a fused kernel computes again to save memory is no work of the model.
    Element-wise operators do not count.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def attention_backward(
        _grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any
    ) -> int:
        batch, heads, rows, width = query  # shapes
        return 2 * 2 * batch * heads * rows * key[2] * (width + value[3])

    def linear(x: Any, weight: Any, *_args: Any, **_kwargs: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    aten = torch.ops.aten
    attentions = [
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
    ]
    formulas: dict[Any, Any] = {
        getattr(aten, f"_scaled_dot_product_{name}_backward"): attention_backward
        for name in attentions
    }
    if onednn_usable():
        formulas[torch.ops.mkldnn._linear_pointwise] = linear
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return int(counter.get_total_flops())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes in tensors that ``function`` holds at one time, above what was there
    before it.

    On CUDA from the allocator's own count; on a CPU by following every tensor that an operator
    returns, which leaves out scratch space inside a kernel.
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


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follows the bytes in storages that operators create, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A storage that comes in was there before; one that goes out and did not come in is new.
        kwargs = kwargs or {}
        inputs = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
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
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = device_name(device)
        found["cuda"] = torch.version.cuda
    return found
