"""The arithmetic of the nearest-neighbour classifier: tensors in, percent out.  It knows no files
and no models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.evaluate.settings import NEIGHBOURS, TEMPERATURE

Accuracy = dict[str, float]
"""``{"top1": percent, "top5": percent}``."""

# 256 x 65,536 similarities are 64 MiB: large enough for the matrix product's full speed, small
# beside the features.
_QUERY_ROWS, _BANK_ROWS = 256, 65_536


def nearest(
    bank: Tensor, query: Tensor, k: int, *, bank_rows: int = _BANK_ROWS
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest inner products of each query (Q, D) with the bank (N, D): similarities and
    places, both (Q, k), best first; of equal ones those with the smaller place.

    The bank is visited in slices of ``bank_rows``, so memory stays bounded however large it is.
    """
    best = query.new_empty(len(query), 0)
    place = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(bank), bank_rows):
        similarity = F.linear(query, bank[start : start + bank_rows].to(query.device))  # (Q, rows)
        value, index = _first_largest(similarity, min(k, similarity.shape[1]))
        best, place = torch.cat([best, value], dim=1), torch.cat([place, index + start], dim=1)
        best, order = best.sort(
            dim=1, descending=True, stable=True
        )  # equal ones stay in the order of the slices
        best, place = best[:, :k], place.gather(1, order[:, :k])
    return best, place


def _first_largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` of (Q, N), which among equal values takes any, with the first of them in the order
    of their places.
    """
    value, index = similarity.topk(k, dim=1)
    least = value[:, -1:]
    torn = (similarity == least).sum(1) > (value == least).sum(
        1
    )  # of values equal to the last some were left out
    if torn.any():
        whole = similarity[torn].sort(dim=1, descending=True, stable=True)
        value[torn], index[torn] = whole.values[:, :k], whole.indices[:, :k]
    index, order = index.sort(dim=1)
    value, by_value = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, by_value)


def class_votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """The vote of each query's neighbours, as logarithms, at any temperature.

    Args:
        similarity: cosines (Q, K) of the neighbours.
        labels: their classes (Q, K) int64.
        num_classes: C.
        temperature: a neighbour with cosine s votes with exp(s / temperature).

    Returns:
        (Q, C) float64, the logarithm of each class's summed weights; minus infinity where none
        voted for it.
    """
    logits = similarity.double() / temperature
    # The largest is taken out class by class: the weights of a far class would else be zero beside
    # those of a near one.
    largest = logits.new_full((len(logits), num_classes), -torch.inf).scatter_reduce_(
        1, labels, logits, "amax"
    )
    weights = (logits - largest.gather(1, labels)).exp()
    return torch.zeros_like(largest).scatter_add_(1, labels, weights).log() + largest


def vote_shares(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """(Q, C) float32, rows that sum to one: each class's share of the vote of `knn_accuracy`.

    ``bank`` (N, D) has rows of length one already, so that it may serve many small ``query`` (Q,
    D), of any length. Shares of several clips of a video may be averaged, as probabilities are.
    """
    parts = []
    for start in range(0, len(query), _QUERY_ROWS):
        rows = query[start : start + _QUERY_ROWS]
        similarity, place = nearest(bank, F.normalize(rows.float(), dim=1), min(k, len(bank)))
        parts.append(
            class_votes(similarity, bank_labels[place], num_classes, temperature)
            .softmax(dim=1)
            .float()
        )
    return torch.cat(parts)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> dict[int, Accuracy]:
    """Accuracy of the weighted vote of the k nearest bank rows, for every k (at most the bank's
    size) at once.

    ``bank`` (N, D) and ``query`` (Q, D) are normalised to length one here; a neighbour with cosine
    s votes with exp(s / temperature) (DINO, ``eval_knn.py``).  A query label outside
    ``range(num_classes)`` counts as wrong.  Ties go to the class with the smaller number.
    """
    ks = sorted({min(k, len(bank)) for k in neighbours})
    bank = F.normalize(bank.float(), dim=1)
    bank_labels = bank_labels.to(device)
    hits = torch.zeros(len(ks), 2, dtype=torch.int64, device=device)  # (k, top-1 and top-5)
    for start in range(0, len(query), _QUERY_ROWS):
        rows = slice(start, start + _QUERY_ROWS)
        similarity, place = nearest(
            bank, F.normalize(query[rows].float(), dim=1).to(device), ks[-1]
        )
        label, truth = bank_labels[place], query_labels[rows, None].to(device)
        for row, k in enumerate(ks):
            votes = class_votes(similarity[:, :k], label[:, :k], num_classes, temperature)
            right = votes.sort(dim=1, descending=True, stable=True).indices[:, :5] == truth
            hits[row] += torch.stack([right[:, 0].sum(), right.any(dim=1).sum()])
    share = 100 / len(query)
    return {
        k: {"top1": share * top1, "top5": share * top5}
        for k, (top1, top5) in zip(ks, hits.tolist(), strict=True)
    }
