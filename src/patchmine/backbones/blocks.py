"""Transformer blocks of which a function uses the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def run_parts(block: Any, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """``run(block, *args)``, which uses parts of a block where `forward` would use all of it.

    A block whose weights are gathered when it runs, or that runs again for its gradient, has an
    attribute ``run_parts`` that does so around ``run``.
    """
    own = getattr(block, "run_parts", None)
    return run(block, *args) if own is None else own(run, *args)
