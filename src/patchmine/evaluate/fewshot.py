"""A few labelled images of each class: kNN and logistic regression over several random draws."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.evaluate.features import Features, device_of
from patchmine.evaluate.heads import train_logistic
from patchmine.evaluate.labelled import open_labelled
from patchmine.evaluate.measure import Result, count_right, opened
from patchmine.evaluate.neighbours import knn_votes
from patchmine.evaluate.pooled import Items, measure_pooled
from patchmine.evaluate.settings import FewshotSettings


def evaluate_fewshot(settings: FewshotSettings, say: Say = silent) -> Result:
    """Top-1 of classifiers that see ``shots`` training images of each class, over several draws.

    Args:
        settings: model, data, shots and draws.
        say: hears about the progress.

    Returns:
        In percent ``knn_S_shot`` and ``logistic_S_shot``, the means over draws, the same with
        ``_std``, their standard deviations, and ``draws``, all accuracies.

    Raises:
        UserError: the model or the data cannot be used, or a class has fewer images than shots.
    """
    evaluated = opened(settings)
    data = open_labelled(settings.data, settings.test, evaluated.item.keeping(settings.remote_gb))
    assert data.train.labels is not None, "labelled data has labels"
    check = partial(_refuse_few, max(settings.shots), data.classes, evaluated.item.noun)
    check(torch.from_numpy(data.train.labels[data.train.indices]))  # before anything is read

    def measured(train: Features, test: Features) -> Result:
        assert train.labels is not None, "labelled data has labels"
        check(train.labels)  # broken images are not among them
        return learn_fewshot(settings, train, test, len(data.classes))

    parts = {"train": data.train, "test": data.test}
    items = Items(parts, data.how, len(data.classes))
    return measure_pooled(
        settings, "fewshot", evaluated, items, measured, say, pooling=settings.pooling
    )


def learn_fewshot(
    settings: FewshotSettings, train: Features, test: Features, num_classes: int
) -> Result:
    """Accuracies of both classifiers for every number of shots."""
    device = device_of(settings)
    assert train.labels is not None, "labelled data has labels"
    assert test.labels is not None, "labelled data has labels"
    # Logistic regression wants inputs of one scale.  It is that of all training images, of which
    # no label is looked at: that of one image a class would be chance.
    mean, std = train.x.mean(0), train.x.std(0, correction=0).clamp(min=1e-6)
    query = test.x.to(device)
    found: Result = {}
    draws: dict[str, list[float]] = {}
    for shots in settings.shots:
        for draw in range(settings.draws):
            rows = drawn(train.labels, shots, settings.seed + draw)
            x, labels = train.x[rows], train.labels[rows].to(device)
            k = min(settings.k, len(rows))
            bank = F.normalize(x, dim=1).to(device)
            votes = knn_votes(bank, labels, query, num_classes, [k], settings.temperature)[k]
            weight, bias = train_logistic(((x - mean) / std).to(device), labels, num_classes)
            # The scale goes into the weights: no scaled copy of the test features.
            weight = weight / std.to(device)[:, None]
            logits = query @ weight + (bias - mean.to(device) @ weight)
            for name, scores in {"knn": votes, "logistic": logits}.items():
                right = float(count_right(scores, test.labels)[0])
                draws.setdefault(f"{name}_{shots}_shot", []).append(100 * right / len(test))
    for name, accuracies in draws.items():
        found[name] = statistics.fmean(accuracies)
        if len(accuracies) > 1:
            found[f"{name}_std"] = statistics.stdev(accuracies)
    used = {"k": settings.k, "temperature": settings.temperature, "draws": settings.draws}
    return {**found, "draws": draws, "settings": used}


def drawn(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Places of ``shots`` random rows of each class, (shots * C,)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # class by class, shuffled within each
    counts = labels.bincount()
    first = counts.cumsum(0) - counts  # (C,)
    return order[(first[:, None] + torch.arange(shots)).flatten()]


def _refuse_few(shots: int, classes: Sequence[str], noun: str, labels: Tensor) -> None:
    """UserError for a class (labels (N,)) with fewer items than shots."""
    counts = labels.bincount(minlength=len(classes))
    least = int(counts.argmin())
    if counts[least] < shots:
        few = f"the class {shown_name(classes[least])} has only {int(counts[least])} training"
        remedy = "give more, or fewer shots"
        raise UserError(f"shots={shots}, but {few} {noun}s: {remedy}")
