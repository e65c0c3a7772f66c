"""What the page shows of runs that segment and detect: their scores, by boxes and by masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchmine.report.curves import charts
from patchmine.report.overview import facts_of
from patchmine.report.page import write_report
from patchmine.report.reading import read_run
from patchmine.report.results import read_result
from patchmine.report.words import is_share, measure, score

DETECTED: dict[str, Any] = {
    "name": "test",
    "protocol": "detect",
    **{"map": 46.61, "map50": 80.2, "map75": 49.7, "map_small": 12.5, "map_large": None},
    **{"mar100": 52.0, "mask_map": 41.22, "mask_map50": 79.1, "mask_mar100": 46.4},
    "classes": ["<b>nucleus", "other"],
    "per_class": {
        "<b>nucleus": {"ap": 46.61, "ap50": 80.2, "mask_ap": 41.22, "objects": 1130},
        "other": {"ap": None, "ap50": None, "mask_ap": None, "objects": 0},
    },
    "images": {"train": 100, "test": 40},
}


def detecting(make_run: Callable[..., Path]) -> Path:
    """A run with a validation every other line, and a test."""
    folder = make_run("found", knn=False, evals=False, lines=10)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("method:", "kind: detect\nunused:"))
    with (folder / "metrics.jsonl").open("a") as file:
        for k, step in enumerate((1000, 2000)):
            scores = {
                "map": 30.0 - 10 * k,
                "map50": 50.0,
                "map75": 9,
                "mask_mar100": 1,
                "mask_map": 3,
            }
            file.write(json.dumps({"step": step, "eval": {"name": "val", **scores}}) + "\n")
    (folder / "eval").mkdir()
    (folder / "eval" / "test.json").write_text(json.dumps(DETECTED))
    return folder


def test_scores_of_masks_stand_below_those_of_boxes() -> None:
    result = read_result(0, "run", dict(DETECTED))
    (boxes, by_box), (masks, by_mask) = result.lines
    assert (boxes, masks) == ("boxes", "masks")
    assert by_box == {"map": 46.61, "map50": 80.2, "map75": 49.7, "map_small": 12.5, "mar100": 52.0}
    assert by_mask == {"map": 41.22, "map50": 79.1, "mar100": 46.4}
    assert read_result(0, "run", {"miou": 38.0}).lines == [("", {"miou": 38.0})]
    assert read_result(0, "run", {"top1": 38.0}).lines == [("", {})]
    assert result.by_class is not None
    assert result.by_class.columns == ["ap", "ap50", "mask_ap", "objects"]
    assert result.by_class.rows[0][1] == ["46.6 %", "80.2 %", "41.2 %", "1,130"]


def test_the_page_tells_them_as_papers_do(make_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([detecting(make_run)], tmp_path / "x.html").read_text()
    words = " ".join(page.split())
    assert '<p class="about">detection · vit_tiny_patch16_224' in words
    for text in ("mAP50", "mAP small", "mAR100", "found, boxes", "found, masks", "mask AP"):
        assert text in words
    assert '<td class="number">41.2 %</td>' in words
    assert '<details class="numbers classes run-0" open>' in words
    assert "<b>nucleus" not in page


def test_runs_are_told_by_their_main_scores(make_run: Callable[..., Path]) -> None:
    run = read_run(detecting(make_run), "found")
    facts = {fact.label: (fact.value, fact.detail) for fact in facts_of(run)}
    assert facts["Validation mAP in training"] == ("20.0 %", "best 30.0 %")
    assert facts["Validation mask mAP in training"] == ("3.0 %", "")
    assert facts["Test mAP"] == ("46.6 %", "")
    assert facts["Test mask mAP"] == ("41.2 %", "")


def test_few_scores_of_a_validation_have_charts(make_run: Callable[..., Path]) -> None:
    drawn = {chart.title: chart for chart in charts([read_run(detecting(make_run), "found")])}
    scores = [title for title in drawn if title.startswith("Validation")]
    assert scores == ["Validation mAP", "Validation mAP50", "Validation mask mAP"]
    assert drawn["Validation mAP"].unit == " %"


@pytest.mark.parametrize(
    ("name", "shown", "value"),
    [
        ("map_small", "mAP small", "12.3 %"),
        ("mask_map50", "mask mAP50", "12.3 %"),
        ("boundary_iou", "boundary IoU", "12.3 %"),
        ("top1", "top-1", "12.3 %"),
        ("recall_5", "recall 5", "12.3 %"),
        ("nmi", "nmi", "12.34"),
        ("mask_ratio", "mask ratio", "12.34"),
    ],
)
def test_scores_have_their_usual_names(name: str, shown: str, value: str) -> None:
    assert score(name) == shown
    assert measure(12.34, name) == value
    assert is_share(name) is value.endswith("%")
