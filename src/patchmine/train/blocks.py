"""The transformer blocks of a task: the units that are compiled, computed again, and sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from patchmine.models.droppath import DropPath
from patchmine.models.onednn import Product, multiplying


def transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """All blocks of encoders, teachers and decoders."""
    from timm.models.beit import Block as BeitBlock
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.eva import EvaBlock
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.vision_transformer import Block

    from patchmine.models.cross_decoder import CrossBlock
    from patchmine.models.streams import QueryBlock

    kinds = (
        Block,
        BeitBlock,
        EvaBlock,
        SwinTransformerBlock,
        ConvNeXtBlock,
        CrossBlock,
        QueryBlock,
    )
    for part in module.modules():
        if isinstance(part, kinds):
            yield part


def compute_again(module: nn.Module, product: Product) -> None:
    """Keep only what goes into each block for the backward pass, which runs it once more.

    ``product``: how a processor multiplies matrices in the forward pass, and so again.
    """
    for block in transformer_blocks(module):
        paths = [part for part in block.modules() if isinstance(part, DropPath)]
        forward = partial(_run, paths, product, block.forward)
        own: Any = MethodType(partial(_run_part, paths, product), block)
        block.run_parts = own
        block.forward = forward


def _run_part(
    paths: list[DropPath], product: Product, block: nn.Module, run: Any, *args: Any
) -> Any:
    return _run(paths, product, run, block, *args)


def _run(paths: list[DropPath], product: Product, run: Any, *args: Any, **keywords: Any) -> Any:
    """``run(*args)``, whose noise of stochastic depth comes back when it is run again."""
    noises = [path.noise for path in paths]

    def again(*args: Any, **keywords: Any) -> Any:
        for path, noise in zip(paths, noises, strict=True):
            path.noise = noise
        return run(*args, **keywords)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), multiplying(product)

    return checkpoint(again, *args, use_reentrant=False, context_fn=contexts, **keywords)
