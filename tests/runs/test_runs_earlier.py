"""Unfinished runs of an earlier state of patchmine go on, export and open as they did there.

`tests/fixtures/make_earlier.py` made them and says what each holds.  On the processor that made
them, numbers and weights were equal bit for bit; here they are compared with a tolerance, because
others add in another order.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from drawn import draw_clips, draw_images
from pinned import EARLIER, command, digest_of, files_of, numbers_of, weights_of

import patchmine

TOLERANCE = 1e-5
# Sums of much that cancels: 3e-5 was seen between instruction sets, 2.05e-4 (SCFS, its eighth
# step) between an Intel Xeon and an AMD EPYC, whose products other libraries compute.
OF_GRADIENTS = 5e-4
STOPPED = ("mae", "simmim-beit", "hpm-clips", "amt", "emae", "droppos", "semaim", "scfs", "mokd")
ENCODERS = [
    (name, which)
    for name in (*STOPPED, "imported")
    for which in json.loads((EARLIER / name / "expected.json").read_bytes())["exports"]
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("elsewhere") / "images")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_clips(tmp_path_factory.mktemp("elsewhere") / "clips")


def expected_of(name: str) -> dict[str, Any]:
    expected: dict[str, Any] = json.loads((EARLIER / name / "expected.json").read_bytes())
    return expected


def copy_of(name: str, folder: Path) -> Path:
    return shutil.copytree(EARLIER / name / "run", folder / "run", symlinks=True)


def settings_of(run: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return settings


def known_then(now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """Those settings of ``now`` that there were ``then``; methods have got new ones since too."""
    method = {key: now["method"].get(key) for key in then["method"]}
    return {key: now.get(key) for key in then} | {"method": method}


def is_picture(name: str) -> bool:
    """Whether a file was drawn in training, where steps on a logarithmic axis take turns since."""
    return name.startswith("samples/")


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_of_an_earlier_version_goes_on_to_the_same_end(
    name: str, images: Path, clips: Path, tmp_path: Path
) -> None:
    run, expected = copy_of(name, tmp_path), expected_of(name)
    before = settings_of(run)
    data = clips if name.endswith("-clips") else images
    said: list[str] = []
    patchmine.resume(run, data=str(data), say=said.append)
    assert any("going on from step 4" in line for line in said), said

    numbers = numbers_of(run, after=4)
    assert numbers.keys() == expected["numbers"].keys()
    for step, pinned in expected["numbers"].items():
        for key, value in pinned.items():
            near = OF_GRADIENTS if key == "grad_norm" else TOLERANCE
            assert numbers[step][key] == pytest.approx(value, rel=near), f"{key} of step {step}"
    assert sorted(numbers_of(run)) == [str(step) for step in range(1, 9)]  # the fifth was made anew
    assert weights_of(run) == pytest.approx(expected["weights"], rel=TOLERANCE)
    found, kept = files_of(run), expected["files"]
    found.remove("origin.jsonl")  # which says how it went on; that version wrote none
    assert [name for name in found if not is_picture(name)] == [
        name for name in kept if not is_picture(name)
    ]
    assert [*filter(is_picture, kept)][-1] in found
    after = settings_of(run)
    assert after.pop("data") == str(data)
    del before["data"]
    assert known_then(after, before) == before


@pytest.mark.parametrize(("name", "which"), ENCODERS)
def test_a_checkpoint_is_exported_as_it_was(name: str, which: str, tmp_path: Path) -> None:
    run, out = copy_of(name, tmp_path), tmp_path / "export"
    command("export", str(run), f"weights={which}", f"out={out}")
    assert digest_of(out) == expected_of(name)["exports"][which]
    exported = patchmine.load_encoder(out)
    assert not exported.training
    if which in ("student", "teacher"):
        tensors = patchmine.load_encoder(run, weights=which).state_dict()
        assert tensors.keys() == exported.state_dict().keys()
        assert all(torch.equal(tensors[key], value) for key, value in exported.state_dict().items())


@pytest.mark.parametrize("name", [*STOPPED, "imported", "evaluated"])
def test_a_report_opens_the_runs_of_an_earlier_version(name: str, tmp_path: Path) -> None:
    run, page = copy_of(name, tmp_path), tmp_path / "report.html"
    command("report", str(run), f"out={page}")
    assert settings_of(run)["method"]["name"] in page.read_text(encoding="utf-8")


def test_a_report_shows_the_floors_of_an_earlier_version(tmp_path: Path) -> None:
    run, page = copy_of("evaluated", tmp_path), tmp_path / "report.html"
    result = json.loads((run / "eval" / "knn.json").read_bytes())
    command("report", str(run), f"out={page}")
    spoken = re.search(r'aria-label="([^"]*top-1[^"]*)"', page.read_text(encoding="utf-8"))
    assert spoken is not None
    shown = [float(number) for number in re.findall(r"([\d.]+) %", spoken[1])]
    scores = [result, result["floors"]["random_init"], result["floors"]["raw_pixels"]]
    assert shown == [round(each["top1"], 1) for each in scores]


def test_an_official_file_is_imported_as_it_was(tmp_path: Path) -> None:
    run, expected = tmp_path / "run", expected_of("imported")
    command("import", str(EARLIER / "imported" / "official.pth"), *expected["words"], f"out={run}")
    assert digest_of(run / "export") == expected["exports"]["student"]
    assert files_of(run) == expected["files"]
    before = settings_of(EARLIER / "imported" / "run")
    after = settings_of(run)
    del before["data"], before["out"]
    assert known_then(after, before) == before
