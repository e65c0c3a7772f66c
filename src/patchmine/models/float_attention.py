"""Attention in float32 within bf16 autocast on a processor.

torch's kernel takes 1.4 to 2.9 times as long in bf16 there as in float32, both passes and casts
included (docs/benchmarks), while other products gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FloatAttention(TorchFunctionMode):
    """While entered, attention that autocast would round computes in float32; its result is bf16
    as before.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            named = {name: _in_float32(value) for name, value in kwargs.items()}
            found: Tensor = func(*map(_in_float32, args), **named)
        return found.to(torch.get_autocast_dtype("cpu"))


def _in_float32(value: Any) -> Any:
    """Numbers of a tensor; a mask of yes and no stays one."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if is_float else value
