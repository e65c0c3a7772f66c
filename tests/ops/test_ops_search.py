"""What a search promises (docs/methods/scfs.md), against loops over crops, images and
positions.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.ops.search import cosine_attention

CROPS, IMAGES, CHANNELS, ROWS, COLUMNS = 3, 2, 5, 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def queries() -> Tensor:
    return normal(CROPS, IMAGES, CHANNELS, seed=1).abs()


@pytest.fixture
def maps() -> Tensor:
    return normal(IMAGES, CHANNELS, ROWS, COLUMNS).relu()


def test_each_query_meets_each_position_of_its_own_image(queries: Tensor, maps: Tensor) -> None:
    expected = torch.zeros(CROPS, IMAGES, ROWS, COLUMNS)
    for j in range(CROPS):
        for b in range(IMAGES):
            for y in range(ROWS):
                for x in range(COLUMNS):
                    expected[j, b, y, x] = F.cosine_similarity(
                        queries[j, b], maps[b, :, y, x], dim=0
                    )
    found = cosine_attention(queries, maps)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6


def test_parallel_is_one_and_nothing_is_nothing(queries: Tensor, maps: Tensor) -> None:
    maps[:, :, 1, 2] = 7 * queries[0]
    maps[:, :, 3, 3] = 0
    found = cosine_attention(queries, maps)
    torch.testing.assert_close(found[0, :, 1, 2], torch.ones(IMAGES))
    assert not found[:, :, 3, 3].any()
    assert not cosine_attention(0 * queries, maps).any()


def test_length_does_not_matter(queries: Tensor, maps: Tensor) -> None:
    found = cosine_attention(queries, maps)
    torch.testing.assert_close(cosine_attention(100 * queries, maps), found)
    torch.testing.assert_close(cosine_attention(queries, 0.01 * maps), found)


def test_positions_are_searched_each_by_itself(queries: Tensor, maps: Tensor) -> None:
    order = torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(2))
    shuffled = maps.flatten(2)[:, :, order].unflatten(2, (ROWS, COLUMNS))
    before, after = cosine_attention(queries, maps), cosine_attention(queries, shuffled)
    torch.testing.assert_close(after.flatten(2), before.flatten(2)[:, :, order])
    pooled = (before[:, :, None] * maps).mean((3, 4))
    torch.testing.assert_close((after[:, :, None] * shuffled).mean((3, 4)), pooled)


def test_what_points_away_is_not_looked_at(queries: Tensor, maps: Tensor) -> None:
    assert not cosine_attention(queries, -maps).any()


def test_float32_under_autocast(queries: Tensor, maps: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine_attention(queries, maps)
    assert torch.equal(found, cosine_attention(queries, maps))
    assert cosine_attention(queries, maps.bfloat16()).dtype == torch.float32
