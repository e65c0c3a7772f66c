"""Low-rank adaptation: frozen weights, and a small product that is learned beside them.

Hu et al., LoRA, ICLR 2022, arXiv 2106.09685, on the projections of attention.  Its factor alpha /
rank is 1 here (alpha is the rank), so that a state dict tells all that merging needs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones.record import Encoder
from patchmine.errors import UserError

_PROJECTIONS = tuple(f".attn.{name}" for name in ("qkv", "q_proj", "k_proj", "v_proj", "proj"))


class LoraLinear(nn.Linear):
    """A linear layer plus ``lora_b @ lora_a``; ``weight`` and ``bias`` are those of ``base``.

    ``lora_a`` (rank, in) is drawn as torch draws a linear layer, ``lora_b`` (out, rank) is zero, so
    that at first nothing changes.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        # Two thin products, not one with the merged weight: its backward pass would cost as much
        # as that of the weight which is not trained.
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer of the same function, with tensors of its own."""
        plain = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        plain.weight = nn.Parameter(self.weight + self.lora_b @ self.lora_a)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())
        return plain


def add_lora(encoder: Encoder, rank: int) -> None:
    """Put a `LoraLinear` in the place of ``attn.qkv`` and ``attn.proj`` of every block.

    Where queries, keys and values have a matrix each, each of them.

    Args:
        encoder: changed in place; the names of its tensors stay, two more come for each layer.
        rank: of the product that is learned.

    Raises:
        UserError: the encoder has no such layers, or none so wide.
    """
    layers = {
        name: module
        for name, module in encoder.named_modules()
        if name.endswith(_PROJECTIONS) and type(module) is nn.Linear
    }
    if not layers:
        raise UserError(
            f"trainable=lora:{rank} adapts the attention of transformer blocks, which this "
            f"{type(encoder).__name__} does not have: choose trainable=bias or trainable=all"
        )
    widest = min(min(layer.weight.shape) for layer in layers.values())
    if rank > widest:
        raise UserError(
            f"trainable=lora:{rank}, but the layers that it adapts are {widest} wide: choose a "
            "smaller rank, such as trainable=lora:16"
        )
    for name, layer in layers.items():
        encoder.set_submodule(name, LoraLinear(layer, rank))
    for module in encoder.modules():
        # A BEiT else takes the weight of this layer and passes its forward by.
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True


def merged(encoder: Encoder) -> Encoder:
    """A copy of the same function without `LoraLinear`, as timm builds it."""
    plain = copy.deepcopy(encoder)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLinear):
            plain.set_submodule(name, module.merged())
    return plain


@torch.no_grad()
def merged_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for the tensors of a state dict, under any prefix.

    A ``lora_a`` or ``lora_b`` without its partner stays, for a strict loader to name.
    """
    plain = dict(tensors)
    for name in tensors:
        layer, _, kind = name.rpartition(".")
        weight, down = f"{layer}.weight", f"{layer}.lora_a"
        if kind == "lora_b" and weight in tensors and down in tensors:
            plain[weight] = tensors[weight] + plain.pop(name) @ plain.pop(down)
    return plain
