"""Parts and their losses against loops over parts and pairs (docs/methods/emae.md)."""

from __future__ import annotations

from itertools import combinations
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from patchmine.ops.masks import lowest_visible
from patchmine.ops.parts import (
    order_by_patch,
    parts_losses,
    patch_disagreement,
    rank_balance,
    split_parts,
    unseen_patches,
)

# Parts, and how many of them are in use.
DIVISIONS = [(k, k) for k in (2, 3, 4, 5, 7, 8)] + [(4, 1), (4, 2), (4, 3), (7, 3), (2, 1)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def slow_losses(
    pred: Tensor, target: Tensor, part: Tensor, num_used: int, distance: str
) -> list[Tensor]:
    """The definition: a mask for each part, a loop over pairs, each side held fixed once; (N, U, L,
    P), (N, L, P).
    """
    mask = torch.stack([part != k for k in range(num_used)], dim=1)[
        ..., None
    ].float()  # (N, U, L, 1)
    error = (mask * (pred - target[:, None]).square()).sum() / (mask.sum() * pred.shape[-1])
    total, apart, count = pred.new_zeros(()), pred.new_zeros(()), 0.0
    for i, j in combinations(range(num_used), 2):
        both = mask[:, i] * mask[:, j]
        for a, b in ((pred[:, i].detach(), pred[:, j]), (pred[:, i], pred[:, j].detach())):
            gap = (a - b).abs()
            total = total + (both * (gap if distance == "l1" else gap.square())).sum()
        apart = apart + (both * gap).sum()
        count += both.sum().item() * pred.shape[-1]
    return [error, total / max(count, 1.0), apart / max(count, 1.0)]


def lined_up(pred: Tensor, parts: Tensor, num_used: int) -> Tensor:
    """Predictions of all patches by part, (N, U, L, P), as the fast losses take them."""
    index = unseen_patches(parts, num_used)[..., None].expand(-1, -1, -1, pred.shape[-1])
    values = pred.gather(2, index).unflatten(2, (-1, parts.shape[2])).flatten(1, 2)
    return values.index_select(1, order_by_patch(parts.shape[1], num_used))


def drawn(num_parts: int, num_used: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(predictions (N, U, L, P), targets (N, L, P), parts (N, K, V), part of each patch (N, L)) at
    random.
    """
    patches = num_parts * 3
    parts = split_parts(uniform(seed, 2, patches), num_parts)
    part = torch.zeros(2, patches, dtype=torch.int64)
    part.scatter_(1, parts.flatten(1), torch.arange(num_parts).repeat_interleave(3).expand(2, -1))
    return normal(seed + 1, 2, num_used, patches, 5), normal(seed + 2, 2, patches, 5), parts, part


def fast_losses(
    pred: Tensor, target: Tensor, parts: Tensor, distance: Literal["l1", "l2"]
) -> tuple[Tensor, ...]:
    wide = parts.flatten(1)[..., None].expand(-1, -1, target.shape[-1])
    own = target.gather(1, wide).unflatten(1, parts.shape[1:])
    return parts_losses(lined_up(pred, parts, pred.shape[1]), own, pred.shape[1], distance)


@pytest.mark.parametrize("num_parts", [2, 3, 4, 6, 12])
def test_parts_are_disjoint_and_complete(num_parts: int) -> None:
    noise = uniform(0, 5, 24)
    parts = split_parts(noise, num_parts)
    assert parts.shape == (5, num_parts, 24 // num_parts)
    assert torch.equal(parts.flatten(1).sort(dim=1).values, torch.arange(24).expand(5, -1))
    assert torch.equal(parts[:, 0], lowest_visible(noise, 24 // num_parts).visible)
    masks = torch.zeros(5, num_parts, 24).scatter_(2, unseen_patches(parts, num_parts), 1.0)
    assert torch.equal(masks.sum(dim=1), torch.full((5, 24), num_parts - 1.0))
    assert (masks.gather(2, parts) == 0).all()
    for i, j in combinations(range(num_parts), 2):
        assert torch.equal(
            (masks[:, i] * masks[:, j]).sum(dim=1), torch.full((5,), 24 - 2 * 24 / num_parts)
        )


def test_every_part_is_drawn_uniformly() -> None:
    parts = split_parts(uniform(0, 4000, 8), 4)
    share = torch.zeros(4000, 4, 8).scatter_(2, parts, 1.0).mean(dim=0)
    torch.testing.assert_close(share, torch.full((4, 8), 0.25), atol=0.03, rtol=0)


def test_equal_noise_gives_equal_parts() -> None:
    parts = split_parts(torch.zeros(2, 8), 4)
    assert torch.equal(parts, torch.arange(8).reshape(4, 2).expand(2, -1, -1))


@pytest.mark.parametrize(("num_parts", "num_used"), DIVISIONS)
def test_predictions_of_a_patch_come_together(num_parts: int, num_used: int) -> None:
    _, _, parts, _ = drawn(num_parts, num_used)
    patch = torch.arange(num_parts * 3).expand(2, num_used, -1)[..., None]
    part = torch.arange(num_used)[None, :, None, None].expand_as(patch)
    blocks = lined_up(
        torch.cat([patch, part], dim=-1), parts, num_used
    )  # (N, U * M, V, [patch, who says it])
    askers = [[k for k in range(num_used) if k != seen] for seen in range(num_parts)]
    start = 0
    for seen, who in enumerate(askers):
        own = blocks[:, start : start + len(who)]
        assert (own[..., 0] == parts[:, seen, None]).all()
        assert torch.equal(own[0, :, 0, 1], torch.tensor(who, dtype=torch.int64))
        start += len(who)
    assert start == blocks.shape[1]


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize(("num_parts", "num_used"), DIVISIONS)
@pytest.mark.parametrize("ties", [False, True])
def test_losses_against_the_loop(
    num_parts: int, num_used: int, distance: Literal["l1", "l2"], ties: bool
) -> None:
    pred, target, parts, part = drawn(num_parts, num_used)
    if ties:
        pred = pred.round()  # so that sign(0) = 0 matters
    results = []
    for fast in (False, True):
        leaf = pred.clone().requires_grad_()
        found = (
            fast_losses(leaf, target, parts, distance)
            if fast
            else slow_losses(leaf, target, part, num_used, distance)
        )
        (found[0] + 0.7 * found[1]).backward()
        results.append(([value.detach() for value in found], leaf.grad))
    (slow, slow_grad), (quick, quick_grad) = results
    torch.testing.assert_close(quick[0], slow[0])
    torch.testing.assert_close(
        2 * quick[1], slow[1]
    )  # the definition counts each pair twice, with the same gradient
    torch.testing.assert_close(quick[2], slow[2])
    torch.testing.assert_close(quick_grad, slow_grad, atol=1e-6, rtol=1e-5)


def test_bfloat16_predictions_are_compared_in_float32() -> None:
    pred, target, parts, part = drawn(4, 4)
    rough = pred.bfloat16().requires_grad_()
    found = fast_losses(rough, target, parts, "l1")
    expected = slow_losses(rough.detach().float(), target, part, 4, "l1")
    assert all(value.dtype == torch.float32 for value in found)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(2 * found[1], expected[1])
    found[1].backward()
    assert rough.grad.dtype == torch.bfloat16


def test_counting_is_max_less_min_for_three_and_the_sorted_form_without_ties() -> None:
    three = normal(0, 2, 4, 3, 5, 6).requires_grad_()
    (2 * (three.amax(dim=2) - three.amin(dim=2))).sum().backward()
    assert torch.equal(rank_balance(three.detach()), three.grad)
    many = normal(1, 2, 7, 6, 5, 6)
    rank = many.argsort(dim=2).argsort(dim=2)  # from 0
    assert torch.equal(rank_balance(many), (2 * rank - 5).float())


def test_agreement_moves_no_mean() -> None:
    """The pull of consistency on the predictions of one patch adds up to nothing; equal predictions
    are not pulled.
    """
    balance = rank_balance(normal(0, 2, 4, 6, 5, 6).round())
    assert not balance.sum(dim=2).any()
    assert not rank_balance(torch.ones(1, 2, 3, 4, 5)).any()
    pred, target, parts, _ = drawn(4, 4)
    shift = normal(9, 2, 1, 12, 5)
    before, after = (fast_losses(each, target, parts, "l1")[1] for each in (pred, pred + shift))
    torch.testing.assert_close(before, after)
    alike = target[:, None].expand(-1, 4, -1, -1).contiguous()
    assert all(value == 0 for value in fast_losses(alike, target, parts, "l1"))


def test_names_of_parts_do_not_matter() -> None:
    pred, target, parts, _ = drawn(5, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    for first, second in zip(
        fast_losses(pred, target, parts, "l1"),
        fast_losses(pred[:, order], target, parts[:, order], "l1"),
        strict=True,
    ):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("num_used", [1, 2])
def test_where_nothing_overlaps_the_distance_is_zero(num_used: int) -> None:
    pred, target, parts, _ = drawn(2, num_used)
    pred.requires_grad_()
    error, distance, apart = fast_losses(pred, target, parts, "l1")
    assert distance == apart == 0
    (error + distance).backward()
    assert pred.grad.isfinite().all()


def test_disagreement_of_each_patch() -> None:
    pred, target, parts, part = drawn(4, 2)
    found = patch_disagreement(lined_up(pred, parts, 2), 4, 2)  # (N, K, V)
    assert found[:, :2].isnan().all()  # seen by one of the two: only the other predicts it
    by_patch = (pred[:, 0] - pred[:, 1]).abs().mean(dim=-1)
    torch.testing.assert_close(
        found[:, 2:], by_patch[:, None].expand(-1, 4, -1).gather(2, parts)[:, 2:]
    )
    assert (part >= 2).sum() == found[:, 2:].numel()
    pred, target, parts, _ = drawn(4, 4)
    found = patch_disagreement(lined_up(pred, parts, 4), 4, 4)
    torch.testing.assert_close(found.mean(), fast_losses(pred, target, parts, "l1")[2])


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize(("num_parts", "num_used"), [(4, 4), (7, 7), (7, 3)])
def test_no_tensor_over_pairs_of_parts(num_parts: int, num_used: int) -> None:
    predicted = normal(0, 2, num_used * (num_parts - 1), 3, 5).requires_grad_()
    target = normal(1, 2, num_parts, 3, 5)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        error, distance, _ = parts_losses(predicted, target, num_used, "l1")
        (error + distance).backward()
    assert largest.numbers == predicted.numel()
    # Errors and counts, one of each per prediction, and a few scalars.
    assert sum(kept.values()) <= 2 * predicted.numel() * predicted.element_size() + 1024
