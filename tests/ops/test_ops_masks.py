"""Masks: exact counts, the hard part always in, the rest drawn fairly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchmine.models.noise import Noise
from patchmine.ops.masks import (
    count_positions,
    count_visible,
    expand_units,
    fill_blocks,
    hard_masked,
    lowest_visible,
    sum_in_units,
    tubes,
    weighted_order,
)
from patchmine.types import Grid, Mask


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def slow_mask(
    noise: np.ndarray, difficulty: np.ndarray, num_hard: int, num_visible: int
) -> np.ndarray:
    """HPM's words, one image at a time: mask the hardest, shuffle the others, show the first of
    them.
    """
    rows = []
    for row, hard in zip(noise, difficulty, strict=True):
        hardest = np.argsort(hard, kind="stable")[len(hard) - num_hard :]
        rest = np.setdiff1d(np.arange(len(row)), hardest)
        shown = rest[np.argsort(row[rest], kind="stable")][:num_visible]
        mask = np.ones(len(row), dtype=bool)
        mask[shown] = False
        rows.append(mask)
    return np.stack(rows)


def check(mask: Mask, batch: int, length: int, num_visible: int) -> None:
    """Counts are exact, the two sets are disjoint, complete and in raster order."""
    assert mask.visible.shape == (batch, num_visible)
    assert mask.masked.shape == (batch, length - num_visible)
    together = torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(length).expand(batch, -1))
    for part in (mask.visible, mask.masked):
        assert (part.diff(dim=1) > 0).all()
    assert torch.equal(mask.as_bool().sum(dim=1), torch.full((batch,), length - num_visible))


@given(st.integers(1, 400), st.floats(0.01, 0.99))
def test_count_truncates_as_published(length: int, ratio: float) -> None:
    assert count_visible(length, ratio) == int(length * (1 - ratio))


@pytest.mark.parametrize(
    ("length", "ratio", "expected"), [(196, 0.75, 49), (100, 0.9, 9), (400, 0.8, 79)]
)
def test_count_on_binary_floats(length: int, ratio: float, expected: int) -> None:
    assert count_visible(length, ratio) == expected


@given(st.data())
def test_masks_against_the_slow_way(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 60))
    num_visible = data.draw(st.integers(1, length - 1))
    num_hard = data.draw(st.integers(0, length - num_visible))
    seed = data.draw(st.integers(0, 2**16))
    noise = uniform(seed, batch, length)
    # Few distinct values, so that ties happen.
    difficulty = (uniform(seed + 1, batch, length) * 7).floor()
    mask = hard_masked(noise, difficulty, num_hard, num_visible)
    check(mask, batch, length, num_visible)
    expected = slow_mask(noise.numpy(), difficulty.numpy(), num_hard, num_visible)
    assert np.array_equal(mask.as_bool().numpy(), expected)


@given(st.integers(0, 1000))
def test_random_mask(seed: int) -> None:
    noise = uniform(seed, 3, 49)
    mask = lowest_visible(noise, 12)
    check(mask, 3, 49, 12)
    assert (
        noise.gather(1, mask.visible)
        .max(dim=1)
        .values.lt(noise.gather(1, mask.masked).min(dim=1).values)
        .all()
    )
    assert not torch.equal(mask.visible[0], mask.visible[1])


def test_bfloat16_difficulty_breaks_ties_as_float32_does() -> None:
    difficulty = torch.tensor([[1.0, 1.0, 2.0, 1.0]], dtype=torch.bfloat16)
    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert torch.equal(
        hard_masked(noise, difficulty, 2, 1).as_bool(),
        hard_masked(noise, difficulty.float(), 2, 1).as_bool(),
    )


def test_patches_that_are_not_hard_are_visible_alike() -> None:
    batch, length, num_hard, num_visible = 4000, 20, 6, 5
    difficulty = torch.arange(length).float().expand(batch, -1)
    mask = hard_masked(uniform(5, batch, length), difficulty, num_hard, num_visible)
    shown = (~mask.as_bool()).sum(dim=0)
    assert shown[-num_hard:].sum() == 0
    easy = length - num_hard
    expected = batch * num_visible / easy
    # Given the total, (observed - expected)^2 / (expected (1 - p)) summed is chi-square with easy -
    # 1 degrees of freedom.
    spread = (
        ((shown[:easy] - expected) ** 2 / (expected * (1 - num_visible / easy))).sum()
        * (easy - 1)
        / easy
    )
    assert spread < 34.5  # 99.9 % point for 13 degrees


def test_hard_masking_goes_to_another_sample_only() -> None:
    noise, difficulty = uniform(1, 2, 30), uniform(2, 2, 30)
    first = hard_masked(noise, difficulty, 5, 8)
    changed = torch.cat([uniform(3, 1, 30), noise[1:]])
    assert torch.equal(hard_masked(changed, difficulty, 5, 8).visible[1], first.visible[1])


def test_noise_is_a_function_of_seed_step_and_row() -> None:
    whole = Noise(seed=4)
    whole.begin(9, 0, 8)
    everything = whole.uniform(8, 5)
    parts = []
    for first_row in (0, 2, 4, 6):
        part = Noise(seed=4)
        part.begin(9, first_row, 8)
        parts.append(part.uniform(2, 5))
    assert torch.equal(torch.cat(parts), everything)
    whole.begin(9, 0, 8)
    assert torch.equal(whole.uniform(8, 5), everything)
    assert not torch.equal(
        whole.uniform(8, 5), everything
    )  # a second draw of the same step is another one
    whole.begin(10, 0, 8)
    assert not torch.equal(whole.uniform(8, 5), everything)
    other = Noise(seed=5)
    other.begin(9, 0, 8)
    assert not torch.equal(other.uniform(8, 5), everything)


@pytest.mark.parametrize(
    ("size", "per_unit"),
    [((6, 4), (2, 2)), ((4, 6), (1, 3)), ((3, 5), (1, 1)), ((2, 4, 6), (2, 2, 3))],
)
def test_units_against_a_repeated_mask(size: tuple[int, ...], per_unit: tuple[int, ...]) -> None:
    """The obvious way: a picture of zeros and ones, one number a unit, enlarged to the patches."""
    grid = Grid(size, (4,) * len(size))
    counts = [side // step for side, step in zip(size, per_unit, strict=True)]
    total = int(np.prod(counts))
    chosen = uniform(3, 5, total).argsort(dim=1)[:, : total // 2]
    found = expand_units(chosen, grid, per_unit)
    assert (found.diff(dim=1) > 0).all()
    for row, numbers in zip(chosen.tolist(), found.tolist(), strict=True):
        picture = np.isin(np.arange(total), row).reshape(counts)
        for axis, step in enumerate(per_unit):
            picture = picture.repeat(step, axis=axis)
        assert np.array_equal(np.flatnonzero(picture), numbers)


def test_sums_in_units_against_a_loop() -> None:
    grid, per_unit = Grid((6, 4), (4, 4)), (3, 2)
    values = uniform(0, 2, 24)
    found = sum_in_units(values, grid, per_unit)
    for unit in range(4):
        inside = expand_units(torch.full((2, 1), unit), grid, per_unit)
        torch.testing.assert_close(found[:, unit], values.gather(1, inside).sum(dim=1))


def test_a_weighted_draw_is_that_of_multinomial() -> None:
    weights = uniform(0, 4, 30) + 0.01
    expected = torch.multinomial(weights, 30, generator=torch.Generator().manual_seed(3))
    exponential = torch.empty(4, 30).exponential_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(weighted_order(weights, -torch.expm1(-exponential)), expected)


def test_weights_may_be_of_any_scale() -> None:
    weights, noise = uniform(0, 4, 30) + 0.01, uniform(1, 4, 30)
    for scale in (0.1, 7.0, 1e4):
        assert torch.equal(weighted_order(weights * scale, noise), weighted_order(weights, noise))


def test_what_has_no_weight_comes_last_in_random_order() -> None:
    weights = uniform(0, 2000, 6) + 0.01
    weights[:, [0, 4]] = 0.0
    order = weighted_order(weights, uniform(1, 2000, 6))
    assert set(order[:, -2:].unique().tolist()) == {0, 4}
    assert (order[:, -1] == 0).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)


def test_equal_weights_draw_every_patch_alike() -> None:
    for weights in (torch.ones(2000, 10), torch.zeros(2000, 10)):
        order = weighted_order(weights, uniform(2, 2000, 10))
        for count in (3, 7):  # among the first three, and among the first seven
            share = (order[:, :count, None] == torch.arange(10)).any(dim=1).float().mean(dim=0)
            bound = 4 * (count / 10 * (1 - count / 10) / 2000) ** 0.5
            assert (share - count / 10).abs().max() < bound


def test_the_first_is_drawn_in_proportion() -> None:
    weights = torch.tensor([10.0, 1.0, 1.0, 8.0]).expand(4000, 4)
    first = weighted_order(weights, uniform(4, 4000, 4))[:, 0]
    share = torch.bincount(first, minlength=4) / 4000
    torch.testing.assert_close(share, weights[0] / 20, atol=4 * 0.5 / 4000**0.5, rtol=0)


@pytest.mark.parametrize(("ratio", "visible"), [(0.9, 20), (0.75, 49), (0.5, 98)])
def test_clips_truncate_what_is_masked_and_images_what_is_visible(
    ratio: float, visible: int
) -> None:
    assert count_positions(Grid((8, 14, 14), (2, 16, 16)), ratio) == visible
    assert (
        count_positions(Grid((14, 14), (16, 16)), ratio)
        == int(196 * (1 - ratio))
        == count_visible(196, ratio)
    )


def test_tubes_repeat_places_at_every_time() -> None:
    grid = Grid((3, 2, 2), (2, 4, 4))
    mask = tubes(Mask(torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 2], [0, 3]]), 4), grid)
    assert mask.num_patches == 12
    assert mask.visible.tolist() == [[0, 3, 4, 7, 8, 11], [1, 2, 5, 6, 9, 10]]
    assert mask.masked.tolist() == [[1, 2, 5, 6, 9, 10], [0, 3, 4, 7, 8, 11]]
    assert tubes(mask, grid) is mask


@pytest.mark.parametrize("size", [(6, 4), (3, 6, 4)])
@pytest.mark.parametrize("block", [1, 2])
def test_blocks_against_a_loop_over_places(size: tuple[int, ...], block: int) -> None:
    rows, columns = 6 // block, 4 // block
    mask = lowest_visible(uniform(7, 5, rows * columns), 2)
    found = fill_blocks(mask, Grid(size, (4,) * len(size)), block)
    assert found.num_patches == 24
    for row, part in ((mask.visible, found.visible), (mask.masked, found.masked)):
        for blocks, places in zip(row.tolist(), part.tolist(), strict=True):
            inside = [
                place
                for place in range(24)
                if place // 4 // block * columns + place % 4 // block in blocks
            ]
            assert places == inside
