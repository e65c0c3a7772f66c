"""Scores of a test set against loops, and against torchmetrics where it is installed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from patchmine.errors import UserError
from patchmine.evaluate.scores import (
    MOST_IN_MATRIX,
    classification_scores,
    multilabel_scores,
    regression_scores,
)


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator)
    return scores, torch.randint(columns, (rows,), generator=generator)


def test_classes_equal_a_loop() -> None:
    scores, labels = drawn(200, 7)
    scores[torch.arange(200), labels] += 1
    found = classification_scores(scores, labels, names(7))
    matrix = [[0] * 7 for _ in range(7)]
    among_five = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        ranked = sorted(range(7), key=lambda k: -row[k])
        matrix[label][ranked[0]] += 1
        among_five += label in ranked[:5]
    recalls = []
    for k, name in enumerate(names(7)):
        told = sum(row[k] for row in matrix)
        recalls.append(100 * matrix[k][k] / sum(matrix[k]))
        one = found["per_class"][name]
        assert one["count"] == sum(matrix[k])
        assert one["top1"] == pytest.approx(recalls[-1])
        assert one["precision"] == pytest.approx(100 * matrix[k][k] / told)
    assert found["confusion"] == matrix
    assert found["top1"] == pytest.approx(sum(matrix[k][k] for k in range(7)) / 2)
    assert found["top5"] == pytest.approx(among_five / 2)
    assert found["balanced"] == pytest.approx(sum(recalls) / 7)
    assert found["loss"] == pytest.approx(
        -sum(row.log_softmax(0)[k].item() for row, k in zip(scores, labels, strict=True)) / 200,
        rel=1e-5,
    )
    assert found["classes"] == names(7)
    off = [(matrix[i][j], -i, -j) for i in range(7) for j in range(7) if i != j]
    count, true, predicted = max(off)
    first = {"true": f"class {-true}", "predicted": f"class {-predicted}", "count": count}
    assert found["confused"][0] == first


def test_few_classes_have_no_top5_and_an_absent_one_no_recall() -> None:
    scores = torch.tensor([[2.0, 0, 1], [2, 0, 1], [0, 0, 1]])
    found = classification_scores(scores, torch.tensor([0, 2, 2]), ["a", "b", "c"])
    assert "top5" not in found
    assert found["per_class"]["b"] == {"top1": None, "precision": None, "count": 0}
    assert found["balanced"] == pytest.approx((100 + 50) / 2)
    assert found["confused"] == [{"true": "c", "predicted": "a", "count": 1}]


def test_what_is_no_number_is_wrong_whichever_class_it_is() -> None:
    scores = torch.tensor([[math.nan, 0, 0], [0, math.nan, 0], [0, 0, 0.0]])
    found = classification_scores(scores, torch.tensor([0, 1, 0]), ["a", "b", "c"])
    assert found["top1"] == pytest.approx(100 / 3)  # of equal scores the first class counts
    assert found["per_class"]["a"]["top1"] == 50
    assert found["confusion"] == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert found["loss"] is None
    json.dumps(found, allow_nan=False)


def test_many_classes_have_no_matrix() -> None:
    count = MOST_IN_MATRIX + 1
    scores, labels = drawn(300, count)
    found = classification_scores(scores, labels, names(count))
    assert found["confusion"] is None
    assert len(found["confused"]) == 20
    assert len(found["per_class"]) == count


def test_labels_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(60, 4, generator=generator).mul(2).round().div(2)  # many equal ones
    has = torch.rand(60, 4, generator=generator) < torch.tensor([0.5, 0.2, 0.8, 0.0])
    found = multilabel_scores(scores, has.float(), names(4))
    precisions, hits, told, there = [], 0, 0, 0
    for k in range(4):
        value = recall_before = 0.0
        for limit in sorted(set(scores[:, k].tolist()), reverse=True):
            chosen = scores[:, k] >= limit
            right = int((chosen & has[:, k]).sum())
            recall = right / max(1, int(has[:, k].sum()))
            value += (recall - recall_before) * right / int(chosen.sum())
            recall_before = recall
        one = found["per_class"][f"class {k}"]
        if k == 3:
            assert one["ap"] is None
            continue
        precisions.append(100 * value)
        assert one["ap"] == pytest.approx(100 * value)
        assert one["count"] == int(has[:, k].sum())
    hits = int(((scores > 0) & has).sum())
    told, there = int((scores > 0).sum()), int(has.sum())
    assert found["map"] == pytest.approx(sum(precisions) / 3)
    assert found["micro_f1"] == pytest.approx(200 * hits / (told + there))


def test_labels_equal_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(100, 5, generator=generator)
    has = (torch.rand(100, 5, generator=generator) < 0.3).long()
    found = multilabel_scores(scores, has.float(), names(5))
    how = dict(num_labels=5)
    ap = metrics.multilabel_average_precision(scores, has, average=None, **how)
    assert [one["ap"] for one in found["per_class"].values()] == pytest.approx(
        (100 * ap).tolist(), rel=1e-5
    )
    for kind in ("micro", "macro"):
        f1 = metrics.multilabel_f1_score(scores, has, average=kind, **how)
        assert found[f"{kind}_f1"] == pytest.approx(100 * f1.item(), rel=1e-5)


def test_labels_that_nobody_has() -> None:
    found = multilabel_scores(torch.full((3, 2), math.nan), torch.zeros(3, 2), ["a", "b"])
    assert (found["map"], found["micro_f1"], found["macro_f1"]) == (0, 0, 0)
    json.dumps(found, allow_nan=False)


def test_numbers_equal_a_loop() -> None:
    targets = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 60.0]])
    values = torch.tensor([[1.5, 10.0], [2.0, 30.0], [3.0, 50.0]])
    found = regression_scores(values, targets, ["x", "y"])
    x, y = found["per_class"]["x"], found["per_class"]["y"]
    assert x["mae"] == pytest.approx(0.5)
    assert x["rmse"] == pytest.approx(math.sqrt(1.25 / 3))
    assert x["r2"] == pytest.approx(1 - 1.25 / (14 / 3))
    assert y["r2"] == pytest.approx(1 - 200 / 1400)
    for key in ("mae", "rmse", "r2"):
        assert found[key] == pytest.approx((x[key] + y[key]) / 2)
    assert found["classes"] == ["x", "y"]


def test_numbers_that_do_not_vary_and_that_are_none() -> None:
    same = torch.ones(3, 1)
    assert regression_scores(same, same, ["x"])["r2"] == 1
    assert regression_scores(same * 2, same, ["x"])["r2"] == 0
    with pytest.raises(UserError, match="no finite number for 1 of 3 items"):
        regression_scores(torch.tensor([[1.0], [math.inf], [2.0]]), same, ["x"])
