"""What the page shows of each class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from patchmine.evaluate.scores import classification_scores, multilabel_scores
from patchmine.report.classes import MOST_IN_MATRIX, take_classes
from patchmine.report.page import write_report
from patchmine.report.results import read_result


def scores(count: int) -> dict[str, object]:
    labels = torch.arange(count).repeat(3)
    logits = torch.nn.functional.one_hot(labels, count).float()
    logits[0] = logits[1]  # the first item is taken for the second class
    return classification_scores(logits, labels, [f"class {i}" for i in range(count)])


def test_a_table_and_a_matrix_come_from_a_test_result() -> None:
    result = read_result(0, "run", {"name": "test", **scores(3), "protocol": "finetune"})
    found = result.by_class
    assert found.columns == ["top1", "precision", "count"]
    assert found.rows[0] == ("class 0", ["66.7 %", "100.0 %", "3"])
    assert found.rows[1] == ("class 1", ["100.0 %", "75.0 %", "3"])
    assert [[count for count, _ in row] for row in found.matrix] == [
        [2, 1, 0],
        [0, 3, 0],
        [0, 0, 3],
    ]
    assert found.matrix[0][1][1] == pytest.approx(1 / 3)
    assert set(result.conditions) == {"loss", "protocol"}
    assert found.balanced == pytest.approx((200 / 3 + 200) / 3)


def test_many_classes_are_told_by_pairs() -> None:
    found = take_classes(dict(scores(MOST_IN_MATRIX + 1)))
    assert found.matrix == []
    assert found.pairs == [("class 0", "class 1", "1")]


def test_labels_have_a_table_and_no_matrix() -> None:
    has = torch.tensor([[1.0, 0], [0, 0]])
    found = take_classes(dict(multilabel_scores(has - 0.5, has, ["a", "b"])))
    assert found.columns == ["ap", "f1", "count"]
    assert found.rows == [("a", ["100.0 %", "100.0 %", "1"]), ("b", ["\N{EN DASH}"] * 2 + ["0"])]
    assert (found.matrix, found.pairs) == ([], [])


@pytest.mark.parametrize(
    "damage",
    [
        {"per_class": [1]},
        {"per_class": {"a": 1, "b": {"top1": "x"}}},
        {"confusion": [[1], [2, 3], "x"]},
        {"confusion": [[None] * 3] * 3},
        {"confusion": 7, "confused": [3, {"true": []}]},
        {"balanced": "x"},
    ],
)
def test_a_damaged_result_is_shown_as_far_as_it_goes(damage: dict[str, object]) -> None:
    result = read_result(0, "run", {**scores(3), **damage})
    assert result.by_class is None or result.by_class.matrix == [] or "balanced" in damage


def test_the_page_shows_both(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run("tuned")
    names = ["<b>cat</b>", "dog", "bird"]
    logits = torch.eye(3)[[0, 1, 2, 1]]
    result = classification_scores(logits, torch.tensor([0, 1, 2, 0]), names)
    (folder / "eval" / "test.json").write_text(json.dumps({"name": "test", **result}))
    page = write_report([folder], tmp_path / "x.html").read_text()
    assert "tuned, class by class; balanced 83.3 %" in page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>cat" not in page
    assert '<td style="--share:20%">1</td>' in page  # half of the cats
