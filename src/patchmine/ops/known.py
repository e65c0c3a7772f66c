"""Pixels of which there is no data, and what of a patch counts in a loss.

A value counts where there is data, if half of its patch has.  The prediction of any other one is
replaced by its target: whatever the loss is, it then has neither an error nor a gradient there, and
a mean over all values stays one over a fixed number of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchmine.ops import patches
from patchmine.types import Losses

LEAST_SHARE = 0.5
"""Share of a patch's values of which there is data, from which on it counts."""

Counts = Bool[Tensor, "*rows P"] | None
"""Which values of patches count, as (B, M, P) targets are ordered; None: all do."""


def counting(
    known: Bool[Tensor, "B C *size"] | None,
    index: Int[Tensor, "B M"],
    patch: tuple[int, ...],
    *,
    channels_first: bool = False,
    whole: bool = False,
) -> Counts:
    """Which values of the patches in ``index`` count.

    Args:
        known: where there is data; None: everywhere.
        index: (B, M).
        patch: sides of a patch.
        channels_first: values are in PixelShuffle's order, not in MAE's.
        whole: patches count or do not, as is needed where features are predicted of them.

    Returns:
        (B, M, P), of whole patches (B, M, 1); None if all count.
    """
    if known is None:
        return None
    found = patches.gather_patches(known, index, patch)  # (B, M, C, *patch)
    values = found.flatten(2) if channels_first else patches.patch_values(found)
    counts = values.float().mean(dim=-1, keepdim=True) >= LEAST_SHARE  # (B, M, 1)
    return counts if whole else values & counts


def settled(
    predicted: Float[Tensor, "*rows P"],
    target: Float[Tensor, "*rows P"],
    counts: Bool[Tensor, "*rows Q"] | None,
) -> Float[Tensor, "*rows P"]:
    """The prediction where it counts, the target elsewhere; float32 unless all counts."""
    return predicted if counts is None else torch.where(counts, predicted.float(), target.float())


def compared(error: Float[Tensor, "*rows"], counts: Counts) -> Float[Tensor, "*rows"]:
    """Errors of settled predictions, as means over what counts of each patch; -inf of none."""
    if counts is None:
        return error
    share = counts.float().mean(dim=-1)
    return torch.where(share > 0, error / share.clamp(min=1e-6), -torch.inf)


def shown(error: Float[Tensor, "*rows"], counts: Counts) -> Float[Tensor, "*rows"]:
    """The same for pictures, where NaN is nothing."""
    return error if counts is None else compared(error, counts).nan_to_num(neginf=torch.nan)


def told(counts: Counts) -> Losses:
    """The share of the values to be predicted that count, for the log; nothing if all do."""
    return {} if counts is None else {"counted": counts.float().mean()}


def counting_patches(
    known: Bool[Tensor, "B C *size"], patch: tuple[int, ...]
) -> Bool[Tensor, "B L"]:
    """Which of all patches count at all: (B, C, *size) -> (B, L)."""
    return patches.all_patches(known, patch).flatten(2).float().mean(dim=-1) >= LEAST_SHARE


def scored(
    values: Float[Tensor, "B L"], known: Bool[Tensor, "B C *size"] | None, patch: tuple[int, ...]
) -> Float[Tensor, "B L"]:
    """A number of each patch, -inf where it does not count, which is neither hard nor easy."""
    if known is None:
        return values
    return torch.where(counting_patches(known, patch), values, -torch.inf)


def levelled(
    values: Float[Tensor, "B L"], known: Bool[Tensor, "B C *size"] | None, patch: tuple[int, ...]
) -> Float[Tensor, "B L"]:
    """A number of each patch, where it does not count the mean of those of its image that do."""
    if known is None:
        return values
    counts = counting_patches(known, patch)
    total = torch.where(counts, values, 0.0).sum(dim=1, keepdim=True)
    mean = total / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(counts, values, mean)
