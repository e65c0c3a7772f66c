"""The notebook of the documentation does what it says, with fewer steps."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

FEW = "steps, finetune_steps = 4, 4"


@pytest.fixture(scope="module")
def cells(repository: Path) -> list[dict[str, Any]]:
    """Those of the notebook."""
    text = (repository / "docs" / "first-hour.ipynb").read_text(encoding="utf-8")
    every: list[dict[str, Any]] = json.loads(text)["cells"]
    return every


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_is_small_and_takes_only_what_is_public(cells: list[dict[str, Any]]) -> None:
    assert len(json.dumps(cells)) < 100_000
    for cell in cells:
        if cell["cell_type"] == "code":
            nodes = ast.walk(ast.parse(source(cell)))
            modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
            assert not [name for name in modules if name and name.startswith("patchmine")]


@pytest.mark.slow
def test_from_a_folder_to_a_classifier(
    cells: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed (pip install '.[demo]')")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(source(cell), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(FEW, names)
    assert names["run"].metrics()[-1]["step"] == names["settings"]["steps"] == 4
    assert {"random_init", "raw_pixels"} <= names["knn"]["baselines"].keys()
    assert len(names["predictions"]["class"]) == len(names["right"]) == 900
    assert names["newest"].is_file()
    assert (tmp_path / "report.html").read_text().startswith("<!")
    assert names["classifier"](names["images"]).shape == (2, 15)
