"""What a map of difficulty says, against SciPy and against maps that are made for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from patchmine.ops.mining import position_share, rank_correlation, ranks


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gaps(maps: Tensor, share: float) -> Tensor:
    hidden = torch.rand(maps.shape, generator=torch.Generator().manual_seed(9)) < share
    return maps.masked_fill(hidden, -torch.inf)


def test_ranks_count_from_the_least() -> None:
    assert ranks(torch.tensor([[3.0, -1.0, 7.0], [0.5, 0.25, 0.75]])).tolist() == [
        [1, 0, 2],
        [1, 0, 2],
    ]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_rank_correlation_is_spearmans_over_what_is_scored(share: float) -> None:
    one = random(5, 40)
    other = one + 2 * random(5, 40, seed=1)
    one = with_gaps(one, share)
    expected = [
        spearmanr(a[a.isfinite()], b[a.isfinite()]).statistic
        for a, b in zip(one, other, strict=True)
    ]
    assert rank_correlation(one, other).item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_rank_correlation_of_nothing_scored_is_finite() -> None:
    nothing = torch.full((2, 6), -torch.inf)
    assert rank_correlation(nothing, random(2, 6)).item() == 0


@pytest.mark.parametrize("gaps", [0.0, 0.25])
@pytest.mark.parametrize("images", [8, 256])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_position_share_is_the_part_of_the_variance_that_was_put_in(
    share: float, images: int, gaps: float
) -> None:
    """However few the images are, and whatever level and scale each of them has."""
    found = []
    for seed in range(40):
        position = random(1, 64, seed=1000 + seed)
        position = (position - position.mean()) / position.std()
        noise = random(images, 64, seed=seed)
        maps = share**0.5 * position + (1 - share) ** 0.5 * noise
        levels, scales = random(images, 1, seed=500 + seed), 0.1 + random(images, 1).abs()
        found.append(position_share(with_gaps(levels + scales * maps, gaps)).item())
    assert np.mean(found) == pytest.approx(share, abs=0.04)


def test_one_image_and_flat_maps_give_finite_numbers() -> None:
    assert position_share(random(1, 9)).item() == 0
    assert position_share(torch.ones(4, 9)).isfinite()
    assert position_share(torch.full((4, 9), -torch.inf)).isfinite()
