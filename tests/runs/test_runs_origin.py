"""What a run notes of how and where it is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import patchmine
from fixtures.small_runs import DECODER, SMALL, VIT
from patchmine.report.overview import made_of
from patchmine.report.page import write_report
from patchmine.report.reading import read_run
from patchmine.training.origin import CODE, fingerprints_of_code

SETTINGS = {**VIT, **DECODER, **SMALL, "steps": 4, "checkpoint_every": 2}


def noted(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "origin.jsonl").read_text().splitlines()]


def test_a_command_and_where_it_runs_are_noted_and_shown(
    image_folder: Path, tmp_path: Path
) -> None:
    given = {**SETTINGS, "data": image_folder, "out": tmp_path / "run"}
    words = [f"{name}={value}" for name, value in given.items() if name != "say"]
    program = [sys.executable, "-m", "patchmine", "pretrain", *words]
    subprocess.run(program, check=True, capture_output=True, timeout=250)
    (line,) = noted(tmp_path / "run")
    assert line["step"] == 0
    assert line["images"] == len(list(image_folder.rglob("*.*")))
    assert line["patchmine"] == patchmine.__version__
    assert line["command"].startswith("patchmine pretrain model=vit_tiny_patch16_224 ")
    assert line["device"]
    (tmp_path / "run/bad_files.txt").write_text("a.png\tbroken\nb.png\tbroken\n")
    record = read_run(tmp_path / "run", "run")
    made = made_of(record)
    assert made["patchmine"].startswith(patchmine.__version__)
    assert made["images"] == str(line["images"])
    assert made["broken images left out"] == "2"
    page = write_report([tmp_path / "run"], tmp_path / "x.html").read_text()
    assert "<dd><code>patchmine pretrain model=vit_tiny_patch16_224 " in page
    assert record.is_finished


def test_a_run_that_goes_on_adds_a_line_and_one_that_begins_anew_has_one(
    image_folder: Path, tmp_path: Path
) -> None:
    run = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **SETTINGS)
    (first,) = noted(run.path)
    assert first["command"] is None  # a test, not a command
    for file in (run.path / "checkpoints").glob("*4*"):
        file.unlink()
    patchmine.resume(run.path, say=lambda _: None)
    assert [line["step"] for line in noted(run.path)] == [0, 2]
    for file in (run.path / "checkpoints").iterdir():
        file.unlink()
    patchmine.resume(run.path, say=lambda _: None)
    assert [line["step"] for line in noted(run.path)] == [0]


def test_an_edited_line_of_code_changes_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    for name in ("__init__.py", "ops/losses.py"):
        (tmp_path / name).write_text("x = 1\n")
    before = fingerprints_of_code(tmp_path)
    assert before == fingerprints_of_code(tmp_path)
    (tmp_path / "ops/losses.py").write_text("x = 2\n")
    after = fingerprints_of_code(tmp_path)
    assert fingerprints_of_code()[CODE] not in (before[CODE], after[CODE])
    assert {name for name, value in after.items() if before[name] != value} == {CODE}
    assert before["torch"].startswith(torch.__version__.partition("+")[0])


def test_a_run_without_notes_or_with_damaged_ones_is_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    assert made_of(read_run(tmp_path, "run")) == {}
    for text in ("", "{", "[]\n3\n", '{"images": "many"}\n', '{"device": [1, {"x": null}]}\n'):
        (tmp_path / "origin.jsonl").write_text(text)
        assert "</html>" in write_report([tmp_path], tmp_path / "x.html").read_text()
