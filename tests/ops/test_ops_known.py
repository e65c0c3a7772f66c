"""What counts of patches with missing pixels, against slow loops over pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from patchmine.ops import known as ops
from patchmine.ops.losses import absolute_difficulty_loss, relative_difficulty_loss, squared_error
from patchmine.ops.patches import gather_patches, patch_values, pixel_targets

PATCH = (4, 4)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def known() -> Tensor:
    """Half of all values, one whole patch, no value of another one."""
    drawn = torch.rand(3, 2, 8, 12, generator=torch.Generator().manual_seed(1)) > 0.45
    drawn[:, :, :4, :4], drawn[:, :, 4:, 8:] = True, False
    return drawn


INDEX = torch.tensor([[0, 2, 5], [1, 4, 5], [3, 0, 5]])


def loop_of_errors(
    predicted: Tensor, images: Tensor, known: Tensor, *, norm: bool
) -> list[list[float]]:
    """Of each patch the sum of squared errors over the pixels that count, by P."""
    found = []
    for row in range(3):
        errors = []
        for place, patch in enumerate(INDEX[row].tolist()):
            top, left = patch // 3 * 4, patch % 3 * 4
            values, wanted = [], []
            for pixel in range(16):
                for channel in range(2):
                    at = (row, channel, top + pixel // 4, left + pixel % 4)
                    if known[at]:
                        values.append(float(images[at]))
                        wanted.append(float(predicted[row, place, 2 * pixel + channel]))
            if len(values) < 16:  # less than half of 32
                errors.append(0.0)
                continue
            mean, spread = 0.0, 1.0
            if norm:
                mean = sum(values) / len(values)
                squares = sum((value - mean) ** 2 for value in values)
                spread = math.sqrt(squares / (len(values) - 1) + 1e-6)
            pairs = zip(wanted, values, strict=True)
            errors.append(sum((w - (v - mean) / spread) ** 2 for w, v in pairs) / 32)
        found.append(errors)
    return found


@pytest.mark.parametrize("norm", [True, False])
def test_errors_are_those_of_a_loop_over_pixels_that_count(
    images: Tensor, known: Tensor, norm: bool
) -> None:
    predicted = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(2))
    counts = ops.counting(known, INDEX, PATCH)
    target = pixel_targets(images, INDEX, PATCH, norm_pix_loss=norm, counts=counts)
    error = squared_error(ops.settled(predicted, target, counts), target)
    expected = torch.tensor(loop_of_errors(predicted, images, known, norm=norm))
    assert (expected == 0).any()
    assert (expected > 0).any()
    torch.testing.assert_close(error, expected)
    # By the number of values that count, where there are some.
    number = counts.sum(dim=2)
    compared = ops.compared(error, counts)
    assert torch.equal(compared.isinf(), number == 0)
    some = number > 0
    torch.testing.assert_close(compared[some], (expected * 32 / number)[some])


@pytest.mark.parametrize("norm", [True, False])
def test_missing_pixels_have_no_gradient_and_their_values_do_not_matter(
    images: Tensor, known: Tensor, norm: bool
) -> None:
    predicted = torch.randn(3, 3, 32, requires_grad=True)
    counts = ops.counting(known, INDEX, PATCH)
    found = []
    for fill in (0.0, 1e6):
        given = torch.where(known, images, fill)
        target = pixel_targets(given, INDEX, PATCH, norm_pix_loss=norm, counts=counts)
        loss = squared_error(ops.settled(predicted, target, counts), target).mean()
        (slope,) = torch.autograd.grad(loss, predicted)
        found.append((loss.detach(), slope))
    (loss, slope), (again, same) = found
    assert torch.equal(loss, again)
    assert torch.equal(slope, same)
    missing = ~patch_values(gather_patches(known, INDEX, PATCH))
    assert slope[missing].count_nonzero() == 0
    assert slope[counts].count_nonzero() == counts.sum()


def test_where_all_is_known_nothing_changes(images: Tensor) -> None:
    everything = torch.ones_like(images, dtype=torch.bool)
    counts = ops.counting(everything, INDEX, PATCH)
    assert counts.all()
    for norm in (True, False):
        plain = pixel_targets(images, INDEX, PATCH, norm_pix_loss=norm)
        target = pixel_targets(images, INDEX, PATCH, norm_pix_loss=norm, counts=counts)
        torch.testing.assert_close(target, plain)
    assert ops.counting(None, INDEX, PATCH) is None
    assert ops.settled(images, images, None) is images
    assert ops.told(None) == {}
    assert float(ops.told(counts)["counted"]) == 1


def test_orders_of_values_and_whole_patches(known: Tensor) -> None:
    last, first, whole = (
        ops.counting(known, INDEX, PATCH, **how)
        for how in ({}, {"channels_first": True}, {"whole": True})
    )
    assert torch.equal(last.unflatten(2, (16, 2)).mT.flatten(2), first)
    assert torch.equal(whole.squeeze(2), last.any(dim=2))
    everywhere = ops.counting_patches(known, PATCH)
    assert torch.equal(everywhere.gather(1, INDEX), whole.squeeze(2))


def test_what_does_not_count_is_not_scored_or_has_the_mean(known: Tensor) -> None:
    values = torch.rand(3, 6)
    counts = ops.counting_patches(known, PATCH)
    assert not counts.all()
    scored, levelled = (each(values, known, PATCH) for each in (ops.scored, ops.levelled))
    for row in range(3):
        those = [float(v) for v, c in zip(values[row], counts[row], strict=True) if c]
        for patch in range(6):
            if counts[row, patch]:
                assert scored[row, patch] == levelled[row, patch] == values[row, patch]
            else:
                assert scored[row, patch] == -math.inf
                assert float(levelled[row, patch]) == pytest.approx(sum(those) / len(those))
    nothing = torch.zeros_like(known)
    assert torch.equal(ops.levelled(values, nothing, PATCH), torch.zeros(3, 6))


def test_ranking_is_a_loop_over_pairs_that_count() -> None:
    generator = torch.Generator().manual_seed(3)
    predicted = torch.randn(2, 7, generator=generator, requires_grad=True)
    error = torch.rand(2, 7, generator=generator)
    counts = torch.rand(2, 7, generator=generator) > 0.4
    loss = relative_difficulty_loss(predicted, error, counts)
    total = torch.zeros(())
    for row in range(2):
        for a in range(7):
            for b in range(7):
                if counts[row, a] and counts[row, b] and error[row, a] > error[row, b]:
                    apart = predicted[row, a] - predicted[row, b]
                    total = total - torch.log(torch.sigmoid(apart) + 1e-6)
    expected = total / (2 * 7 * 6 / 2)
    torch.testing.assert_close(loss, expected)
    slopes = [torch.autograd.grad(each, predicted)[0] for each in (loss, expected)]
    torch.testing.assert_close(*slopes)
    assert slopes[0][~counts].count_nonzero() == 0
    everything = torch.ones_like(counts)
    plain = relative_difficulty_loss(predicted, error)
    assert torch.equal(relative_difficulty_loss(predicted, error, everything), plain)


def test_absolute_difficulty_is_standardised_by_what_counts() -> None:
    generator = torch.Generator().manual_seed(4)
    predicted = torch.randn(2, 7, generator=generator, requires_grad=True)
    error = torch.rand(2, 7, generator=generator)
    counts = torch.rand(2, 7, generator=generator) > 0.4
    loss = absolute_difficulty_loss(predicted, error, counts)
    total = torch.zeros(())
    for row in range(2):
        those = error[row, counts[row]]
        wanted = (those - those.mean()) / (those.var() + 1e-6).sqrt()
        total = total + (predicted[row, counts[row]] - wanted).square().sum()
    torch.testing.assert_close(loss, total / 14)
    (slope,) = torch.autograd.grad(loss, predicted)
    assert slope[~counts].count_nonzero() == 0
    everything = torch.ones_like(counts)
    plain = absolute_difficulty_loss(predicted, error)
    torch.testing.assert_close(absolute_difficulty_loss(predicted, error, everything), plain)


def test_a_batch_in_which_nothing_counts_has_a_loss_of_nothing() -> None:
    predicted, error = torch.randn(2, 5, requires_grad=True), torch.rand(2, 5)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    for objective in (relative_difficulty_loss, absolute_difficulty_loss):
        loss = objective(predicted, error, nothing)
        assert float(loss.detach()) == 0
        (slope,) = torch.autograd.grad(loss, predicted)
        assert slope.count_nonzero() == 0
