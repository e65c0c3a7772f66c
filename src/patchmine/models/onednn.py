"""Matrix products on the processor through oneDNN, whose AVX-512 kernels serve AMD's as well:
MKL, which torch gives float32 products to, has AVX2 there, under half the speed on an EPYC of 2025.
On Intel's own, MKL is the faster one (LOG.md), and stays; an AMD without AVX-512 gains nothing.  So
a run measures which one is faster where it begins, and keeps to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from patchmine.models.float_attention import FloatAttention

Product = Literal["torch", "onednn", "float-attention"]
"""How a processor multiplies matrices: as torch does, but those of linear layers by oneDNN, or in
bf16 those of attention in float32.
"""

# Less is not worth another library's copies, nor a choice that the next measurement might reverse.
_CLEARLY_FASTER = 0.8
_ROWS, _WIDTH, _HIDDEN = 392, 384, 1536  # an MLP of ViT-S on eight images, a quarter of each
_ROUNDS = 3


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


def usual_product(precision: str = "fp32") -> Product:
    """The one that is faster on most processors of this maker, without a look at this one."""
    if precision == "bf16":
        return "float-attention"
    return "onednn" if onednn_usable() and not is_intel() else "torch"


@cache
def measured_product() -> Product:
    """The one that is clearly faster here, or torch's own; takes some tenths of a second, once."""
    if is_intel() or not onednn_usable():
        return "torch"
    linears = {"torch": F.linear, "onednn": onednn_linear}
    rounds = [
        {name: _seconds_of_mlp(linear) for name, linear in linears.items()}
        for _ in range(1 + _ROUNDS)
    ][1:]
    least = {name: min(seconds[name] for seconds in rounds) for name in linears}
    return "onednn" if least["onednn"] < _CLEARLY_FASTER * least["torch"] else "torch"


def _seconds_of_mlp(linear: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Both passes of two layers."""
    x, up, down = (
        torch.ones(shape, requires_grad=True)
        for shape in ((_ROWS, _WIDTH), (_HIDDEN, _WIDTH), (_WIDTH, _HIDDEN))
    )
    start = time.perf_counter()
    linear(linear(x, up), down).sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def multiplying(product: Product) -> AbstractContextManager[Any]:
    """Within it a processor multiplies matrices so, as far as this build of torch can."""
    if product == "float-attention":
        return FloatAttention()
    return OneDnnLinear() if product == "onednn" and onednn_usable() else nullcontext()


def fast_linear() -> AbstractContextManager[Any]:
    """`multiplying` by the usual product, for what is computed outside of a run's steps."""
    return multiplying(usual_product())


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

    # By what the tensors are alone: a resumed run repeats the same arithmetic.

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
