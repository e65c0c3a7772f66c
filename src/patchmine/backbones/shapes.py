"""Networks on torch's meta device, of which only the shapes are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnlyShapes(TorchFunctionMode):
    """While entered, a tensor without values is not clamped, as timm does to every weight it draws.

    torch computes the shape of that in Python, which takes three quarters of the time in which a
    network is built on the meta device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.clamp_ and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
