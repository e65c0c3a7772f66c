"""Smoothed targets against a double loop and the numbers of their specification; colours of places."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchmine.ops.position_targets import (
    fill_patches,
    least_cross_entropy,
    place_colours,
    smoothing_map,
)
from patchmine.ops.schedules import falling
from patchmine.types import Grid, Progress


def by_loop(size: tuple[int, int], sigma: float, norm: str) -> Tensor:
    """The reference's double loop over pairs of places."""
    count = size[0] * size[1]
    full = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            squared = (i // size[1] - j // size[1]) ** 2 + (i % size[1] - j % size[1]) ** 2
            full[i, j] = math.exp(-squared / sigma**2)
    return (full / full.sum(dim=1 if norm == "row" else 0, keepdim=True)).float()


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize("norm", ["row", "column"])
def test_the_map_equals_the_loop(size: tuple[int, int], norm: Any) -> None:
    for sigma in (2.0, 1.0, 0.7, 0.25):
        torch.testing.assert_close(
            smoothing_map(size, sigma, norm=norm), by_loop(size, sigma, norm), atol=2e-7, rtol=0
        )


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 3))
def test_sums_and_the_greatest_of_each_row(rows: int, columns: int, sigma: float) -> None:
    norms: tuple[Literal["row", "column"], ...] = ("row", "column")
    for norm in norms:
        found = smoothing_map((rows, columns), sigma, norm=norm)
        sums = found.sum(dim=1 if norm == "row" else 0)
        torch.testing.assert_close(sums, torch.ones(rows * columns))
    by_row = smoothing_map((rows, columns), sigma, norm="row")
    assert (by_row.diagonal() >= by_row.max(dim=1).values).all()
    torch.testing.assert_close(by_row, smoothing_map((rows, columns), sigma, norm="column").T)


@pytest.mark.parametrize("sigma", [0.0, 1e-9, 5e-4, 0.05])
def test_without_smoothing_each_place_is_its_own_target(sigma: float) -> None:
    assert torch.equal(smoothing_map((3, 4), sigma), torch.eye(12))


def test_published_weights() -> None:
    """At the 14 x 14 places of ViT-B/16: shares of the place itself and its neighbours, entropy,
    sums of rows.
    """
    full = smoothing_map((14, 14), 1.0, norm="row")
    inside, edge = 6 * 14 + 6, 6
    found = [
        full[inside, inside],
        full[edge, edge],
        full[0, 0],
        full[inside, inside + 1],
        full[inside, inside + 15],
    ]
    assert [round(value.item(), 3) for value in found] == [0.318, 0.407, 0.520, 0.117, 0.043]
    for sigma, entropy in ((1.0, 2.143), (0.75, 1.499), (0.5, 0.355)):
        floor = least_cross_entropy(smoothing_map((14, 14), sigma, norm="row"))
        assert floor[inside].item() == pytest.approx(entropy, abs=1e-3)
    sums = smoothing_map((14, 14), 1.0, norm="column").sum(dim=1)
    assert sums[0].item() == pytest.approx(0.886, abs=1e-3)
    assert sums[edge].item() == pytest.approx(0.941, abs=1e-3)
    assert sums.max().item() == pytest.approx(1.110, abs=1e-3)


def test_no_prediction_is_below_the_floor_and_the_best_one_is_on_it() -> None:
    targets = smoothing_map((3, 4), 1.0, norm="column")  # rows of other sums than one
    floor = least_cross_entropy(targets)
    best = targets / targets.sum(dim=1, keepdim=True)
    torch.testing.assert_close(-(targets * best.log()).sum(dim=1), floor)
    others = torch.randn(50, 12, 12, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    assert (-(targets * others).sum(dim=-1) > floor).all()
    assert torch.equal(least_cross_entropy(torch.eye(5)), torch.zeros(5))


def test_the_width_falls_from_epoch_to_epoch() -> None:
    widths = [falling(Progress(step, 40, 4), 1.0) for step in range(40)]
    assert widths[:4] == [1.0] * 4
    assert widths[-1] == pytest.approx(0.1)
    assert widths == sorted(widths, reverse=True)
    assert widths[12:16] == pytest.approx([0.7] * 4)


def test_colours_of_places() -> None:
    grid = Grid((3, 5), (2, 4))
    colours = place_colours(grid)
    assert colours.shape == (15, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    assert len({tuple(colour.tolist()) for colour in colours}) == 15
    painted = fill_patches(colours[None], grid)
    assert painted.shape == (1, 3, 6, 20)
    assert (painted[0, :, 2:4, 12:16] == colours[5 + 3][:, None, None]).all()
