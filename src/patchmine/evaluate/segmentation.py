"""What the label maps of a whole data set amount to: pixels counted by class, shares in percent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 22  # pixels that are counted at a time
BAND = 0.02  # width of a boundary, as a share of the image's diagonal


class Confusion:
    """How many pixels of each true class (rows) were predicted as which (columns).

    ``counts`` (K, K) int64 stay on the device, and nothing waits for it; sums over processes are
    sums of ``counts``.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, labels: Tensor, ignore_index: int) -> None:
        """Count the pixels of (B, H, W) predicted and true classes, without the ignored ones."""
        classes = len(self.counts)
        pairs = labels.int() * classes + predicted.int()
        self.counts += _count(pairs, labels != ignore_index, classes**2).view_as(self.counts)

    def merge(self, other: Confusion) -> None:
        """Add what another one counted."""
        self.counts += other.counts.to(self.counts.device)


class Boundaries:
    """Pixels near the boundaries of each class: of both maps, and of either (Boundary IoU).

    Cheng et al., CVPR 2021, arXiv 2103.16562: a mask's band is the mask without its erosion by 2 %
    of the image's diagonal; the border of an image bounds its masks.  ``counts`` (3, K) int64:
    pixels in the bands of both, of the predictions, of the labels.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(3, classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, labels: Tensor, ignore_index: int) -> None:
        """Count the bands of (B, H, W) classes; an ignored pixel belongs to no class in either."""
        classes = self.counts.shape[1]
        known = labels != ignore_index
        told, true = (x.int().masked_fill(~known, classes) for x in (predicted, labels))
        height, width = labels.shape[-2:]
        reach = max(1, round(BAND * (height**2 + width**2) ** 0.5))
        in_told, in_true = _band(told, reach) & known, _band(true, reach) & known
        self.counts += torch.stack(
            [
                _count(true, in_told & in_true & (told == true), classes),
                _count(told, in_told, classes),
                _count(true, in_true, classes),
            ]
        )

    def merge(self, other: Boundaries) -> None:
        """Add what another one counted."""
        self.counts += other.counts.to(self.counts.device)


def segmentation_scores(
    confusion: Confusion, names: Sequence[str], boundary: Boundaries | None = None
) -> dict[str, Any]:
    """How well pixels are told.

    Args:
        confusion: of the whole data set.
        names: of the K classes.
        boundary: of the same maps.

    Returns:
        ``miou``, the mean IoU of the classes that occur in the labels or the predictions (as in
        mmseg); ``dice``, over the same; ``mean_accuracy``: the mean recall of the classes in the
        labels; ``pixel_accuracy``; with ``boundary`` also ``boundary_iou``; ``classes``;
        ``per_class``: ``iou``, ``accuracy`` (and ``boundary_iou``) and ``pixels`` by name.  What
        is not defined is None.
    """
    counts = confusion.counts.cpu()
    hits, sizes, told = counts.diagonal(), counts.sum(1), counts.sum(0)
    columns = {"iou": _percent(hits, sizes + told - hits), "accuracy": _percent(hits, sizes)}
    result = {
        "miou": _mean(columns["iou"]),
        "pixel_accuracy": _percent(hits.sum()[None], sizes.sum()[None])[0],
        "mean_accuracy": _mean(columns["accuracy"]),
        "dice": _mean(_percent(2 * hits, sizes + told)),
    }
    if boundary is not None:
        both, ours, theirs = boundary.counts.cpu()
        columns["boundary_iou"] = _percent(both, ours + theirs - both)
        result["boundary_iou"] = _mean(columns["boundary_iou"])
    return result | {
        "classes": list(names),
        "per_class": {
            name: {key: each[k] for key, each in columns.items()} | {"pixels": int(sizes[k])}
            for k, name in enumerate(names)
        },
    }


def _count(values: Tensor, which: Tensor, size: int) -> Tensor:
    """How often each of 0 ... size - 1 occurs; `bincount` would wait for the device."""
    counts = torch.zeros(size + 1, dtype=torch.int64, device=values.device)
    # 16 bytes a pixel, which are many in a large image
    parts = (torch.split(each.flatten(), _AT_ONCE) for each in (values, which))
    for some, chosen in zip(*parts, strict=True):
        places = some.long().masked_fill_(~chosen, size)
        counts.scatter_add_(0, places, torch.ones_like(places))
    return counts[:size]


def _band(classes: Tensor, reach: int) -> Tensor:
    """Pixels whose square of 2 reach + 1 has another class or goes beyond the image.

    That is the mask of each class without its erosion, for all classes in one pass.
    """
    padded = F.pad(classes, [reach] * 4, value=-1)
    return _over_square(padded, reach, torch.maximum) != _over_square(padded, reach, torch.minimum)


def _over_square(maps: Tensor, reach: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The highest, or lowest, in each square of 2 reach + 1 that lies in maps (B, H, W).

    A square of which half is known is known by one comparison, whatever its side (pooling makes
    as many comparisons as a side is long).
    """
    for axis in (1, 2):
        covered, side = 1, 2 * reach + 1
        while covered < side:
            step, length = min(covered, side - covered), maps.shape[axis]
            maps = join(maps.narrow(axis, 0, length - step), maps.narrow(axis, step, length - step))
            covered += step
    return maps


def _percent(part: Tensor, whole: Tensor) -> list[float | None]:
    pairs = zip(part.tolist(), whole.tolist(), strict=True)
    return [100 * hits / size if size else None for hits, size in pairs]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
