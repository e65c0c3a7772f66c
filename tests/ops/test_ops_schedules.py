"""Schedules against those of timm and torch, and HPM's against the numbers of its specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from patchmine.ops.schedules import LrSchedule, cosine_decay, ema_decay, hard_count, learning_rate
from patchmine.types import Progress

PUBLISHED = dict(start=0.0, end=0.5, offset=1)


def published_count(
    epoch: int, epochs: int, num_masked: int = 147, steps_per_epoch: int = 7, step: int = 0
) -> int:
    progress = Progress(epoch * steps_per_epoch + step, epochs * steps_per_epoch, steps_per_epoch)
    return hard_count(progress, num_masked, **PUBLISHED)


@pytest.mark.parametrize(
    ("epoch", "epochs", "expected"),
    [
        (0, 200, 0),
        (1, 200, 0),
        (2, 200, 1),
        (99, 200, 36),
        (199, 200, 73),
        (9, 800, 0),
        (10, 800, 1),
        (20, 1600, 0),
    ],
)
def test_hard_patches_of_the_published_schedule(epoch: int, epochs: int, expected: int) -> None:
    assert published_count(epoch, epochs) == expected


@given(st.integers(1, 300))
def test_hard_patches_never_get_fewer_and_end_at_half(epochs: int) -> None:
    counts = [published_count(epoch, epochs) for epoch in range(epochs)]
    assert counts == sorted(counts)
    assert counts[-1] == 73
    if epochs >= 74:
        assert counts[0] == 0


def test_hard_patches_change_with_the_epoch_only() -> None:
    assert len({published_count(50, 100, step=step) for step in range(7)}) == 1


def test_a_count_stays_within_the_masked() -> None:
    after = Progress(100, 100, 1)
    assert hard_count(after, 10, start=0.0, end=1.0, offset=1) == 10


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.999), (50, 0.99945), (99, 0.999891), (100, 0.9999), (150, 0.9999)]
)
def test_published_decay(epoch: int, expected: float) -> None:
    found = ema_decay(Progress(epoch * 3 + 2, 600, 3), start=0.999, end=0.9999, ramp_epochs=100)
    assert found == pytest.approx(expected, abs=1e-12)


def test_decay_over_the_run() -> None:
    found = [
        ema_decay(Progress(step, 10, 5), start=0.9, end=1.0, ramp_epochs=None)
        for step in (0, 5, 10)
    ]
    assert found == pytest.approx([0.9, 0.95, 1.0])


def test_cosine_decay_rises_to_one() -> None:
    found = [cosine_decay(Progress(step, 10, 5), start=0.996, end=1.0) for step in range(11)]
    assert found[0] == pytest.approx(0.996)
    assert found[5] == pytest.approx(0.998)
    assert found[10] == pytest.approx(1.0)
    assert found == sorted(found)


def rates(schedule: LrSchedule, epochs: int, per_epoch: int = 5) -> list[float]:
    return [
        learning_rate(Progress(step, epochs * per_epoch, per_epoch), 1e-3, schedule)
        for step in range(epochs * per_epoch)
    ]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_cosine_is_that_of_timm(prefix: bool) -> None:
    theirs = CosineLRScheduler(
        optimizer(),
        t_initial=60 - 15 * prefix,  # timm counts the warm-up apart where it goes before the cosine
        lr_min=1e-5,
        warmup_t=15,
        warmup_lr_init=1e-6,
        warmup_prefix=prefix,
        t_in_epochs=False,
    )
    ours = LrSchedule(warmup_epochs=3, warmup_lr=1e-6, warmup_prefix=prefix, min_lr=1e-5)
    expected = [theirs._get_lr(step)[0] for step in range(60)]
    assert rates(ours, epochs=12) == pytest.approx(expected, rel=1e-12)


def test_multi_step_drops_at_its_milestones() -> None:
    theirs = torch.optim.lr_scheduler.MultiStepLR(
        base := optimizer(), milestones=[35, 49], gamma=0.1
    )
    expected = []
    for _ in range(70):
        expected.append(base.param_groups[0]["lr"])
        base.step()
        theirs.step()
    ours = LrSchedule(
        "multi_step", warmup_epochs=2, warmup_lr=1e-4, milestones=(0.5, 0.7), gamma=0.1
    )
    found = rates(ours, epochs=14)
    assert found[:10] == pytest.approx([1e-4 + 9e-4 * step / 10 for step in range(10)])
    assert found[10:] == pytest.approx(expected[10:], rel=1e-12)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_line_is_torchs_polynomial_of_power_one(prefix: bool) -> None:
    start = 15 * prefix
    base = optimizer()
    theirs = torch.optim.lr_scheduler.PolynomialLR(base, total_iters=60 - start, power=1.0)
    expected = []
    for _ in range(60 - start):
        expected.append(1e-5 + 0.99 * base.param_groups[0]["lr"])
        base.step()
        theirs.step()
    ours = LrSchedule("linear", warmup_epochs=3, warmup_lr=1e-6, warmup_prefix=prefix, min_lr=1e-5)
    found = rates(ours, epochs=12)
    assert found[:15] == pytest.approx([1e-6 + 9.99e-4 * step / 15 for step in range(15)])
    assert found[15:] == pytest.approx(expected[15 - start :], rel=1e-9)


def test_a_constant_rate_stays() -> None:
    assert rates(LrSchedule("constant", warmup_epochs=1), epochs=4) == pytest.approx(
        [0, 2e-4, 4e-4, 6e-4, 8e-4, *[1e-3] * 15]
    )
