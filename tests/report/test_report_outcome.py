"""The verdict at the top of a page: what it says of each kind of evidence, and no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchmine.report.outcome import Outcome, compare, outcome_of
from patchmine.report.page import write_report
from patchmine.report.reading import read_run, read_runs

MakeRun = Callable[..., Path]
STANDARD = {"name": "mae", "norm_pix_loss": True}


def told(folder: Path) -> Outcome:
    found = outcome_of(read_run(folder, "run"))
    assert found is not None
    return found


def evaluated(
    folder: Path, top1: float, images: int | None = 900, name: str = "knn", **more: Any
) -> Path:
    """The run with an evaluation beside these baselines: accuracies, or whole tables."""
    baselines = {
        key: value if isinstance(value, dict) else {"top1": value}
        for key, value in more.items()
        if key in ("random_init", "raw_pixels", "start")
    }
    others = {key: value for key, value in more.items() if key not in baselines}
    result = {"name": name, "top1": top1, "baselines": baselines, **others}
    if images is not None:
        result["images"] = {"how": "test/ of data", "test": images + 3, "test_read": images}
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / f"{name}.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def bare(make_run: MakeRun) -> Path:
    return make_run("run", knn=False, evals=False)


def test_a_run_that_is_above_its_baselines_learned(bare: Path) -> None:
    found = told(evaluated(bare, 85.4, random_init=76.4, raw_pixels=40.9))
    assert found.headline == (
        "kNN 85.4 % (95 % interval 82.9 to 87.6), random init 76.4 %, raw pixels 40.9 %, on 900 "
        "test images: it learned."
    )
    assert found.kind == "good"
    assert found.command is None
    assert found.also[0] == (
        "9.0 points above random init (95 % interval +5.4 to +12.6, from the two accuracies "
        "alone, which is too wide)."
    )


def test_few_test_images_tell_nothing_and_it_says_how_many_would(bare: Path) -> None:
    found = told(evaluated(bare, 77.6, images=100, random_init=76.4, raw_pixels=40.9))
    assert found.kind == "unclear"
    assert found.headline.endswith("on 100 test images: it cannot be told apart from random init.")
    (few,) = [text for text in found.also if "too few" in text]
    assert few.startswith("100 test images are too few for so small a difference: about ")
    assert few.endswith(" would tell, if it stays as it is.")
    count = int(few.split("about ")[1].split(" ")[0].replace(",", ""))
    # With that many it is told, and with a fifth of them not.
    assert told(evaluated(bare, 77.6, images=count, random_init=76.4)).kind == "good"
    assert told(evaluated(bare, 77.6, images=count // 5, random_init=76.4)).kind == "unclear"


def test_no_difference_at_all_asks_for_no_number_of_images(bare: Path) -> None:
    found = told(evaluated(bare, 50.0, images=100, random_init=50.0))
    assert any("alike" in text for text in found.also)
    assert not any("would tell" in text for text in found.also)


def test_image_by_image_a_difference_is_told_that_accuracies_hide(bare: Path) -> None:
    plain = {"random_init": {"top1": 76.0}}
    paired = {"random_init": {"top1": 76.0, "change": {"points": 2.0, "interval": [0.5, 3.5]}}}
    assert told(evaluated(bare, 78.0, **plain)).kind == "unclear"
    found = told(evaluated(bare, 78.0, **paired))
    assert found.kind == "good"
    assert found.also[0] == (
        "2.0 points above random init (95 % interval +0.5 to +3.5, image by image)."
    )


@pytest.mark.parametrize(
    ("top1", "random_init", "raw_pixels", "kind", "end"),
    [
        (60.0, 76.0, 40.0, "bad", "worse than random init, it learned nothing that these labels"),
        (70.0, 50.0, 80.0, "unclear", "better than random init, but worse than raw pixels."),
        (70.0, 50.0, 69.0, "unclear", "random init, but not to be told apart from raw pixels."),
    ],
)
def test_it_does_not_praise_what_baselines_reach(
    bare: Path, top1: float, random_init: float, raw_pixels: float, kind: str, end: str
) -> None:
    found = told(evaluated(bare, top1, random_init=random_init, raw_pixels=raw_pixels))
    assert found.kind == kind
    assert end in found.headline


@pytest.mark.parametrize(
    ("interval", "kind", "end"),
    [
        ([4.0, 12.0], "good", "training helped."),
        ([-4.0, 5.0], "unclear", "it cannot be told apart from its untouched start."),
        ([-9.0, -2.0], "bad", "worse than its untouched start, training made it worse."),
    ],
)
def test_a_run_from_weights_is_judged_by_its_start(
    bare: Path, interval: list[float], kind: str, end: str
) -> None:
    since = {"points": sum(interval) / 2, "interval": interval}
    folder = evaluated(bare, 60.0, start=52.0, random_init=20.0, since_start=since)
    found = told(folder)
    assert found.kind == kind
    assert found.headline.endswith(end)
    assert "its untouched start 52.0 %, random init 20.0 %" in found.headline


def test_without_the_number_of_images_it_claims_nothing(make_run: MakeRun) -> None:
    found = told(make_run("run"))  # as files of earlier versions are
    assert found.kind == "unclear"
    assert found.headline.endswith("the file does not say on how many images.")
    assert "interval" not in found.headline


def test_another_evaluation_that_disagrees_is_told(bare: Path) -> None:
    evaluated(bare, 85.4, random_init=76.4)
    found = told(evaluated(bare, 70.0, name="linear", random_init=76.4))
    assert found.headline.startswith("kNN")
    assert any(text.startswith("Linear 70.0 %") and "worse than" in text for text in found.also)


def test_knn_in_training_alone_asks_for_baselines(make_run: MakeRun) -> None:
    folder = make_run("run", evals=False, eval_data="bird s/train", eval_test="birds/test")
    found = told(folder)
    assert found.kind == "untold"
    assert found.headline.startswith("kNN in training rose from 3")
    assert found.command == (
        f"patchmine eval knn {folder} 'data=bird s/train' test=birds/test baselines=true"
    )


def test_without_labels_the_losses_speak_and_the_command_is_there(bare: Path) -> None:
    found = told(bare)
    assert found.kind == "untold"
    assert found.headline.startswith("It learns its own task: the loss fell from 1.")
    assert found.also[-1].startswith("Only labelled images can say whether the features are good")
    assert found.command == f"patchmine eval knn {bare} data=LABELLED baselines=true"


def with_method(folder: Path, **settings: Any) -> Path:
    """The run, of another method with these settings of its own."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"method": settings}))
    return folder


def lines(folder: Path, *own: dict[str, float]) -> Path:
    text = "".join(
        json.dumps({"step": 100 * k, "samples": 6400 * k, "images_per_second": 64, **line}) + "\n"
        for k, line in enumerate(own, start=1)
    )
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("settings", "line", "said"),
    [
        (
            STANDARD,
            {"loss": 0.61},
            "is 0.6100, where predicting each patch's mean gives about 1 (less",
        ),
        (
            STANDARD,
            {"loss": 1.7, "reconstruction": 1.003},
            "is 1.003, no better than predicting each",
        ),
        (
            {"name": "droppos", "pos_mask_ratio": 0.75},
            {"loss": 2.0, "accuracy": 0.25},
            "It places 25.0 % of the patches right, where guessing gives 6.2 %.",
        ),
        (
            {"name": "scfs", "teacher_temp_start": 0.04},
            {"loss": 2.0},
            "Student and teacher both move, so a low loss alone says little",
        ),
    ],
)
def test_the_loss_is_told_beside_what_guessing_gives(
    make_run: MakeRun, settings: dict[str, Any], line: dict[str, float], said: str
) -> None:
    folder = with_method(make_run("run", evals=False, patch_size=8), **settings)
    found = told(lines(folder, {**line, "loss": 9.0}, line))
    assert any(said in text for text in found.also), found.also


def test_no_guess_is_claimed_where_settings_do_not_tell(make_run: MakeRun) -> None:
    folder = with_method(make_run("run", evals=False), name="mae", norm_pix_loss=False)
    found = told(lines(folder, {"loss": 2.0}, {"loss": 1.0}))
    assert not any("each patch's mean" in text for text in found.also)


def test_a_loss_that_does_not_fall_is_no_success(bare: Path) -> None:
    found = told(lines(bare, {"loss": 0.5}, {"loss": 0.5}))
    assert found.kind == "unclear"
    assert found.headline.endswith("nothing shows yet that it learns: the loss stayed near 0.5000.")


def test_what_went_wrong_is_said_first_without_labels_and_beside_them(make_run: MakeRun) -> None:
    folder = make_run("run", knn=False, evals=False, over_fitted=True)
    found = told(folder)
    assert (found.kind, found.headline) == ("bad", "The run over-fits.")
    found = told(evaluated(folder, 85.4, random_init=76.4))
    assert found.kind == "good"
    assert found.also[-1] == "But the run over-fits: see below."


def test_a_run_that_goes_on_says_after_how_much(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("run", made=500, knn=False, evals=False)
    assert told(folder).headline.startswith("After 25 % of its steps, it learns its own")
    page = write_report([folder], tmp_path / "x.html").read_text()
    # 1,500 steps of 128 images at about 480 a second
    assert "about 6 min" in page
    assert "of training left; newest numbers of 20" in page
    assert "left; newest" not in write_report([make_run("done")], tmp_path / "y.html").read_text()


def test_a_run_that_just_began_has_a_verdict_too(bare: Path) -> None:
    (bare / "metrics.jsonl").write_text("")
    assert told(bare).headline == "There are no numbers of training yet."
    assert told(bare).command is not None


def fine_tuned(make_run: MakeRun, **result: Any) -> Path:
    folder = make_run("tuned", evals=False, knn=False, kind="classify")
    with (folder / "metrics.jsonl").open("a") as file:
        for step, top1 in ((1000, 86.0), (2000, 84.0)):
            scores = {"name": "val", "top1": top1}
            file.write(json.dumps({"step": step, "eval": scores}) + "\n")
    (folder / "eval").mkdir()
    known = {"name": "test", "chosen_by": "validation on 100 images", "images": {"test": 400}}
    (folder / "eval/test.json").write_text(json.dumps({**known, **result}))
    return folder


@pytest.mark.parametrize(
    ("top1", "kind", "end"),
    [
        (85.0, "good", "it learned."),
        (61.0, "unclear", "it cannot be told apart from that."),
        (40.0, "bad", "it does worse than that."),
    ],
)
def test_a_classifier_is_judged_by_its_test_and_the_most_common_class(
    make_run: MakeRun, top1: float, kind: str, end: str
) -> None:
    counts = {"cat": {"count": 240}, "dog": {"count": 160}}
    found = told(fine_tuned(make_run, top1=top1, per_class=counts))
    assert found.kind == kind
    assert found.headline.startswith(f"Test top-1 {top1:.1f} % (95 % interval ")
    assert "on 400 test images; always naming the most common class gives 60.0 %" in found.headline
    assert found.headline.endswith(end)
    assert found.also == [
        "Validation top-1 fell from 86.0 % to 84.0 %; best 86.0 % at step 1,000, the checkpoint "
        "that was tested."
    ]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"miou": 38.25}, "Test mIoU 38.2 % on 400 test images."),
        ({"map": 46.6, "map50": 80.0}, "Test mAP 46.6 % on 400 test images."),
        ({"r2": 0.71, "mae": 3.0}, "Test R² 0.7100 on 400 test images."),
    ],
)
def test_other_scores_are_told_without_an_interval(
    make_run: MakeRun, result: dict[str, float], said: str
) -> None:
    found = told(fine_tuned(make_run, **result))
    assert found.headline == said
    assert found.also[0] == "No interval is known for such a score."


def test_several_runs_are_told_apart_only_where_they_can_be(make_run: MakeRun) -> None:
    a, b, c = (make_run(name, knn=False, evals=False) for name in "abc")
    evaluated(a, 78.0), evaluated(b, 70.0), evaluated(c, 77.0)
    found = compare(read_runs([b, a]))
    assert found is not None
    assert found.headline == "kNN: a 78.0 %, b 70.0 %, on 900 test images each: a is better."
    assert found.also[0].startswith("a is 8.0 points above b (95 % interval +4.0 to +12.0)")
    found = compare(read_runs([b, a, c]))
    assert found is not None
    assert found.kind == "unclear"
    assert found.headline.endswith("on 900 test images each: a cannot be told apart from c.")
    evaluated(b, 10.0, images=500)
    found = compare(read_runs([a, b]))
    assert found is not None
    assert "measured on different images" in found.headline


def test_runs_with_knn_in_training_alone_are_not_ranked(make_run: MakeRun) -> None:
    runs = [make_run(name, evals=False, seed=k) for k, name in enumerate("ab")]
    found = compare(read_runs(runs))
    assert found is not None
    assert found.headline.startswith("kNN in training: ")
    assert "whether by chance cannot be told" in found.headline
    assert compare(read_runs(runs[:1])) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"top1": 500.0},
        {"top1": 50.0, "baselines": {"random_init": 3, "x": {"top1": "7"}}, "images": [3]},
        {"top1": 50.0, "images": {"test": -1}, "baselines": {"random_init": {"top1": 40.0}}},
        {
            "top1": 50.0,
            "images": {"test": 0.5},
            "baselines": {"random_init": {"top1": 40.0, "change": {"interval": [3, "x"]}}},
        },
    ],
)
def test_damaged_results_say_no_more_than_they_hold(bare: Path, damage: dict[str, Any]) -> None:
    (bare / "eval").mkdir()
    (bare / "eval/knn.json").write_text(json.dumps(damage))
    found = told(bare)
    assert found.kind in ("untold", "unclear")
    assert "interval" not in found.headline


def test_the_verdict_is_the_first_thing_of_the_page(bare: Path, tmp_path: Path) -> None:
    evaluated(bare, 85.4, random_init=76.4)
    page = write_report([bare], tmp_path / "x.html").read_text()
    body = page[page.index("<main>") :]
    places = [body.index(text) for text in ('class="headline"', 'id="overview"', 'id="curves"')]
    assert places == sorted(places)
    assert body.index("it learned.") < places[1]


def test_who_writes_the_page_hears_what_it_opens_with(make_run: MakeRun, tmp_path: Path) -> None:
    a, b = (make_run(name, knn=False, evals=False) for name in "ab")
    runs = [evaluated(a, 78.0, random_init=60.0), evaluated(b, 70.0)]
    heard: list[str] = []
    write_report(runs[:1], tmp_path / "one.html", say=heard.append)
    assert heard == [f"a: {told(a).headline}"]
    heard.clear()
    write_report(runs, tmp_path / "two.html", say=heard.append)
    assert heard[0].endswith("a is better.")
    assert heard[1:] == [f"a: {told(a).headline}", f"b: {told(b).headline}"]


def test_a_classifier_in_training_says_when_it_is_tested(make_run: MakeRun) -> None:
    found = told(make_run("run", evals=False, knn=False, made=500, kind="classify"))
    assert found.headline.startswith("After 25 % of its steps, the loss fell from ")
    assert found.also[-1] == "It is tested when it is trained to its end."


def test_few_looks_are_no_evidence_against_a_collapse(bare: Path) -> None:
    for count, seen in ((2, False), (8, True)):
        looks = [
            {"step": 100 * k, "eval": {"name": "monitor", "rankme": 9.0 + k, "feature_std": 0.05}}
            for k in range(1, count + 1)
        ]
        trained = [{"step": 100 * k, "loss": 1 / k} for k in range(1, count + 1)]
        text = "".join(
            json.dumps(line) + "\n" for pair in zip(trained, looks, strict=True) for line in pair
        )
        (bare / "metrics.jsonl").write_text(text)
        (ranks,) = [text for text in told(bare).also if "RankMe 10 at first" in text]
        assert ("No collapse" in ranks) is seen
