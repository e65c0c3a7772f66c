"""The verdict on pre-training: what it says, and what it makes of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patchmine.report.page import write_report
from patchmine.report.verdict import draw_verdict, read_verdict, sentences, table

Scores = dict[str, list[tuple[float, float | None]]]
SHARES = (0.01, 0.1, 1.0)
CLEAR: Scores = {
    "pretrained": [(41.2, 2.1), (84.0, 0.6), (88.4, 0.2)],
    "random_init": [(24.9, 3.0), (54.0, 1.1), (83.1, 0.4)],
}


def result_of(scores: Scores, metric: str = "top1") -> dict[str, Any]:
    entries = [
        {"share": share, "start": start, "images": round(1000 * share), "steps": 30, "std": std}
        | {metric: mean, "seeds": [0, 1]}
        for start, own in scores.items()
        for share, (mean, std) in zip(SHARES, own, strict=False)
    ]
    starts = {"pretrained": {"init": "runs/hpm"}, "random_init": {"init": None}}
    settings, images = {"data": "labelled/", "epochs": 3}, {"how": "test/ of data"}
    known = {"settings": settings, "images": images, "starts": starts}
    return {"metric": metric, "entries": entries, **known}


def test_it_says_who_wins_with_few_labels_and_with_all_and_what_that_saves() -> None:
    assert sentences(read_verdict(result_of(CLEAR))) == [
        "With 1 % of the labels, pre-trained weights reach 41.2 ± 2.1 % top-1 where random ones "
        "reach 24.9 ± 3.0 %.",
        "With all labels, pre-trained weights reach 88.4 ± 0.2 % top-1 where random ones reach "
        "83.1 ± 0.4 %.",
        "10 % of the labels are enough for pre-trained weights to reach what random ones reach "
        "with 100 %.",
    ]


@pytest.mark.parametrize(
    ("own", "theirs", "said"),
    [
        ((50.0, 3.0), (48.0, 3.0), "within the spread of the seeds."),
        ((50.0, None), (20.0, None), "(one seed: the spread is unknown)."),
        (
            (20.0, 1.0),
            (50.0, 1.0),
            "reach 20.0 ± 1.0 % top-1 where random ones reach 50.0 ± 1.0 %.",
        ),
    ],
)
def test_it_claims_no_more_than_the_seeds_show(
    own: tuple[float, float | None], theirs: tuple[float, float | None], said: str
) -> None:
    told = sentences(read_verdict(result_of({"pretrained": [own], "random_init": [theirs]})))
    assert len(told) == 1
    assert told[0].endswith(said)


def test_a_start_alone_and_another_metric_have_their_own_words() -> None:
    verdict = read_verdict(result_of({"pretrained": [(0.7123, 0.01)]}, metric="r2"))
    assert sentences(verdict) == [
        "With 1 % of the labels, pre-trained weights reach 0.712 ± 0.010 R²."
    ]
    assert table(verdict) == (
        ["labels", "images", "steps", "pre-trained"],
        [["1 %", "10", "30", "0.712 ± 0.010"]],
    )


def test_a_picture_has_the_colours_of_all_starts() -> None:
    three = CLEAR | {"other": [(30.0, 1.0), (60.0, 1.0), (85.0, 1.0)]}
    picture = draw_verdict(read_verdict(result_of(three)))
    colours = {colour for _, colour in picture.getcolors(2**20) or []}
    assert {(8, 104, 172), (86, 91, 99), (184, 74, 0)} <= colours


def test_damage_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    file, page = tmp_path / "eval/shares.json", tmp_path / "report.html"
    damaged = result_of(CLEAR)
    damaged["entries"] += [None, {"share": "x"}, {"share": -1.0, "start": "pretrained"}]
    file.write_text(json.dumps(damaged))
    assert "reach 41.2" in write_report([tmp_path], page).read_text()
    for text in ("{", "[]", '{"entries": 3}', '{"entries": [{"share": 0.1}]}'):
        file.write_text(text)
        assert "reach" not in write_report([tmp_path], page).read_text()
