"""How many items lie among each other: neighbours, clusters, outliers, near-duplicates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.errors import Say, silent
from patchmine.evaluate.clusters import kmeans
from patchmine.evaluate.neighbours import nearest
from patchmine.evaluate.progress import progress

# Near-duplicates are so much nearer to each other than items usually are to their last neighbour
# among this share of all: of a handful the last of ten is no neighbour.  See docs/explore.md.
_DUPLICATE_SHARE, _NEIGHBOURHOOD = 0.1, 0.05
_ROUNDING = 2e-6  # smaller distances are none
_MOST_CLUSTERS = 50  # that are chosen where the user chose none: a page still shows them
_ROWS = 65_536


@dataclass(frozen=True)
class Structure:
    """What is known of N items from the cosines of their features, on the CPU.

    ``neighbours`` (N, k) are places, nearest first, and ``similarity`` (N, k) their cosines.
    ``cluster`` (N,) counts from 0, the largest first; ``centrality`` (N,) is the cosine with its
    centre.  ``outlier`` (N,): mean distance 1 - cosine to the neighbours, as a multiple of what is
    usual (the median).  ``group`` (N,) of near-duplicates, whose cosine is ``threshold`` or more,
    counts from 0, the largest first; -1: none.
    """

    neighbours: Tensor
    similarity: Tensor
    cluster: Tensor
    centrality: Tensor
    outlier: Tensor
    group: Tensor
    threshold: float

    def members(self, numbers: Tensor, order: Tensor) -> list[Tensor]:
        """The places of each cluster or group of ``numbers`` (N,), in rising ``order`` (N,)."""
        places = order.argsort(stable=True)
        places = places[numbers[places].argsort(stable=True)]
        counts = numbers[numbers >= 0].bincount().tolist()
        return list(torch.split(places[len(places) - sum(counts) :], counts))


def structure_of(
    x: Tensor,
    *,
    neighbours: int,
    clusters: int | None = None,
    threshold: float | None = None,
    seed: int = 0,
    say: Say = silent,
) -> Structure:
    """Neighbours, clusters, outliers and near-duplicates of items.

    Memory beside ``x`` is some hundred MB and 12 bytes for each neighbour of each item.

    Args:
        x: (N, D) float32, rows of length one, at least two; the work is done where they lie.
        neighbours: how many of each item are found; all others where there are fewer.
        clusters: how many; None: the root of half the items, at most 50.
        threshold: cosine from which two neighbours are near-duplicates; None: a tenth of the usual
            distance (the median) to the last neighbour, in small sets to an earlier one.
        seed: decides the start of k-means.
        say: hears about the progress.
    """
    count = len(x)
    with progress("neighbours", count, say) as tick:
        similarity, places = nearest(x, x, neighbours, exclude_self=True, tick=tick)
    similarity, places = similarity.cpu(), places.cpu()
    if threshold is None:
        last = min(similarity.shape[1], math.ceil(_NEIGHBOURHOOD * count)) - 1
        usual = float(1 - similarity[:, last].median())
        threshold = 1 - max(_DUPLICATE_SHARE * usual, _ROUNDING)
    distance = (1 - similarity).mean(1).clamp(min=0)
    if clusters is None:
        clusters = max(1, min(_MOST_CLUSTERS, round(math.sqrt(count / 2))))
    centres, assignment = kmeans(x, clusters, seed=seed)
    return Structure(
        neighbours=places,
        similarity=similarity,
        cluster=by_size(assignment.cpu()),
        centrality=_cosines(x, centres, assignment).cpu(),
        outlier=distance / distance.median().clamp(min=_ROUNDING),
        group=_groups(places, similarity >= threshold),
        threshold=threshold,
    )


def _cosines(x: Tensor, centres: Tensor, assignment: Tensor) -> Tensor:
    """(N,): of each row with its own centre."""
    centres = F.normalize(centres, dim=1)
    parts = zip(torch.split(x, _ROWS), torch.split(assignment, _ROWS), strict=True)
    return torch.cat([(rows * centres[own]).sum(1) for rows, own in parts])


def _groups(neighbours: Tensor, near: Tensor) -> Tensor:
    """(N,): the number of the group of items that chains of near neighbours join; -1: alone."""
    first, column = near.nonzero(as_tuple=True)
    name = connected(first, neighbours[first, column], len(neighbours))
    alone = name.bincount(minlength=len(name))[name] == 1
    group = torch.full_like(name, -1)
    group[~alone] = by_size(name[~alone])
    return group


def connected(first: Tensor, second: Tensor, count: int) -> Tensor:
    """The smallest place that each of ``count`` places is joined with, by pairs (P,): (count,)."""
    name = torch.arange(count)
    while True:
        least = name.scatter_reduce(0, first, name[second], "amin")
        least = least.scatter_reduce(0, second, name[first], "amin")
        least = least[least]  # the name's own name: chains are walked in steps that double
        if torch.equal(least, name):
            return name
        name = least


def by_size(numbers: Tensor) -> Tensor:
    """The same division (N,), numbered from 0 by falling size."""
    _, place, counts = torch.unique(numbers, return_inverse=True, return_counts=True)
    rank = torch.empty_like(counts)
    rank[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
    return rank[place]
