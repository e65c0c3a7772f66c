"""One image seen through several masks at once: parts of patches that predict each other (EMAE).

L patches are K parts of V.  Part k predicts the M = K - 1 parts after it, counted round the end.
If only the first U parts are in use, a patch of those has U - 1 predictions and any other patch U:
two dense blocks, so that shapes do not depend on the draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchmine.ops.known import settled


def split_parts(noise: Float[Tensor, "B L"], num_parts: int) -> Int[Tensor, "B K V"]:
    """K disjoint random parts, each in raster order: (B, L) -> (B, K, V); part 0 is MAE's mask."""
    order = noise.argsort(dim=1, stable=True)
    return order.reshape(len(noise), num_parts, -1).sort(dim=2).values


def unseen_patches(parts: Int[Tensor, "B K V"], num_used: int) -> Int[Tensor, "B U MV"]:
    """What each of the first U parts does not see, part after part: (B, K, V) -> (B, U, M * V)."""
    num_parts = parts.shape[1]
    first = torch.arange(num_used, device=parts.device)[:, None]
    others = (first + torch.arange(1, num_parts, device=parts.device)) % num_parts  # (U, M)
    return parts[:, others].flatten(2)


def order_by_patch(num_parts: int, num_used: int) -> Int[Tensor, "UM"]:
    """Numbers of the blocks of `unseen_patches`, predictions of one patch together: (U * M,)."""
    blocks = [
        part * (num_parts - 1) + (seen - part - 1) % num_parts
        for seen in range(num_parts)
        for part in range(num_used)
        if part != seen
    ]
    return torch.tensor(blocks)


def group_by_patch(
    predicted: Float[Tensor, "B UM V P"], num_parts: int, num_used: int
) -> tuple[Tensor, Tensor]:
    """Lined up predictions (B, U * M, V, P), split where their number changes, as views.

    (B, U, U - 1, V, P) for patches of parts in use, (B, K - U, U, V, P) for the others.
    """
    images, _, *patch = predicted.shape
    rest = num_parts - num_used
    used, unused = predicted.tensor_split([num_used * (num_used - 1)], dim=1)
    return used.view(images, num_used, num_used - 1, *patch), unused.view(
        images, rest, num_used, *patch
    )


def rank_balance(values: Float[Tensor, "B J M V P"]) -> Float[Tensor, "B J M V P"]:
    """How many along dimension 2 are smaller, less how many are greater: (B, J, M, V, P) -> same.

    The gradient of the sum of |a - b| over all pairs, ties included; ``(values * balance).sum()``
    is that sum.  One sweep for each of the M: no tensor over pairs.
    """
    balance = torch.zeros_like(values)
    for other in values.unbind(2):
        balance += (values - other.unsqueeze(2)).sign_()
    return balance


def patch_disagreement(
    predicted: Float[Tensor, "B UM V P"], num_parts: int, num_used: int
) -> Float[Tensor, "B K V"]:
    """Mean |a - b| over pairs of predictions of a patch: (B, U * M, V, P) -> (B, K, V), or NaN."""
    means = []
    for values in group_by_patch(predicted.float(), num_parts, num_used):
        count = values.shape[2]
        total = (values * rank_balance(values)).sum(dim=2).mean(dim=-1)  # (B, J, V)
        means.append(
            total / (count * (count - 1) / 2) if count > 1 else torch.full_like(total, torch.nan)
        )
    return torch.cat(means, dim=1)


def errors(
    predicted: Float[Tensor, "B UM V P"],
    target: Float[Tensor, "B K V P"],
    num_used: int,
    counts: Bool[Tensor, "B K V P"] | None = None,
) -> Iterator[Tensor]:
    """Predictions less their targets, in the two groups of `group_by_patch`, float32.

    Args as of `parts_losses`; where values do not count it is 0.
    """
    groups = group_by_patch(predicted, target.shape[1], num_used)
    targets = target.float().tensor_split([num_used], dim=1)
    counted = [None] * 2 if counts is None else counts[:, :, None].tensor_split([num_used], dim=1)
    for own, wanted, where in zip(groups, targets, counted, strict=True):
        wanted = wanted[:, :, None].expand_as(own)
        yield settled(own.float(), wanted, None if where is None else where.expand_as(own)) - wanted


def parts_losses(
    predicted: Float[Tensor, "B UM V P"],
    target: Float[Tensor, "B K V P"],
    num_used: int,
    distance: Literal["l1", "l2"],
    counts: Bool[Tensor, "B K V P"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of all predictions, and how far those of the same patch are apart.

    Args:
        predicted: (B, U * M, V, P), lined up by patch.
        target: (B, K, V, P).
        num_used: U.
        distance: "l1" or "l2", between two predictions.
        counts: where values count, both errors and distances are 0 elsewhere; None: everywhere.

    Returns:
        Three float32 scalars: the mean squared error; the mean distance over pixels and pairs of
        predictions of a patch; the mean of |a - b| without a gradient.  0 where there is no pair.
    """
    num_parts = target.shape[1]
    # Each pair of parts predicts the K - 2 others.
    pairs = max(1, num_used * (num_used - 1) // 2 * (num_parts - 2) * (target.numel() // num_parts))
    squares, spread, apart = torch.zeros(3, device=predicted.device)
    # (B, J, M, V, P), as far apart as the predictions are
    for error in errors(predicted, target, num_used, counts):
        squares = squares + error.square().sum()
        absolute = (error * rank_balance(error.detach())).sum()
        apart = apart + absolute.detach()
        spread = spread + (absolute if distance == "l1" else _squared_pairs(error))
    return squares / predicted.numel(), spread / pairs, apart / pairs


def _squared_pairs(values: Tensor) -> Tensor:
    """Sum of (a - b)^2 over pairs along dimension 2."""
    return values.shape[2] * (values - values.mean(dim=2, keepdim=True)).square().sum()
