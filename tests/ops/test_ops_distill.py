"""Losses between views against loops over their pairs; centre, temperature, monitors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from patchmine.ops.distill import (
    feature_spread,
    mean_entropy,
    new_centre,
    search_cross_entropy,
    sharpen,
    teacher_temperature,
    view_cross_entropy,
)
from patchmine.types import Progress

IMAGES, PROTOTYPES = 3, 11


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def over_pairs(student: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """DINO's loss as it is written down, and how many terms it has."""
    terms = [
        -(target * (view / 0.1).log_softmax(-1)).sum(-1).mean()
        for t, target in enumerate(targets.chunk(2))
        for v, view in enumerate(student.split(len(targets) // 2))
        if v != t
    ]
    return torch.stack(terms).mean(), len(terms)


@pytest.mark.parametrize(("views", "terms"), [(2, 2), (3, 4), (10, 18)])
def test_views_against_pairs(views: int, terms: int) -> None:
    student = normal(views * IMAGES, PROTOTYPES).double().requires_grad_()
    targets = normal(2 * IMAGES, PROTOTYPES, seed=1).double().softmax(-1)
    expected, count = over_pairs(student, targets)
    assert count == terms
    (wanted,) = torch.autograd.grad(expected, student)
    found = view_cross_entropy(student, targets)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found, expected.float(), check_dtype=False)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


def test_a_view_is_never_its_own_target() -> None:
    targets = torch.eye(PROTOTYPES)[
        :2
    ]  # one image: view 0 must say prototype 1, view 1 prototype 0
    right = 5 * targets.flip(0)
    assert view_cross_entropy(right, targets) < 1e-6
    assert view_cross_entropy(5 * targets, targets) > 10


def test_constant_students_pay_the_logarithm() -> None:
    targets = normal(2 * IMAGES, PROTOTYPES).softmax(-1)
    constant = torch.ones(5 * IMAGES, PROTOTYPES)
    assert view_cross_entropy(constant, targets).item() == pytest.approx(
        math.log(PROTOTYPES), rel=1e-6
    )
    assert search_cross_entropy(constant[:6], targets).item() == pytest.approx(
        math.log(PROTOTYPES), rel=1e-6
    )


def test_the_order_of_local_views_does_not_matter() -> None:
    student = normal(6, IMAGES, PROTOTYPES)
    targets = normal(2 * IMAGES, PROTOTYPES, seed=1).softmax(-1)
    shuffled = student[[0, 1, 4, 2, 5, 3]]
    torch.testing.assert_close(
        view_cross_entropy(shuffled.flatten(0, 1), targets),
        view_cross_entropy(student.flatten(0, 1), targets),
    )


def test_search_row_by_row() -> None:
    student, targets = normal(6, PROTOTYPES), normal(6, PROTOTYPES, seed=1).softmax(-1)
    rows = [-(targets[i] * (student[i] / 0.1).log_softmax(0)).sum() for i in range(6)]
    torch.testing.assert_close(search_cross_entropy(student, targets), torch.stack(rows).mean())


def test_targets_are_centred_sharp_and_constant() -> None:
    logits, centre = normal(4, PROTOTYPES).requires_grad_(), normal(PROTOTYPES, seed=1)
    found = sharpen(logits, centre, 0.05)
    assert not found.requires_grad
    torch.testing.assert_close(found, ((logits - centre) / 0.05).softmax(-1).detach())
    assert torch.equal(sharpen(logits, None, 0.05), sharpen(logits, torch.zeros(PROTOTYPES), 0.05))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_of_half_precision(dtype: torch.dtype) -> None:
    """Rounded logits give the loss of the rounded numbers: nothing is lost on the way to the
    temperature.
    """
    student, teacher = (20 * normal(rows, PROTOTYPES, seed=rows).to(dtype) for rows in (9, 6))
    with torch.autocast("cpu", torch.bfloat16):
        targets = sharpen(teacher, torch.zeros(PROTOTYPES), 0.04)
        rough = view_cross_entropy(student, targets), search_cross_entropy(student[:6], targets)
    exact = sharpen(teacher.float(), None, 0.04)
    assert targets.dtype == torch.float32
    for value, expected in zip(
        rough,
        (
            view_cross_entropy(student.float(), exact),
            search_cross_entropy(student[:6].float(), exact),
        ),
        strict=True,
    ):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_centre_is_a_running_mean_of_rows() -> None:
    centre, logits = normal(PROTOTYPES), normal(6, PROTOTYPES, seed=1)
    torch.testing.assert_close(new_centre(centre, logits, 0.9), 0.9 * centre + 0.1 * logits.mean(0))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_centre_survives_a_broken_batch(wrong: float) -> None:
    centre, logits = normal(PROTOTYPES), normal(6, PROTOTYPES, seed=1)
    logits[2, 3] = wrong
    assert torch.equal(new_centre(centre, logits, 0.9), centre)


@pytest.mark.parametrize(
    ("epoch", "epochs", "warmup", "expected"),
    [
        (0, 200, 50, 0.04),
        (7, 200, 50, 0.04 + 0.03 * 7 / 49),
        (49, 200, 50, 0.07),
        (50, 200, 50, 0.07),
        (199, 200, 50, 0.07),
        (0, 10, 50, 0.04),  # the reference cannot build this one
        (9, 10, 50, 0.07),
        (0, 10, 0, 0.07),
        (0, 10, 1, 0.04),
        (1, 10, 1, 0.07),
    ],
)
def test_temperature_of_the_teacher(epoch: int, epochs: int, warmup: int, expected: float) -> None:
    for step in (0, 4):
        progress = Progress(epoch * 5 + step, epochs * 5, 5)
        found = teacher_temperature(progress, start=0.04, end=0.07, warmup_epochs=warmup)
        assert found == pytest.approx(expected, abs=1e-12)


def test_entropy_sees_a_single_winner() -> None:
    assert mean_entropy(torch.full((4, PROTOTYPES), 1 / PROTOTYPES)).item() == pytest.approx(1)
    assert mean_entropy(torch.eye(PROTOTYPES)).item() == pytest.approx(
        1
    )  # each row sure, all together even
    assert mean_entropy(torch.eye(PROTOTYPES)[:1].expand(4, -1)).item() == 0


def test_spread_sees_rows_that_are_alike() -> None:
    even = normal(4000, 16, seed=3)
    assert feature_spread(even).item() == pytest.approx(1, abs=0.01)
    assert feature_spread(even[:1].expand(8, -1)).item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(feature_spread(3 * even), feature_spread(even))
    assert feature_spread(even[:1]).isfinite()
