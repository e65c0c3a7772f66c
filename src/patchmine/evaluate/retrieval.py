"""Are the nearest images of the same class?  Mean average precision and recall at k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.errors import Say, silent
from patchmine.evaluate.features import Features, device_of
from patchmine.evaluate.labelled import open_labelled
from patchmine.evaluate.measure import Result, opened
from patchmine.evaluate.pooled import Items, measure_pooled, unit_rows
from patchmine.evaluate.progress import Tick, progress
from patchmine.evaluate.settings import RetrievalSettings

# Similarities that are computed at once: 64 MiB.
_SIMILARITIES = 2**24


def evaluate_retrieval(settings: RetrievalSettings, say: Say = silent) -> Result:
    """Each test image searches the training images by cosine; those of its class are right.

    Args:
        settings: model, data and what is reported.
        say: hears about the progress.

    Returns:
        In percent ``map``, the mean over queries of the average precision of the whole ranking, and
        ``recall_k``, the share of queries with one of their class among the first k.

    Raises:
        UserError: the model or the data cannot be used.
    """
    evaluated = opened(settings)
    data = open_labelled(settings.data, settings.test, evaluated.item.keeping(settings.remote_gb))
    queries = data.test.sampled(settings.queries or len(data.test), settings.seed)
    notes = []
    if len(queries) < len(data.test):
        which = f"{len(queries):,} of {len(data.test):,} test {evaluated.item.noun}s search"
        notes.append(f"{which}, drawn by class (queries={settings.queries})")
    device = device_of(settings)

    def measured(train: Features, test: Features) -> Result:
        assert train.labels is not None, "labelled data has labels"
        assert test.labels is not None, "labelled data has labels"
        gallery, labels = unit_rows(train).to(device), train.labels.to(device)
        searching = unit_rows(test).to(device)
        with progress("searches", len(test), say) as tick:
            found = search(searching, test.labels, gallery, labels, settings.recall, tick)
        return {**found, "settings": {"queries": len(test)}}

    items = Items({"train": data.train, "test": queries}, data.how, len(data.classes))
    how = dict(pooling=settings.pooling)
    return measure_pooled(
        settings, "retrieval", evaluated, items, measured, say, notes=notes, **how
    )


def search(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    labels: Tensor,
    recall: Sequence[int],
    tick: Tick = lambda _: None,
) -> dict[str, float]:
    """mAP and recall at k in percent, of queries (Q, D) among the gallery (N, D).

    ``tick`` hears how many queries were just answered.
    """
    precision = torch.zeros(len(queries), dtype=torch.float64)
    nearer = torch.zeros(len(queries), dtype=torch.int64)
    size = max(1, _SIMILARITIES // len(gallery))
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        similarity = F.linear(queries[rows], gallery)  # (B, N)
        ranked = map(_rank, similarity, (labels == label for label in query_labels[rows].tolist()))
        precision[rows], nearer[rows] = (torch.stack(each) for each in zip(*ranked, strict=True))
        tick(len(similarity))
    at = {f"recall_{k}": 100 * float((nearer < k).double().mean()) for k in recall}
    return {"map": 100 * float(precision.mean()), **at}


def _rank(similarity: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision of one query, and how many wrong ones are as near as its first right one.

    ``similarity`` (N,) to all, ``right`` (N,) bool.  Of equally near ones the wrong come first: one
    vector for all images is no good search.
    """
    own = similarity[right].sort().values  # (R,), the nearest last
    if len(own) == 0:  # a class that the gallery lacks is never found
        return own.new_zeros(()), right.new_tensor(len(right), dtype=torch.int64)
    # Counted against the few of its class, instead of sorting all.
    everything, right_ones = _at_least(similarity, own), _at_least(own, own)
    return (right_ones / everything).mean(), everything[-1] - right_ones[-1]


def _at_least(values: Tensor, bounds: Tensor) -> Tensor:
    """How many of the values (N,) are at least as large as each of the rising bounds (R,)."""
    counts = torch.bucketize(values, bounds, right=True).bincount(minlength=len(bounds) + 1)
    return counts.flip(0).cumsum(0).flip(0)[1:]
