"""Do clusters of frozen features agree with the classes?  k-means, NMI and ARI."""

from __future__ import annotations

import torch
from torch import Tensor

from patchmine.errors import Say, UserError, silent
from patchmine.evaluate.clusters import kmeans
from patchmine.evaluate.features import Features, device_of
from patchmine.evaluate.labelled import labelled_part
from patchmine.evaluate.measure import Result, opened
from patchmine.evaluate.pooled import Items, measure_pooled, unit_rows
from patchmine.evaluate.settings import ClusterSettings


def evaluate_cluster(settings: ClusterSettings, say: Say = silent) -> Result:
    """k-means on features of length one, compared with the classes; all of ``data`` is clustered.

    Args:
        settings: model, data and number of clusters.
        say: hears about the progress.

    Returns:
        ``nmi`` and ``ari``, 1 where clusters and classes are the same, about 0 by chance.

    Raises:
        UserError: the model or the data cannot be used, or there are fewer images than clusters.
    """
    evaluated = opened(settings)
    noun = evaluated.item.noun
    part, classes = labelled_part(settings.data, evaluated.item.keeping(settings.remote_gb))
    k = settings.clusters or len(classes)
    device = device_of(settings)

    def measured(features: Features) -> Result:
        if k > len(features):
            few = f"clusters={k}, but there are only {len(features):,} {noun}s that can be read"
            raise UserError(f"{few}: give more, or fewer clusters")
        assert features.labels is not None, "labelled data has labels"
        x = unit_rows(features).to(device)
        _, assignment = kmeans(x, k, seed=settings.seed, iterations=settings.iterations)
        found = agreement(assignment.cpu(), features.labels)
        return {**found, "settings": {"clusters": k, "iterations": settings.iterations}}

    how = f"all {len(part):,} {noun}s of data are clustered without their labels"
    items = Items({noun + "s": part}, how, len(classes))
    return measure_pooled(
        settings, "cluster", evaluated, items, measured, say, pooling=settings.pooling
    )


def agreement(clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """NMI (over the mean of both entropies) and ARI of two groupings (N,) of the same items."""
    width = int(labels.max()) + 1
    counts = (clusters * width + labels).bincount(minlength=(int(clusters.max()) + 1) * width)
    table = counts.view(-1, width).double()  # (clusters, classes)
    total = table.sum()
    mutual = _entropy(table.sum(1)) + _entropy(table.sum(0)) - _entropy(table.flatten())
    mean = (_entropy(table.sum(1)) + _entropy(table.sum(0))) / 2
    together, rows, columns = (_pairs(each) for each in (table, table.sum(1), table.sum(0)))
    by_chance, most = rows * columns / _pairs(total), (rows + columns) / 2
    same = torch.tensor(1.0)  # both put all items together, or each alone
    nmi = mutual / mean if mean > 0 else same
    ari = (together - by_chance) / (most - by_chance) if most != by_chance else same
    return {"nmi": float(nmi.clamp(0, 1)), "ari": float(ari)}


def _entropy(counts: Tensor) -> Tensor:
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log()).sum()


def _pairs(counts: Tensor) -> Tensor:
    """How many pairs of items lie in the same group."""
    return (counts * (counts - 1) / 2).sum()
