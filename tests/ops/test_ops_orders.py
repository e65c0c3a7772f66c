"""Orders of patches: counts, equal levels, strictness; who may look at whom."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from patchmine.methods.settings.semaim import Order
from patchmine.ops.orders import (
    BY_CONTENT,
    IN_GROUPS,
    patch_levels,
    squared_distances,
    take,
    token_similarity,
    visibility,
    visiting_order,
)

SIZE = (4, 6)
L = SIZE[0] * SIZE[1]
CPU = torch.device("cpu")


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def grid(values: Tensor, size: tuple[int, int] = SIZE) -> list[list[int]]:
    return values.reshape(size).tolist()


@pytest.mark.parametrize("order", get_args(Order))
def test_an_order_is_a_permutation_and_levels_never_fall(order: Order) -> None:
    levels = patch_levels(order, SIZE, uniform(5, L, seed=1), CPU)
    assert levels.shape == (5 if order in BY_CONTENT else 1, L)
    visited = visiting_order(order, levels, uniform(5, L))
    assert torch.equal(visited.sort(dim=1).values, torch.arange(L).expand(5, -1))
    assert (levels.expand(5, -1).gather(1, visited).diff(dim=1) >= 0).all()
    assert torch.equal(visited, visiting_order(order, levels, uniform(5, L)))
    other = visiting_order(order, levels, uniform(5, L, seed=2))
    assert torch.equal(visited, other) == (order in ("similarity", "rowmajor", "serpentine"))
    assert (len(levels[0].unique()) < L) == (order in (*IN_GROUPS, "stochastic"))


def test_row_by_row() -> None:
    assert grid(patch_levels("rowmajor", (2, 3), None, CPU), (2, 3)) == [[0, 1, 2], [3, 4, 5]]
    assert grid(patch_levels("serpentine", (3, 3), None, CPU), (3, 3)) == [
        [0, 1, 2],
        [5, 4, 3],
        [6, 7, 8],
    ]


def test_boxes_about_the_middle() -> None:
    """Half-widths 1, 3 and 5, as [7 - k, 7 + k) on the published grid of 14 x 14."""
    boxes = patch_levels("out2center", (14, 14), None, CPU)
    expected = torch.zeros(14, 14, dtype=torch.int64)
    for half in (1, 3, 5):
        expected[7 - half : 7 + half, 7 - half : 7 + half] += 1
    assert torch.equal(boxes, expected.flatten()[None])
    assert torch.equal(patch_levels("center2out", (14, 14), None, CPU), -boxes)
    for size in (SIZE, (7, 7), (3, 8)):  # in the middle of any grid
        boxes = patch_levels("out2center", size, None, CPU).reshape(size)
        assert torch.equal(boxes, boxes.flip(0, 1))


def test_rings_about_the_most_similar_patch() -> None:
    similarity = uniform(3, L, seed=3)
    levels = patch_levels("attention_center", SIZE, similarity, CPU)
    centre = similarity.argmax(dim=1)
    for image in range(3):
        for patch in range(L):
            down, across = centre[image] // 6 - patch // 6, centre[image] % 6 - patch % 6
            assert levels[image, patch] == down**2 + across**2
    # Any map with the same highest place gives the same rings.
    assert torch.equal(levels, patch_levels("attention_center", SIZE, similarity**3, CPU))


def test_a_mirrored_map_gives_mirrored_rings() -> None:
    similarity, noise = uniform(4, *SIZE, seed=1), uniform(4, *SIZE)
    levels, mirrored = (
        patch_levels("attention_center", SIZE, s.flatten(1), CPU).reshape(4, *SIZE)
        for s in (similarity, similarity.flip(2))
    )
    assert torch.equal(levels.flip(2), mirrored)
    visited, other = (
        visiting_order("attention_center", level.flatten(1), n.flatten(1))
        for level, n in ((levels, noise), (mirrored, noise.flip(2)))
    )
    assert torch.equal(visited // 6 * 6 + 5 - visited % 6, other)


def test_neighbouring_noise_far_from_the_centre_is_told_apart() -> None:
    """float64 keeps every bit of the noise beside the greatest distance; float32 would not."""
    levels = squared_distances(torch.tensor([0]), (14, 14))
    twins = [5 * 14 + 13, 13 * 14 + 5]  # equally far from the corner
    assert levels[0, twins[0]] == levels[0, twins[1]] == 13**2 + 5**2
    for first in (0, 1):
        noise = torch.full((1, 196), 0.5)
        noise[0, twins[1 - first]] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
        visited = visiting_order("attention_center", levels, noise)[0].tolist()
        assert visited.index(twins[first]) < visited.index(twins[1 - first])


def test_close_similarities_keep_their_order() -> None:
    similarity = 0.995 + torch.arange(L)[None] * 1e-7
    visited = visiting_order(
        "similarity", patch_levels("similarity", SIZE, similarity, CPU), uniform(1, L)
    )
    assert (similarity.gather(1, visited).diff(dim=1) <= 0).all()


def test_counts_of_who_looks_at_whom() -> None:
    score = uniform(2, L)
    content, query = visibility(score)
    rank = score.argsort(dim=1).argsort(dim=1)
    assert torch.equal(content[:, 1:].sum(dim=2), rank + 2)
    assert torch.equal(query.sum(dim=2), rank + 1)
    assert torch.equal(content[:, 0].sum(dim=1), torch.ones(2, dtype=torch.int64))
    assert content[:, :, 0].all()
    assert query[:, :, 0].all()
    difference = content[:, 1:, 1:].long() - query[:, :, 1:].long()
    assert torch.equal(difference, torch.eye(L, dtype=torch.int64).expand(2, -1, -1))


def test_equal_scores_see_each_other_as_content_only() -> None:
    content, query = visibility(torch.tensor([[1, 0, 1]]))
    assert content[0].tolist() == [
        [True, False, False, False],
        [True, True, True, True],
        [True, False, True, False],
        [True, True, True, True],
    ]
    assert query[0].tolist() == [
        [True, False, True, False],
        [True, False, False, False],
        [True, False, True, False],
    ]


def test_sorted_strict_scores_are_the_lower_triangle() -> None:
    content, query = visibility(torch.arange(L)[None])
    lower = torch.ones(L, L, dtype=torch.bool).tril()
    assert torch.equal(content[0, :L, :L], lower)
    assert torch.equal(query[0, :, :L], lower)


def test_similarity_is_a_cosine_in_float32() -> None:
    anchor, tokens = torch.randn(2, 8), torch.randn(2, 5, 8)
    expected = torch.nn.functional.cosine_similarity(anchor[:, None], tokens, dim=2)
    torch.testing.assert_close(token_similarity(anchor, tokens), expected)
    assert token_similarity(anchor.bfloat16(), tokens.bfloat16()).dtype == torch.float32
    assert torch.equal(token_similarity(torch.zeros(2, 8), tokens), torch.zeros(2, 5))


def test_take() -> None:
    values, index = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(take(values, index), torch.stack([values[0, [4, 0]], values[1, [1, 1]]]))
