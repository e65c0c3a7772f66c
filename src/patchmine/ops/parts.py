"""One image seen through several masks at once: patches divided into parts, each of which predicts the others (EMAE).

L patches are K parts of V.  Part k predicts the M = K - 1 parts after it, k + 1, k + 2, ... counted round the end.  If
only the first U parts are in use, a patch of those has U - 1 predictions and any other patch U: two dense blocks, so
that shapes do not depend on the draw and no loss multiplies by a mask.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor


def split_parts(noise: Tensor, num_parts: int) -> Tensor:
    """K disjoint random parts that together are all patches: (B, L) -> (B, K, V) int64, each part in raster order.

    Part 0 is what MAE leaves visible for the same noise.  K must divide L.
    """
    order = noise.argsort(dim=1, stable=True)
    return order.reshape(len(noise), num_parts, -1).sort(dim=2).values


def unseen_patches(parts: Tensor, num_used: int) -> Tensor:
    """What each of the first U parts does not see, part after part: (B, K, V) -> (B, U, M * V)."""
    num_parts = parts.shape[1]
    first = torch.arange(num_used, device=parts.device)[:, None]
    others = (first + torch.arange(1, num_parts, device=parts.device)) % num_parts  # (U, M)
    return parts[:, others].flatten(2)


def order_by_patch(num_parts: int, num_used: int) -> Tensor:
    """How to line up the U * M blocks of `unseen_patches` so that predictions of the same patches are neighbours.

    (U * M,) int64, numbers of blocks: for each part in turn, what the others in use say of it, in their order.
    """
    blocks = [
        part * (num_parts - 1) + (seen - part - 1) % num_parts
        for seen in range(num_parts)
        for part in range(num_used)
        if part != seen
    ]
    return torch.tensor(blocks)


def group_by_patch(predicted: Tensor, num_parts: int, num_used: int) -> tuple[Tensor, Tensor]:
    """Lined up predictions, split where their number changes, as views.

    (B, U * M, V, P) -> (B, U, U - 1, V, P) for patches of parts in use, (B, K - U, U, V, P) for the other patches.
    """
    images, _, *patch = predicted.shape
    rest = num_parts - num_used
    used, unused = predicted.tensor_split([num_used * (num_used - 1)], dim=1)
    return used.view(images, num_used, num_used - 1, *patch), unused.view(images, rest, num_used, *patch)


def rank_balance(values: Tensor) -> Tensor:
    """How many along dimension 2 are smaller, less how many are greater: (B, J, M, V, P) -> the same shape.

    This is the gradient of the sum of |a - b| over all pairs, ties included, and ``(values * balance).sum()`` is that
    sum.  One sweep for each of the M: no tensor over pairs, and for the M at hand quicker than to sort.
    """
    balance = torch.zeros_like(values)
    for other in values.unbind(2):
        balance += (values - other.unsqueeze(2)).sign_()
    return balance


def patch_disagreement(predicted: Tensor, num_parts: int, num_used: int) -> Tensor:
    """Mean |a - b| over pixels and pairs of predictions of each patch: (B, U * M, V, P) -> (B, K, V).

    NaN where there is no pair.
    """
    means = []
    for values in group_by_patch(predicted.float(), num_parts, num_used):
        count = values.shape[2]
        total = (values * rank_balance(values)).sum(dim=2).mean(dim=-1)  # (B, J, V)
        means.append(total / (count * (count - 1) / 2) if count > 1 else torch.full_like(total, torch.nan))
    return torch.cat(means, dim=1)


def parts_loss(
    predicted: Tensor, target: Tensor, num_used: int, *, pull: float, distance: Literal["l1", "l2"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reconstruction of every patch by every part that does not see it, and how far these predictions lie apart.

    ``predicted`` (B, U * M, V, P), lined up by patch; ``target`` (B, K, V, P), without gradient.  Four scalars:

    - the mean squared error plus ``pull`` times the mean distance, the only one with a gradient;
    - the mean squared error over all predictions;
    - the mean distance, |a - b| or its square, over pairs of predictions of the same patch, and over pixels;
    - the mean of |a - b| whatever the distance is.

    Where no patch has two predictions the distances are 0.
    """
    return _PartsLoss.apply(predicted, target, num_used, pull, distance)


class _PartsLoss(torch.autograd.Function):
    """Both losses and their gradient in one sweep; keeps one number per prediction, in the prediction's own type."""

    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, target: Tensor, num_used: int, pull: float, distance: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_parts = target.shape[1]
        pairs_of_parts = num_used * (num_used - 1) // 2
        # Two parts both miss the K - 2 other ones.
        pairs = max(1, pairs_of_parts * (num_parts - 2) * (target.numel() // num_parts))
        pull_each = pull * predicted.numel() / pairs
        squares, spread, apart = torch.zeros(3, device=predicted.device).unbind()
        # The gradient times the number of predictions: numbers near 1, which half precision holds.
        slope = torch.empty_like(predicted)
        groups = (group_by_patch(each, num_parts, num_used) for each in (predicted, slope))
        targets = target.tensor_split([num_used], dim=1)
        for own, kept, wanted in zip(*groups, targets, strict=True):
            error = own.float() - wanted.float()[:, :, None]  # (B, J, M, V, P); as far apart as the predictions are
            squares = squares + error.square().sum()
            towards = rank_balance(error)
            apart = apart + (error * towards).sum()
            if distance == "l2":
                towards = 2 * error.shape[2] * (error - error.mean(dim=2, keepdim=True))
                # Sum over pairs of (a - b)^2 = M * sum of squares about the mean; half of its slope times the error.
                spread = spread + (error * towards).sum() / 2
            kept.copy_(2 * error + pull_each * towards)
        error_mean, apart = squares / predicted.numel(), apart / pairs
        spread = apart if distance == "l1" else spread / pairs
        ctx.save_for_backward(slope)
        outputs = error_mean + pull * spread, error_mean, spread.clone(), apart.clone()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * (grads[0] / slope.numel()), None, None, None, None
