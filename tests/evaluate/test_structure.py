"""Neighbours, clusters, outliers and near-duplicates against the slow and obvious way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from patchmine.evaluate.structure import by_size, connected, structure_of


def spread(count: int, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def test_an_outlier_is_measured_by_what_is_usual() -> None:
    x = F.normalize(spread(60) * 0.1 + torch.eye(24)[0], dim=1)
    x[17] = -torch.eye(24)[0]
    found = structure_of(x, neighbours=5)
    cosines = x @ x.T
    cosines.fill_diagonal_(-2)
    distance = 1 - cosines.topk(5).values.mean(1)
    torch.testing.assert_close(found.outlier, distance / distance.median(), rtol=1e-4, atol=1e-4)
    assert int(found.outlier.argmax()) == 17
    torch.testing.assert_close(found.similarity, cosines.topk(5).values)
    assert int(found.neighbours[3, 0]) == int(cosines[3].argmax())


def test_copies_are_found_whatever_the_spread_of_the_features() -> None:
    for width in (1.0, 0.05):  # in a narrow cone every cosine is near 1
        x = F.normalize(spread(80) * width + torch.eye(24)[0], dim=1)
        x[[5, 30, 70]] = F.normalize(x[5] + 1e-3 * width * spread(3, seed=1), dim=1)
        x[41] = x[40]
        found = structure_of(x, neighbours=8)
        assert (found.group >= 0).nonzero()[:, 0].tolist() == [5, 30, 40, 41, 70]
        assert found.group[[5, 30, 70, 40, 41]].tolist() == [0, 0, 0, 1, 1]


def test_a_cosine_that_is_given_joins_neighbours() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.1, 2.0])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = structure_of(x, neighbours=2, clusters=1, threshold=0.99)
    assert found.group.tolist() == [0, 0, 0, 1, 1, -1]
    assert found.threshold == 0.99
    assert [rows.tolist() for rows in found.members(found.group, -angles)] == [[2, 1, 0], [4, 3]]


def test_of_a_handful_the_last_neighbour_is_none() -> None:
    x = F.normalize(torch.eye(24)[0] + 0.3 * spread(5), dim=1)
    x[4] = -torch.eye(24)[0]  # as far from all as can be
    assert set(structure_of(x, neighbours=10).group.tolist()) == {-1}


def test_items_that_are_all_alike_are_one_group_and_no_outliers() -> None:
    found = structure_of(spread(1).expand(6, -1).contiguous(), neighbours=3)
    assert found.group.tolist() == [0] * 6
    assert float(found.outlier.max()) < 1.5


def test_clusters_are_numbered_by_size_and_have_their_typical_members() -> None:
    sizes = (4, 20, 9)
    x = torch.cat([torch.eye(24)[i] + 0.02 * spread(n, seed=i) for i, n in enumerate(sizes)])
    found = structure_of(F.normalize(x, dim=1), neighbours=3, clusters=3)
    assert found.cluster.bincount().tolist() == [20, 9, 4]
    typical = found.members(found.cluster, -found.centrality)
    assert [len(rows) for rows in typical] == [20, 9, 4]
    for rows in typical:
        assert found.centrality[rows].diff().max() <= 0


@given(pairs=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=25))
def test_chains_of_pairs_join_what_a_walk_joins(pairs: list[tuple[int, int]]) -> None:
    first, second = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))
    name = list(range(15))
    for _ in range(15):
        for a, b in pairs:
            name[a] = name[b] = min(name[a], name[b])
    assert connected(first, second, 15).tolist() == name


def test_numbers_go_by_size_and_among_equals_by_number() -> None:
    assert by_size(torch.tensor([7, 7, 2, 9, 9, 9, 4])).tolist() == [1, 1, 2, 0, 0, 0, 3]
