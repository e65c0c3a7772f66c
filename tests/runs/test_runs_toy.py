"""The method that CONTRIBUTING shows, in a file outside of the package, does all that others do."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import patchmine
from patchmine.methods import METHODS


@pytest.fixture
def toy(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "toy.py" in b)
    (tmp_path / "toy.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)  # other tests have one of their own
    monkeypatch.setitem(METHODS, "toy", METHODS["mae"])  # taken out again when the test ends
    monkeypatch.setitem(sys.modules, "toy", importlib.import_module("toy"))


def test_a_method_from_elsewhere_trains_resumes_shows_reports_and_exports(
    toy: None,  # noqa: ARG001
    image_folder: Path,
    tmp_path: Path,
) -> None:
    images = sorted(image_folder.rglob("*.jpg"))
    run = patchmine.pretrain(
        data=image_folder,
        method={"name": "toy", "weight": 2.0},
        model="vit_tiny_patch16_224",
        model_args={"depth": 1, "embed_dim": 32, "num_heads": 2},
        image_size=32,
        patch_size=8,
        batch_size=4,
        steps=3,
        warmup_epochs=0,
        workers=0,
        device="cpu",
        tensorboard=False,
        out=tmp_path / "run",
        say=lambda _: None,
    )
    assert run.metrics()[-1]["step"] == 3
    assert run.method().config.weight == 2.0
    assert patchmine.resume(run.path, workers=0, say=lambda _: None).checkpoints
    assert run.show(images[0], tmp_path / "panel.png").is_file()
    assert run.report(tmp_path / "report.html").is_file()
    exported = patchmine.load_encoder(run.export(tmp_path / "export"))
    pixels = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(exported(pixels), run.encoder()(pixels))
