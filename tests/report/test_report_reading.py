import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from patchmine.errors import UserError
from patchmine.report.reading import distinct_names, flatten, read_run, read_runs

MakeRun = Callable[..., Path]


def write_lines(folder: Path, lines: list[dict[str, object]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_all_of_a_finished_run_is_read(make_run: MakeRun) -> None:
    run = read_run(make_run(steps=2000, samples=3), "hpm")
    assert (run.step, run.total_steps) == (2000, 2000)
    assert run.settings["method.name"] == "hpm"
    assert run.settings["model_args.depth"] == "4"
    assert set(run.evaluations) == {"knn", "linear"}
    assert [step for step, _ in run.samples] == [0, 1000, 2000]
    assert len(run.series["loss"].steps) == 200
    assert len(run.series["knn.top1"].steps) == 10
    assert run.seconds == pytest.approx(2000 * 128 / 480, rel=0.02)
    assert not run.unread


def test_a_line_cut_by_a_kill_is_skipped_and_said(make_run: MakeRun) -> None:
    folder = make_run()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2010, "loss": 0.\xff\x00')
    run = read_run(folder, "hpm")
    assert run.step == 2000
    assert run.unread == ("metrics.jsonl: 1 unreadable line skipped",)


@pytest.mark.parametrize(
    "rubbish", ["[1, 2]", "7", '{"loss": 1.0}', '{"step": null, "loss": 1.0}', '{"step": "3"}']
)
def test_a_line_without_a_step_is_skipped(tmp_path: Path, rubbish: str) -> None:
    folder = write_lines(tmp_path, [{"step": 1, "loss": 2.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(rubbish + "\n")
    assert read_run(folder, "x").series["loss"].values.tolist() == [2.0]


def test_numbers_that_are_none_leave_a_gap(tmp_path: Path) -> None:
    values = ["3.0", "null", "NaN", "true", "1"]
    text = "".join(f'{{"step": {i}, "loss": {value}}}\n' for i, value in enumerate(values, start=1))
    (tmp_path / "metrics.jsonl").write_text(text)
    series = read_run(tmp_path, "x").series["loss"]
    assert series.steps.tolist() == [1, 5]
    assert series.values.tolist() == [3, 1]


def test_steps_made_again_after_a_resume_replace_the_old_ones(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"step": 10, "loss": 5.0},
        {"step": 20, "loss": 4.0},
        {"step": 20, "eval": {"name": "knn", "top1": 30.0}},
        {"step": 30, "loss": 3.0},
        {"step": 20, "loss": 4.5},
        {"step": 20, "eval": {"name": "knn", "top1": 31.0}},
    ]
    run = read_run(write_lines(tmp_path, lines), "x")
    assert run.step == 20
    assert run.series["loss"].values.tolist() == [5.0, 4.5]
    assert run.series["knn.top1"].values.tolist() == [31.0]


def test_the_step_of_an_evaluation_may_stand_inside(tmp_path: Path) -> None:
    folder = write_lines(tmp_path, [{"eval": {"name": "knn", "top1": 30.0, "step": 7}}])
    assert read_run(folder, "x").series["knn.top1"].steps.tolist() == [7]


@pytest.mark.parametrize(
    ("config", "epochs_made", "expected"),
    [
        ("steps: 500\nepochs: 100\n", 2.0, 500),
        ("steps: null\nepochs: 10\n", 2.5, 400),
        ("epochs: 10\n", 2, 500),
        ("epochs: null\n", 2, None),
        ("epochs: 10\n", 0, None),
    ],
)
def test_the_length_of_a_run_comes_from_steps_or_epochs(
    tmp_path: Path, config: str, epochs_made: float, expected: int | None
) -> None:
    folder = write_lines(tmp_path, [{"step": 100, "epoch": epochs_made, "loss": 1.0}])
    (folder / "config.yaml").write_text(config)
    assert read_run(folder, "x").total_steps == expected


def test_what_is_missing_or_broken_is_said_and_left_out(make_run: MakeRun) -> None:
    folder = make_run(evals=True)
    (folder / "eval" / "knn.json").write_text('{"top1": ')
    (folder / "config.yaml").write_text("a: [1,")
    run = read_run(folder, "x")
    assert set(run.evaluations) == {"linear"}
    assert run.settings == {}
    assert run.unread == ("config.yaml cannot be read", "eval/knn.json cannot be read")


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=folder):
        read_runs([tmp_path / folder])


def test_no_folder_is_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        read_runs([])


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert distinct_names([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert distinct_names([Path("a/x"), Path("a/x")]) == ["x (1)", "x (2)"]


def test_nested_settings_become_dotted_names() -> None:
    nested = {"a": {"b": {"c": 1e-4}}, "d": [1, 2], "e": None, "f": True, "g": {}}
    assert flatten(nested) == {
        "a.b.c": "0.0001",
        "d": "[1, 2]",
        "e": "none",
        "f": "true",
        "g": "{}",
    }


def test_steps_rise(make_run: MakeRun) -> None:
    for series in read_run(make_run(), "x").series.values():
        assert np.all(np.diff(series.steps) > 0)
