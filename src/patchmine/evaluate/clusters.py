"""k-means of many rows in bounded memory; it knows no files and no models."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Distances that are held at once: 64 MiB, large enough for the matrix product's full speed.
_DISTANCES = 2**24
_SAMPLE, _SAMPLE_OF_A_CLUSTER = 16_384, 16  # rows that the start is chosen among


def kmeans(x: Tensor, k: int, *, seed: int = 0, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """k-means by Lloyd's algorithm, from a greedy k-means++ start on a sample.

    Distances are Euclidean; give rows of length one to cluster by cosine.  Memory beside ``x``
    is some hundred MB, whatever the number of rows.

    Args:
        x: (N, D) float32, only read; the work is done where it lies.
        k: clusters, at most N.
        seed: decides the start, and so the result.
        iterations: at most so many; fewer where nothing changes any more.

    Returns:
        Centres (k, D) and the nearest centre of each row, (N,) int64.
    """
    assert 1 <= k <= len(x), "no more clusters than rows"
    generator = torch.Generator().manual_seed(seed)
    # Relative to the mean of all rows: features often share one large direction, in whose square
    # the differences between them would be rounded away.
    mean = x.mean(0)
    size = min(len(x), max(_SAMPLE, _SAMPLE_OF_A_CLUSTER * k))
    sample = torch.randperm(len(x), generator=generator)[:size].to(x.device)
    centres = _far_apart((x[sample] - mean).cpu(), k, generator).to(x.device)
    assignment, distance = _assign(x, mean, centres)
    for _ in range(iterations):
        centres = _means(x, mean, assignment, centres)
        empty = assignment.bincount(minlength=k) == 0
        if empty.any():  # these start anew where the present centres fit worst
            centres[empty] = x[distance.topk(int(empty.sum())).indices] - mean
        before = assignment
        assignment, distance = _assign(x, mean, centres)
        if torch.equal(assignment, before):
            break
    return centres + mean, assignment


def _slices(x: Tensor, mean: Tensor, k: int) -> Iterator[tuple[slice, Tensor]]:
    """All rows, relative to the mean, some at a time, so that (rows, k) stays small."""
    size = max(1, min(16_384, _DISTANCES // k))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield rows, x[rows] - mean


def _assign(x: Tensor, mean: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, (N,), and its squared distance, (N,)."""
    assignment = torch.empty(len(x), dtype=torch.int64, device=x.device)
    distance = torch.empty(len(x), device=x.device)
    for rows, part in _slices(x, mean, len(centres)):
        distance[rows], assignment[rows] = _squared_distances(part, centres).min(dim=1)
    return assignment, distance


def _means(x: Tensor, mean: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """(k, D): the mean of the rows of each cluster; the present centre where there are none."""
    sums = torch.zeros_like(centres, dtype=torch.float64)
    for rows, part in _slices(x, mean, len(centres)):
        sums.index_add_(0, assignment[rows], part.double())
    counts = assignment.bincount(minlength=len(centres))[:, None]  # (k, 1)
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).to(centres.dtype), centres)


def _squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    """(N, k), at least 0."""
    squares = x.square().sum(1, keepdim=True) + centres.square().sum(1)
    return torch.addmm(squares, x, centres.T, alpha=-2).clamp_(min=0)


def _far_apart(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """(k, D): greedy k-means++, of a few rows drawn by squared distance always the best one."""
    trials = 2 + int(math.log(k))  # as scikit-learn and the authors of k-means++ do
    chosen = torch.randint(len(rows), (1,), generator=generator)
    distance = _squared_distances(rows, rows[chosen])[:, 0]  # to the nearest one so far
    for _ in range(1, k):
        weights = distance if bool(distance.any()) else torch.ones_like(distance)
        drawn = weights.multinomial(trials, replacement=True, generator=generator)
        left = torch.minimum(_squared_distances(rows, rows[drawn]), distance[:, None])  # (n, L)
        best = left.sum(0).argmin()
        chosen, distance = torch.cat([chosen, drawn[best, None]]), left[:, best]
    return rows[chosen]
