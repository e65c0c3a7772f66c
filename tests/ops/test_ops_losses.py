"""Losses against their definitions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchmine.bench.measure import peak_bytes
from patchmine.ops import losses
from patchmine.ops.losses import (
    absolute_difficulty_loss,
    direction_error,
    masked_absolute_error,
    relative_difficulty_loss,
    squared_error,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).float()


def slow_ranking(predicted: Tensor, error: Tensor) -> Tensor:
    """HPM's ranking objective over all ordered pairs, with the graph that torch makes of it."""
    gap = predicted[:, :, None] - predicted[:, None, :]
    ordered = error[:, :, None] > error[:, None, :]
    return -(torch.log(torch.sigmoid(gap) + 1e-6) * ordered).sum() / ordered.sum().clamp(min=1)


@given(st.data())
def test_ranking_against_all_pairs(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 40))
    seed, scale = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from([0.1, 1.0, 6.0]))
    error = (
        normal(seed, batch, length) * data.draw(st.sampled_from([1.0, 1000.0]))
    ).round()  # with and without ties
    values = []
    for loss in (slow_ranking, relative_difficulty_loss):
        predicted = (normal(seed + 1, batch, length) * scale).requires_grad_()
        value = loss(predicted, error)
        (3.0 * value).backward()
        values.append((value.detach(), predicted.grad))
    torch.testing.assert_close(values[1][0], values[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values[1][1], values[0][1], rtol=1e-3, atol=1e-6)


def test_ranking_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, error = normal(0, 3, 50).requires_grad_(), normal(1, 3, 50)
    whole = relative_difficulty_loss(predicted, error)
    monkeypatch.setattr(losses, "PAIRS_AT_ONCE", 3 * 50)  # a row at a time
    torch.testing.assert_close(relative_difficulty_loss(predicted, error), whole, rtol=1e-6, atol=0)


def test_ranking_of_clips_fits_into_little_memory() -> None:
    """32 clips with 1408 masked cubes: a tensor over all pairs would take 254 MB, and the graph of
    it 1.5 GB.
    """
    predicted = torch.zeros(
        32, 1408, device="meta", requires_grad=True
    )  # memory is counted, nothing is worked out
    error = torch.zeros(32, 1408, device="meta")
    peak = peak_bytes(
        lambda: relative_difficulty_loss(predicted, error).backward(), torch.device("cpu")
    )
    assert 10e6 < peak < 100e6


def test_ranking_sees_the_order_of_errors_only() -> None:
    predicted, error = normal(0, 2, 30), normal(1, 2, 30)
    value = relative_difficulty_loss(predicted, error)
    torch.testing.assert_close(
        relative_difficulty_loss(predicted + 7.0, error), value, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(relative_difficulty_loss(predicted, error.exp() * 3 + 2), value)
    assert relative_difficulty_loss(torch.zeros_like(predicted), error).item() == pytest.approx(
        math.log(2), abs=1e-5
    )


def test_nothing_to_rank_is_no_loss() -> None:
    predicted = normal(0, 2, 6).requires_grad_()
    value = relative_difficulty_loss(predicted, torch.ones(2, 6))
    value.backward()
    assert value.item() == 0
    assert torch.equal(predicted.grad, torch.zeros(2, 6))


def test_errors_take_no_gradient() -> None:
    for loss in (relative_difficulty_loss, absolute_difficulty_loss):
        predicted, error = normal(0, 2, 6).requires_grad_(), normal(1, 2, 6).requires_grad_()
        loss(predicted, error).backward()
        assert error.grad is None


def test_swapping_images_swaps_gradients() -> None:
    predicted, error = normal(0, 2, 9), normal(1, 2, 9)
    grads = []
    for order in ([0, 1], [1, 0]):
        leaf = predicted[order].requires_grad_()
        relative_difficulty_loss(leaf, error[order]).backward()
        grads.append(leaf.grad[order])
    torch.testing.assert_close(grads[0], grads[1])


@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_absolute_loss_is_blind_to_affine_maps_of_the_error(scale: float, shift: float) -> None:
    predicted, error = normal(0, 2, 30), normal(1, 2, 30) * 3
    value = absolute_difficulty_loss(predicted, error)
    torch.testing.assert_close(
        absolute_difficulty_loss(predicted, error * scale + shift), value, rtol=1e-3, atol=1e-4
    )


def test_absolute_loss_by_its_definition() -> None:
    predicted, error = normal(0, 3, 10), normal(1, 3, 10)
    rows = []
    for p, e in zip(predicted, error, strict=True):
        wanted = (e - e.mean()) / (e.var(unbiased=True) + 1e-6).sqrt()
        rows.append(((p - wanted) ** 2).mean())
    torch.testing.assert_close(absolute_difficulty_loss(predicted, error), torch.stack(rows).mean())


def test_direction_error_is_two_minus_twice_the_cosine() -> None:
    prediction, target = normal(0, 2, 5, 8), normal(1, 2, 5, 8)
    expected = 2 - 2 * torch.cosine_similarity(prediction, target, dim=-1)
    torch.testing.assert_close(direction_error(prediction, target), expected)
    torch.testing.assert_close(direction_error(prediction * 4, target * 0.1), expected)


def test_losses_are_float32_under_autocast() -> None:
    a, b = normal(0, 2, 5, 8).bfloat16(), normal(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert squared_error(a, b).dtype == torch.float32
        assert direction_error(a, b).dtype == torch.float32
        leaf = normal(2, 2, 5).bfloat16().requires_grad_()
        value = relative_difficulty_loss(leaf, squared_error(a, b))
        value.backward()
    assert value.dtype == torch.float32
    assert leaf.grad.dtype == torch.bfloat16


def test_absolute_error_against_a_mask_over_pixels() -> None:
    """SimMIM's words: whole images, a mask of one channel repeated to pixels, 1e-5, divided by the
    channels.
    """
    images, painted = normal(1, 2, 3, 4, 8), normal(2, 2, 3, 4, 8).requires_grad_()
    hidden = torch.zeros(2, 1, 4, 8)
    for row, column in ((0, 4), (1, 0)):
        hidden[row, 0, :, column : column + 4] = 1  # one of two patches of 4 x 4 in each image
    slow = ((images - painted).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3
    parts = [
        torch.stack([x[0, :, :, 4:], x[1, :, :, :4]]).flatten(1)[:, None] for x in (painted, images)
    ]
    fast = masked_absolute_error(*parts, 3)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-6)
    (slope,) = torch.autograd.grad(fast, painted)
    assert torch.equal(slope != 0, hidden.bool().expand_as(slope))
    torch.testing.assert_close(slope.abs(), hidden.expand_as(slope) / (3 * (hidden.sum() + 1e-5)))


def test_absolute_error_of_nothing_is_zero() -> None:
    assert masked_absolute_error(torch.zeros(2, 0, 48), torch.zeros(2, 0, 48), 3).item() == 0


def test_shapes_are_checked_in_tests() -> None:
    with pytest.raises(TypeError, match="target"):
        losses.squared_error(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
