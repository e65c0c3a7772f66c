"""HPM's schedules against the numbers of its specification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchmine.ops.schedules import cosine_decay, ema_decay, hard_count
from patchmine.types import Progress

PUBLISHED = dict(start=0.0, end=0.5, offset=1)


def published_count(epoch: int, epochs: int, num_masked: int = 147, steps_per_epoch: int = 7, step: int = 0) -> int:
    progress = Progress(epoch * steps_per_epoch + step, epochs * steps_per_epoch, steps_per_epoch)
    return hard_count(progress, num_masked, **PUBLISHED)


@pytest.mark.parametrize(
    ("epoch", "epochs", "expected"),
    [(0, 200, 0), (1, 200, 0), (2, 200, 1), (99, 200, 36), (199, 200, 73), (9, 800, 0), (10, 800, 1), (20, 1600, 0)],
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
    found = [ema_decay(Progress(step, 10, 5), start=0.9, end=1.0, ramp_epochs=None) for step in (0, 5, 10)]
    assert found == pytest.approx([0.9, 0.95, 1.0])


def test_cosine_decay_rises_to_one() -> None:
    found = [cosine_decay(Progress(step, 10, 5), start=0.996, end=1.0) for step in range(11)]
    assert found[0] == pytest.approx(0.996)
    assert found[5] == pytest.approx(0.998)
    assert found[10] == pytest.approx(1.0)
    assert found == sorted(found)
