"""A run that detects leaves as a folder whose own text finds the same objects, without patchmine."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchmine
from fixtures.boxes import write_boxes
from fixtures.small_runs import SMALL
from patchmine.data.loader import plain_batches
from patchmine.data.sources.source import open_source
from patchmine.data.views.normalise import normalise
from patchmine.data.views.objects import PlainObjectView
from patchmine.errors import UserError
from patchmine.evaluate.found import in_image
from patchmine.runs.folder import RunFolder
from spoken import patchmine_says

VIT = {"patch_size": 8, "model_args": {"embed_dim": 32, "depth": 4, "num_heads": 2}}
TEACH: dict[str, Any] = {
    "image_size": [64, 96],
    "batch_size": 4,
    "steps": 4,
    "width": 16,
    "proposals": 50,
    "samples": 32,
    "score_threshold": 0.3,
    **SMALL,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows and masks": (
        "vit_tiny_patch16_224",
        {**VIT, "window": 3, "global_blocks": [3], "masks": True, "trainable": "lora:2"},
    ),
    "relative positions": ("beit_base_patch16_224", VIT),
    "resnet": (
        "resnet18",
        {"head": "vitdet", "masks": True, "anchor_scale": 4, "interpolation": "bicubic"},
    ),
}
# In a new process, in which nothing but the folder and an image is at hand.
FIND = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import load
assert not {"patchmine", "timm"} & set(sys.modules)
torch.save([load.Detector()(load.read(file)) for file in sys.argv[3:]], sys.argv[2])
"""


def found_by(run: patchmine.Run, folder: Path) -> list[dict[str, Any]]:
    """What the run's own network finds in the images of a folder, in their pixels."""
    task, config = RunFolder(run.path).detector(), run.config
    view = PlainObjectView(config, config.interpolation)
    objects = []
    for batch in plain_batches(open_source(str(folder)), view, batch_size=1):
        ready = normalise(batch, torch.tensor(config.mean), torch.tensor(config.std), "cpu")
        ((one,), (height, width)) = task.predict(ready), (56, 72)
        kept = in_image(one, ready.views[0][0], batch.box[0], (height, width))
        names = [config.classes[label] for label in kept.labels]
        objects.append({"boxes": kept.boxes, "names": names, "scores": kept.scores})
        if kept.masks is not None:
            from faster_coco_eval import mask

            objects[-1]["masks"] = np.array([mask.decode(each) for each in kept.masks], bool)
    return objects


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("boxes") / "data", {"train": 8, "val": 2, "test": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_text_finds_what_the_run_finds(kind: str, data: Path, tmp_path: Path) -> None:
    start, settings = KINDS[kind]
    given = {**TEACH, **settings}
    run = patchmine.detect(start, data=data, out=tmp_path / "run", **given)
    wanted = found_by(run, data / "test")
    assert sum(len(each["names"]) for each in wanted) > 3
    said = list[str]()
    folder = run.export(tmp_path / "away", to="torch", say=said.append)
    assert "in torch.export" in said[0]
    run.path.rename(tmp_path / "gone")
    images = sorted((data / "test").iterdir())
    program = [sys.executable, "-c", FIND, folder, tmp_path / "found.pt", *images]
    subprocess.run(program, check=True, timeout=250, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt")
    for one, two in zip(found, wanted, strict=True):
        assert one["names"] == two["names"]
        torch.testing.assert_close(one["boxes"], two["boxes"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(one["scores"], two["scores"], rtol=1e-5, atol=1e-5)
        assert ("masks" in one) is ("masks" in two)
        if "masks" in two:
            assert (one["masks"].numpy() == two["masks"]).mean() > 0.999


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    start, settings = KINDS["relative positions"]
    return patchmine.detect(
        start, data=data, out=tmp_path_factory.mktemp("taught") / "run", **{**TEACH, **settings}
    )


def test_the_folder_says_what_it_is(
    taught: patchmine.Run,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = patchmine_says("export", str(taught.path), "to=torch")
    folder = taught.path / "detector"
    assert str(folder) in said
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "load.py",
        "maps.pt2",
        "model.safetensors",
    }
    told = json.loads((folder / "config.json").read_text())
    assert (told["class_names"], told["image_size"]) == (["red", "blue"], [64, 96])
    weights, encoder = load_file(folder / "model.safetensors"), taught.encoder()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(weights[f"encoder.{name}"], tensor)
    assert (folder / "maps.pt2").stat().st_size < sum(each.nbytes for each in weights.values())
    image = data / "test" / "000.png"
    monkeypatch.setattr(sys, "argv", ["load.py", str(image)])
    runpy.run_path(str(folder / "load.py"), run_name="__main__")
    line = capsys.readouterr().out.splitlines()[0].split()
    assert (line[0], line[1] in told["class_names"], len(line)) == (str(image), True, 7)
    again = taught.export(to="torch", say=lambda _: None)  # replaces the older one
    assert load_file(again / "model.safetensors").keys() == weights.keys()


def test_what_does_not_fit_is_told(taught: patchmine.Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"to=onnx: .* learned to detect.*to=torch writes a folder"):
        taught.export(tmp_path / "x.onnx", to="onnx")
    with pytest.raises(UserError, match=r"writes a folder; write for example out=.*/x$"):
        taught.export(tmp_path / "x.pt2", to="torch")
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match=r"holds other things .* \(such as notes.txt\)"):
        taught.export(tmp_path, to="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    file = taught.export(tmp_path / "encoder.pt2", to="torch", what="encoder", say=lambda _: None)
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(file).module()(images), taught.encoder()(images)
        )
    with pytest.raises(UserError, match=r"out=.*enc: to=torch writes one file; .*enc.pt2"):
        taught.export(tmp_path / "enc", to="torch", what="encoder")
