"""k-means against what it promises: means, nearest centres, and the best of many slow runs."""

from __future__ import annotations

import pytest
import torch

from patchmine.evaluate import clusters
from patchmine.evaluate.clusters import kmeans


def spread_within(x, centres):
    """Sum of squared distances to the nearest centre, one by one in float64."""
    return float(torch.cdist(x.double(), centres.double()).square().min(1).values.sum())


def slow_lloyd(x, centres):
    """The textbook's two steps until nothing changes."""
    while True:
        nearest = torch.cdist(x, centres).argmin(1)
        means = torch.stack([x[nearest == number].mean(0) for number in range(len(centres))])
        if torch.equal(means, centres):
            return means
        centres = means


def blobs(count, groups, width, distance, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.arange(count) % groups
    centres = distance * torch.randn(groups, width, generator=g)
    return centres[truth] + torch.randn(count, width, generator=g), truth


def test_clusters_that_lie_apart_are_found():
    x, truth = blobs(900, 9, 16, distance=8)
    centres, assignment = kmeans(x, 9)
    pairs = set(zip(truth.tolist(), assignment.tolist(), strict=True))
    assert len(pairs) == 9
    wanted = torch.stack([x[assignment == number].mean(0) for number in range(9)])
    torch.testing.assert_close(centres, wanted)


def test_rows_belong_to_the_nearest_centre_and_centres_are_means(monkeypatch):
    monkeypatch.setattr(clusters, "_DISTANCES", 7 * 100)  # slices of 100 rows
    x, _ = blobs(1_050, 3, 8, distance=1)
    centres, assignment = kmeans(x, 7, iterations=500)
    assert torch.equal(assignment, torch.cdist(x, centres).argmin(1))
    wanted = torch.stack([x[assignment == number].mean(0) for number in range(7)])
    torch.testing.assert_close(centres, wanted)


def test_it_is_about_as_good_as_the_best_of_ten_slow_runs():
    x, _ = blobs(600, 20, 8, distance=1.5)
    g = torch.Generator().manual_seed(0)
    slow = [slow_lloyd(x, x[torch.randperm(600, generator=g)[:20]]) for _ in range(10)]
    best = min(spread_within(x, centres) for centres in slow)
    assert spread_within(x, kmeans(x, 20)[0]) < 1.02 * best


def test_a_large_common_direction_does_not_round_the_differences_away():
    x, truth = blobs(200, 2, 4, distance=5)
    shifted = x + torch.tensor([3e4, 0, 0, 0])
    _, assignment = kmeans(shifted, 2)
    assert len(set(zip(truth.tolist(), assignment.tolist(), strict=True))) == 2


def test_the_seed_decides_and_the_rows_stay_as_they_are():
    x, _ = blobs(300, 6, 4, distance=1)
    before = x.clone()
    first, again, other = kmeans(x, 6), kmeans(x, 6), kmeans(x, 6, seed=1)
    assert torch.equal(x, before)
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_more_clusters_than_different_rows(k):
    x = torch.eye(3).repeat(4, 1)
    centres, assignment = kmeans(x, k)
    assert centres.isfinite().all()
    assert len(assignment.unique()) == min(k, 3)
