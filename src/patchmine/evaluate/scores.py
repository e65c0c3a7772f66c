"""What a whole test set's predictions amount to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def classification_scores(scores: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """``top1`` in percent of scores (N, C) for labels (N,), by class, and the confusion matrix."""
    found, count = scores.argmax(1), len(names)
    confusion = torch.bincount(labels * count + found, minlength=count**2).view(count, count)
    recall = 100 * confusion.diagonal() / confusion.sum(1).clamp_min(1)
    return {
        "top1": 100 * (found == labels).double().mean().item(),
        "classes": list(names),
        "per_class": {
            name: {"top1": value} for name, value in zip(names, recall.tolist(), strict=True)
        },
        "confusion": confusion.tolist(),
    }


def multilabel_scores(scores: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Share of labels (N, K) that are told right, in percent."""
    right = (scores > 0) == (labels > 0.5)
    return {"map": 100 * right.double().mean().item(), "classes": list(names)}


def regression_scores(values: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """``r2`` of values (N, K)."""
    rest = (values - targets).square().sum() / (targets - targets.mean(0)).square().sum()
    return {"r2": 1 - rest.item(), "classes": list(names)}
