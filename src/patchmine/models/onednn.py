"""Matrix products on the processor through oneDNN, whose AVX-512 kernels serve AMD's as well:
MKL, which torch gives float32 products to, has AVX2 there, under half the speed on an EPYC of 2025.
On Intel's own, MKL is the faster one (LOG.md), and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@cache
def is_intel() -> bool:
    """Whether the processor is Intel's; one that does not tell is not."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def onednn_usable() -> bool:
    """Whether this build of torch has oneDNN's product for plain float32 tensors."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fast_linear() -> AbstractContextManager[Any]:
    """`OneDnnLinear` where it is faster and this build of torch can do it, else nothing."""
    return OneDnnLinear() if onednn_usable() and not is_intel() else nullcontext()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of two matrices, each in any layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` of (N, A) and (N, B)."""
    # oneDNN copies its first factor when that is transposed, so it gets the narrower one first.
    if left.shape[1] <= right.shape[1]:
        return _product(left.t(), right.t())
    return _product(right.t(), left.t()).t()


class _Linear(torch.autograd.Function):
    """`torch.nn.functional.linear` with all products of both passes done by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, len(weight))  # (N, out)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _outer(grad, x.reshape(-1, x.shape[-1]))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=0)
        return grad_x, grad_weight, grad_bias


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for float32 on the processor: (..., in), (out, in), (out,) -> (..., out)."""
    return _Linear.apply(x, weight, bias)


class OneDnnLinear(TorchFunctionMode):
    """While entered, every float32 linear layer on the processor runs through oneDNN."""

    # Chosen by what the tensors are, never by a timing: a resumed run repeats the same arithmetic.

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and "input" not in kwargs:
            x = args[0]
            plain = x.device.type == "cpu" and x.dtype == torch.float32
            if plain and not torch.is_autocast_enabled("cpu"):
                return onednn_linear(*args, **kwargs)
        return func(*args, **kwargs)
