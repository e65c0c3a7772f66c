"""Scores of label maps against loops, and against torchmetrics where it is installed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from patchmine.evaluate.segmentation import Boundaries, Confusion, segmentation_scores

NAMES = ["a", "b", "c", "predicted only", "nowhere"]
IGNORED = 255


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of blobs, with ignored pixels; the fourth is predicted only."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (3, 4, 6), generator=generator)
    labels = coarse.repeat_interleave(10, 1).repeat_interleave(12, 2)
    predicted = labels.roll((2, 3), (1, 2))
    predicted[:, :3, :5] = 3
    labels = labels.clone()
    labels[:, -7:, 10:22] = IGNORED
    return predicted, labels


def test_scores_equal_loops() -> None:
    predicted, labels = maps()
    confusion = Confusion(5)
    for p, t in zip(predicted, labels, strict=True):
        confusion.add(p[None], t[None], IGNORED)
    found = segmentation_scores(confusion, NAMES)
    known = labels != IGNORED
    ious, accuracies, dices = [], [], []
    for k, name in enumerate(NAMES):
        told, true = (predicted == k) & known, labels == k
        both, either = int((told & true).sum()), int((told | true).sum())
        one = found["per_class"][name]
        assert one["pixels"] == int(true.sum())
        assert one["iou"] == (pytest.approx(100 * both / either) if either else None)
        if either:
            ious.append(both / either)
            dices.append(2 * both / int(told.sum() + true.sum()))
        if true.any():
            accuracies.append(both / int(true.sum()))
            assert one["accuracy"] == pytest.approx(100 * accuracies[-1])
        else:
            assert one["accuracy"] is None
    assert len(ious) == 4
    assert len(accuracies) == 3
    right = ((predicted == labels) & known).sum() / known.sum()
    assert found["miou"] == pytest.approx(100 * sum(ious) / 4)
    assert found["dice"] == pytest.approx(100 * sum(dices) / 4)
    assert found["mean_accuracy"] == pytest.approx(100 * sum(accuracies) / 3)
    assert found["pixel_accuracy"] == pytest.approx(100 * right.item())
    assert found["classes"] == list(found["per_class"]) == NAMES
    json.dumps(found, allow_nan=False)


def test_scores_equal_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    predicted, labels = maps(1)
    confusion = Confusion(5)
    confusion.add(predicted, labels, IGNORED)
    how = dict(num_classes=5, ignore_index=IGNORED)
    assert torch.equal(
        confusion.counts, metrics.multiclass_confusion_matrix(predicted, labels, **how)
    )
    iou = 100 * metrics.multiclass_jaccard_index(predicted, labels, average=None, **how)
    found = segmentation_scores(confusion, NAMES)
    for k in range(4):
        assert found["per_class"][NAMES[k]]["iou"] == pytest.approx(iou[k].item(), rel=1e-5)


def slow_band(mask: Tensor, reach: int) -> Tensor:
    """A mask without its erosion, pixel by pixel."""
    height, width = mask.shape
    band = torch.zeros_like(mask)
    for y, x in mask.nonzero().tolist():
        inside = reach <= y < height - reach and reach <= x < width - reach
        square = mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        band[y, x] = not (inside and square.all())
    return band


def test_boundary_iou_equals_erosion_of_each_mask() -> None:
    predicted, labels = maps(2)
    reach = round(0.02 * (40**2 + 72**2) ** 0.5)
    assert reach == 2
    boundary = Boundaries(5)
    boundary.add(predicted, labels, IGNORED)
    confusion = Confusion(5)
    confusion.add(predicted, labels, IGNORED)
    found = segmentation_scores(confusion, NAMES, boundary)
    known, values = labels != IGNORED, []
    for k, name in enumerate(NAMES):
        both = either = 0
        for p, t, here in zip(predicted, labels, known, strict=True):
            told, true = slow_band((p == k) & here, reach), slow_band(t == k, reach)
            both += int((told & true).sum())
            either += int((told | true).sum())
        expected = 100 * both / either if either else None
        assert found["per_class"][name]["boundary_iou"] == pytest.approx(expected), name
        values += [] if expected is None else [expected]
    assert found["boundary_iou"] == pytest.approx(sum(values) / len(values))
    assert 0 < found["boundary_iou"] < found["miou"]


@pytest.mark.parametrize("kind", [Confusion, Boundaries])
def test_parts_add_up(kind: type[Confusion] | type[Boundaries]) -> None:
    predicted, labels = maps(3)
    whole, first, second = kind(5), kind(5), kind(5)
    whole.add(predicted, labels, IGNORED)
    first.add(predicted[:1], labels[:1], IGNORED)
    second.add(predicted[1:], labels[1:], IGNORED)
    first.merge(second)  # type: ignore[arg-type]
    assert torch.equal(first.counts, whole.counts)


def test_nothing_to_count() -> None:
    found = segmentation_scores(Confusion(2), ["a", "b"], Boundaries(2))
    assert found["miou"] is None
    assert found["per_class"]["b"]["pixels"] == 0
