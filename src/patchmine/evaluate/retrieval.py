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
from patchmine.evaluate.settings import RetrievalSettings

# Similarities that are sorted at once: 64 MiB, and some 300 MiB with their places.
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
    data = open_labelled(settings.data, settings.test, evaluated.item)
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
        found = search(unit_rows(test).to(device), test.labels, gallery, labels, settings.recall)
        return {**found, "settings": {"queries": len(test)}}

    items = Items({"train": data.train, "test": queries}, data.how, len(data.classes))
    how = dict(pooling=settings.pooling)
    return measure_pooled(
        settings, "retrieval", evaluated, items, measured, say, notes=notes, **how
    )


def search(
    queries: Tensor, query_labels: Tensor, gallery: Tensor, labels: Tensor, recall: Sequence[int]
) -> dict[str, float]:
    """mAP and recall at k in percent, of queries (Q, D) among the gallery (N, D)."""
    # A class that the gallery lacks is never found: its precision counts as zero.
    precision, hits = 0.0, dict.fromkeys(recall, 0)
    place = torch.arange(1, len(gallery) + 1, device=gallery.device)  # (N,)
    size = max(1, _SIMILARITIES // len(gallery))
    for start in range(0, len(queries), size):
        similarity = F.linear(queries[start : start + size], gallery)  # (B, N)
        # Stable: of equally near ones the first in the list comes first.
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        truth = query_labels[start : start + size, None].to(gallery.device)
        right = labels[order] == truth  # (B, N)
        found = right.cumsum(1, dtype=torch.int32)
        average = (found / place * right).sum(1) / found[:, -1].clamp(min=1)
        precision += float(average.sum())
        for k in recall:
            hits[k] += int(right[:, :k].any(1).sum())
    at = {f"recall_{k}": 100 * count / len(queries) for k, count in hits.items()}
    return {"map": 100 * precision / len(queries), **at}
