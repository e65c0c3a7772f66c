"""The arithmetic of the nearest-neighbour classifier; it knows no files and no models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.evaluate.progress import Tick
from patchmine.evaluate.settings import TEMPERATURE

# 256 x 65,536 similarities are 64 MiB: large enough for the matrix product's full speed, small
# beside the features.
_QUERY_ROWS, _BANK_ROWS = 256, 65_536


def nearest(
    queries: Tensor,
    table: Tensor,
    k: int,
    *,
    exclude_self: bool = False,
    tick: Tick = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of a table that have the largest inner products with each query.

    The inner product is the cosine where rows have length one.  Memory beside what is given and
    returned is some hundred MB, whatever the number of queries and rows.

    Args:
        queries: (Q, D); the work is done where they lie.
        table: (N, D).
        k: how many; all where there are fewer.
        exclude_self: query i is row i of the table and no neighbour of itself.
        tick: hears how many queries were just answered.

    Returns:
        Inner products and places in the table, (Q, k) each, best first; of equal ones those with
        the smaller place.
    """
    k = min(k, len(table) - exclude_self)
    scores, places = queries.new_empty(len(queries), k), queries.new_empty(len(queries), k).long()
    for start in range(0, len(queries), _QUERY_ROWS):
        rows = slice(start, start + _QUERY_ROWS)
        score, place = nearest_rows(table, queries[rows], k + exclude_self)
        if exclude_self:
            own = torch.arange(start, start + len(place), device=place.device)[:, None]
            # Itself goes behind all others, where the last column is cut off.
            order = (place == own).sort(dim=1, stable=True).indices[:, :k]
            score, place = score.gather(1, order), place.gather(1, order)
        scores[rows], places[rows] = score, place
        tick(len(place))
    return scores, places


def nearest_rows(
    bank: Tensor, query: Tensor, k: int, *, bank_rows: int = _BANK_ROWS
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest inner products of each query (Q, D) with rows of the bank (N, D).

    Returns similarities and places, both (Q, k), best first; of equal ones those with the smaller
    place.  The bank is visited in slices of ``bank_rows``, so that memory stays bounded.
    """
    best = query.new_empty(len(query), 0)
    place = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(bank), bank_rows):
        similarity = F.linear(query, bank[start : start + bank_rows].to(query.device))  # (Q, rows)
        value, index = _first_largest(similarity, min(k, similarity.shape[1]))
        best, place = torch.cat([best, value], dim=1), torch.cat([place, index + start], dim=1)
        # Stable: equal ones stay in the order of the slices.
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, place = best[:, :k], place.gather(1, order[:, :k])
    return best, place


def _first_largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` of (Q, N) that takes the first of equal values, which torch does not promise."""
    value, index = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    # Rows in which one that was left out is equal to the last: any of the equal ones may be in.
    torn = (value[:, k - 1 : k] == value[:, k:]).any(1)
    value, index = value[:, :k], index[:, :k]
    if torn.any():
        whole = similarity[torn].sort(dim=1, descending=True, stable=True)
        value[torn], index[torn] = whole.values[:, :k], whole.indices[:, :k]
    index, order = index.sort(dim=1)
    value, by_value = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, by_value)


def class_votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Log of the summed votes exp(similarity / temperature) for each class: (Q, C) float64."""
    logits = similarity.double() / temperature
    # The largest is taken out class by class: the weights of a far class would else be zero beside
    # those of a near one.
    largest = logits.new_full((len(logits), num_classes), -torch.inf)
    largest.scatter_reduce_(1, labels, logits, "amax")
    weights = (logits - largest.gather(1, labels)).exp()
    return torch.zeros_like(largest).scatter_add_(1, labels, weights).log() + largest


def knn_votes(
    bank: Tensor,
    labels: Tensor,
    query: Tensor,
    num_classes: int,
    neighbours: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """`class_votes` (Q, C) of each k; rows of ``bank`` (N, D) have length one, of ``query`` any."""
    votes: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for start in range(0, len(query), _QUERY_ROWS):
        rows = F.normalize(query[start : start + _QUERY_ROWS].float(), dim=1)
        similarity, place = nearest_rows(bank, rows, min(max(neighbours), len(bank)))
        classes = labels[place]
        for k, parts in votes.items():
            parts.append(class_votes(similarity[:, :k], classes[:, :k], num_classes, temperature))
    return {k: torch.cat(parts) for k, parts in votes.items()}
