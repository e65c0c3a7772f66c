"""What the predictions of a whole test set amount to; shares are in percent.

A number that is not defined is None: the recall of a class without an image, for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.errors import UserError
from patchmine.evaluate.paired import accuracy_interval

MOST_IN_MATRIX = 200  # classes; of more, the matrix would be larger than a report reads
_MOST_PAIRS = 20


def classification_scores(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """How well classes are told.

    Args:
        logits: (N, C); of equal ones the class with the smaller number counts more.
        labels: (N,) int64.
        names: of the C classes.

    Returns:
        ``top1``, ``top1_interval`` (the ends of its 95 % interval), with more than five classes
        ``top5``, ``balanced`` (the mean recall of the classes that are there) and ``loss``
        (cross-entropy); ``classes``; ``per_class``: ``top1`` (recall), ``precision`` and ``count``
        by name; ``confused``: the pairs of classes that are mixed up most; ``confusion``: rows are
        true classes, columns predicted ones (None where there are more than 200 classes).  An item
        with a logit of NaN is wrong, and in no column.
    """
    order = logits.sort(dim=1, descending=True, stable=True).indices  # (N, C)
    told = ~logits.isnan().any(1)
    count, right = len(names), (order == labels[:, None]) & told[:, None]
    pairs = labels[told] * count + order[told, 0]
    confusion = torch.bincount(pairs, minlength=count**2).view(count, count)
    hits, sizes = confusion.diagonal(), torch.bincount(labels, minlength=count)
    recall, precision = _percent(hits, sizes), _percent(hits, confusion.sum(0))
    loss = F.cross_entropy(logits.double(), labels)
    top1 = _mean_percent(right[:, 0])
    result: dict[str, Any] = {"top1": top1, "top1_interval": accuracy_interval(top1, len(labels))}
    if count > 5:
        result["top5"] = _mean_percent(right[:, :5].any(1))
    return result | {
        "balanced": _mean(recall),
        "loss": loss.item() if loss.isfinite() else None,
        "classes": list(names),
        "per_class": {
            name: {"top1": recall[i], "precision": precision[i], "count": int(sizes[i])}
            for i, name in enumerate(names)
        },
        "confused": _confused(confusion, names),
        "confusion": confusion.tolist() if count <= MOST_IN_MATRIX else None,
    }


def multilabel_scores(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """How well labels are told of which an item has any number.

    Args:
        logits: (N, K); NaN counts as the lowest.
        labels: (N, K), 0 or 1.
        names: of the K labels.

    Returns:
        ``map``, the mean over labels of the average precision, without interpolation;
        ``micro_f1`` and ``macro_f1`` of the labels with a probability above one half; ``classes``;
        ``per_class``: ``ap``, ``f1`` and ``count`` by name.
    """
    logits, has = logits.nan_to_num(nan=-torch.inf), labels > 0.5
    told = logits > 0
    hits, wrong = (told & has).sum(0), (told != has).sum(0)
    f1 = _percent(2 * hits, 2 * hits + wrong)
    ap = [_average_precision(logits[:, k], has[:, k]) for k in range(len(names))]
    return {
        "map": _mean(ap),
        "micro_f1": _mean(_percent(2 * hits.sum()[None], (2 * hits + wrong).sum()[None])),
        "macro_f1": _mean(f1),
        "classes": list(names),
        "per_class": {
            name: {"ap": ap[k], "f1": f1[k], "count": int(has[:, k].sum())}
            for k, name in enumerate(names)
        },
    }


def regression_scores(values: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """How well numbers are told.

    Args:
        values: (N, K).
        targets: (N, K).
        names: of the K columns.

    Returns:
        ``r2``, ``mae`` and ``rmse``, means over columns, in the columns' own units; ``classes``:
        the names; ``per_class``: the same three by name.  Where all targets of a column are equal,
        its ``r2`` is 1 if they are met and else 0.

    Raises:
        UserError: a value is not finite.
    """
    if bad := int((~values.isfinite()).any(1).sum()):
        raise UserError(
            f"the network gives no finite number for {bad:,} of {len(values):,} items: its "
            "training diverged; start again with a smaller blr"
        )
    error = values.double() - targets.double()
    rest = error.square().sum(0)
    spread = (targets.double() - targets.double().mean(0)).square().sum(0)
    r2 = torch.where(spread > 0, 1 - rest / spread, (rest == 0).double())
    columns = {"r2": r2, "mae": error.abs().mean(0), "rmse": error.square().mean(0).sqrt()}
    return {
        **{key: each.mean().item() for key, each in columns.items()},
        "classes": list(names),
        "per_class": {
            name: {key: each[k].item() for key, each in columns.items()}
            for k, name in enumerate(names)
        },
    }


def _average_precision(scores: Tensor, has: Tensor) -> float | None:
    """Percent: precision at each score, weighed by the recall that it adds; None without any."""
    scores, order = scores.sort(descending=True)
    hits = has[order].double().cumsum(0)
    if not len(scores) or hits[-1] == 0:
        return None
    # Items of one score are found together: only the last of them counts.
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    found = hits[last]
    precision = found / (last.nonzero()[:, 0] + 1)
    gained = torch.diff(found, prepend=found.new_zeros(1))
    return 100 * ((gained * precision).sum() / hits[-1]).item()


def _confused(confusion: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    most = wrong.sort(descending=True, stable=True).indices[:_MOST_PAIRS]
    return [
        {"true": names[place // len(names)], "predicted": names[place % len(names)], "count": count}
        for place, count in zip(most.tolist(), wrong[most].tolist(), strict=True)
        if count
    ]


def _percent(part: Tensor, whole: Tensor) -> list[float | None]:
    pairs = zip(part.tolist(), whole.tolist(), strict=True)
    return [100 * hits / size if size else None for hits, size in pairs]


def _mean_percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def _mean(values: Sequence[float | None]) -> float:
    """Of those that are defined; 0 without any."""
    known = [value for value in values if value is not None]
    return sum(known) / max(1, len(known))
