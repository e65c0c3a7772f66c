"""Reports of run folders that were damaged: a page comes out, says what it left out, and takes no
time over it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from patchmine.errors import UserError
from patchmine.report.outcome import judge
from patchmine.report.page import render, write_report
from patchmine.report.reading import read_runs

MakeRun = Callable[..., Path]
NUMBERS = [
    *(
        "1e308",
        "-1e308",
        "1e99",
        "5e-324",
        "1e-320",
        "NaN",
        "Infinity",
        "-Infinity",
        "1" + "0" * 400,
        "-0.0",
        "true",
    ),
    *("1" * 5000, "null", '"3"', "[]", "{}", "1e400", "9007199254740993", "0", "-5"),
]


def page(*folders: Path) -> str:
    runs = read_runs(folders)
    return render(runs, judge(runs), datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "key", ["step", "loss", "samples", "epoch", "images_per_second", "data_wait", "skipped"]
)
def test_no_number_of_a_metrics_line_stops_a_report(tmp_path: Path, key: str, number: str) -> None:
    lines = [
        f'{{"step": {step}, "epoch": {step / 4}, "samples": {step * 8}, "loss": {1 / step}, "lr": 0.1, '
        f'"images_per_second": 10, "data_wait": 0.1, "skipped": 0}}'
        for step in range(1, 8)
    ]
    lines.insert(
        4, lines[3].replace("}", f', "{key}": {number}}}')
    )  # of two equal keys the second counts
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    assert "</html>" in page(tmp_path)


@pytest.mark.parametrize("number", NUMBERS)
def test_no_number_of_an_evaluation_stops_a_report(make_run: MakeRun, number: str) -> None:
    folder = make_run(lines=5)
    (folder / "eval" / "knn.json").write_text(
        f'{{"top1": {number}, "top5": {number}, "floors": {{"pixels": {{"top1": {number}}}}}, "k": {number}}}'
    )
    assert "</html>" in page(folder, folder)


def spoil(content: bytes, chance: random.Random) -> bytes:
    """One of the damages that disks, editors and transfers do."""
    changed = bytearray(content)
    at = chance.randrange(len(changed))
    kind = chance.randrange(5)
    if kind == 0:
        del changed[at:]
    elif kind == 1:
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == 2:
        changed[at : at + 50] = bytes(len(changed[at : at + 50]))
    elif kind == 3:
        changed[at:at] = chance.randbytes(20)
    else:
        changed[at:at] = b"[{&*a"[at % 5 : at % 5 + 1] * 3000
    return bytes(changed)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "eval/knn.json", "samples/step-00000000.png"]
)
def test_no_damage_to_a_file_stops_a_report(make_run: MakeRun, name: str, seed: int) -> None:
    folder = make_run(lines=12, samples=2)
    path = folder / name
    path.write_bytes(spoil(path.read_bytes(), random.Random(seed)))
    assert "</html>" in page(folder)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "eval/knn.json", "samples/step-00000000.png"]
)
@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link", "circle", "empty"])
def test_foreign_things_in_the_place_of_files_are_left_out(
    make_run: MakeRun, name: str, kind: str
) -> None:
    folder = make_run(lines=5, samples=2)
    path = folder / name
    path.unlink()
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "broken link": lambda: path.symlink_to("nowhere"),
        "circle": lambda: path.symlink_to(path.name),
        "empty": path.touch,
    }[kind]()
    assert "</html>" in page(folder)


def test_aliases_that_multiply_are_not_written_out(make_run: MakeRun) -> None:
    folder = make_run(lines=5)
    rows = ["a0: &a0 [x, x]"] + [
        f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)
    ]
    (folder / "config.yaml").write_text("\n".join(rows))
    text = page(folder)
    assert "config.yaml cannot be read" in text
    assert len(text) < 500_000


@pytest.mark.parametrize("text", ["[" * 900, '{"a":' * 900, "[" * 100_000])
def test_results_that_are_nested_too_deep(make_run: MakeRun, text: str) -> None:
    folder = make_run(lines=5)
    closed = text + "1" + {"[": "]", "{": "}"}[text[0]] * (len(text) if text[0] == "[" else 900)
    (folder / "eval" / "knn.json").write_text(f'{{"top1": 1.0, "how": {closed}}}')
    (folder / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": {closed}}}\n{{"step": 2, "loss": 1.0}}\n'
    )
    assert "</html>" in page(folder)


def test_letters_that_are_none_are_written_as_escapes(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(lines=5)
    (folder / "eval" / "knn.json").write_text(json.dumps({"top1": 1.0, "notes": ["\ud800"]}))
    write_report([folder], tmp_path / "report.html")
    assert "\\ud800" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("out", ["taken", "file/report.html", "file/below/report.html", "."])
def test_an_out_that_cannot_be_written_is_one_sentence(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    folder = make_run(lines=5)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"out=.* cannot be written .*; a (folder has that name|part of its path)"
    ):
        write_report([folder], out)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
