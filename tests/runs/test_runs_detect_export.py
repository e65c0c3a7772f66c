"""A run that detects leaves as a folder whose own text finds the same objects, without patchmine."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchmine
from fixtures.boxes import write_boxes
from fixtures.networks import SHORT
from fixtures.small_runs import SMALL
from patchmine.data.loader import plain_batches
from patchmine.data.sources.source import open_source
from patchmine.data.views.normalise import normalise
from patchmine.data.views.objects import PlainObjectView
from patchmine.errors import UserError
from patchmine.evaluate.found import in_image
from patchmine.runs.folder import RunFolder
from spoken import patchmine_says

VIT = {"patch_size": 8, "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
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
        {**VIT, "window": 3, "global_blocks": [1], "masks": True, "trainable": "lora:2"},
    ),
    "relative positions": ("beit_base_patch16_224", VIT),
    "resnet": (
        "resnet18",
        {
            **{"head": "vitdet", "masks": True, "anchor_scale": 4, "interpolation": "bicubic"},
            "model_args": SHORT,
        },
    ),
}
# In a new process, in which nothing but the folders and the images is at hand.
FIND = """
import json, sys, torch
folders, images = map(json.loads, sys.argv[2:])
found = {}
for kind, folder in folders.items():
    sys.path.insert(0, folder)
    sys.modules.pop("load", None)
    import load
    assert load.__file__.startswith(folder)
    assert not {"patchmine", "timm"} & set(sys.modules)
    found[kind] = [load.Detector()(load.read(file)) for file in images]
torch.save(found, sys.argv[1])
"""


@dataclass(frozen=True)
class Left:
    """A run that detects, what it finds in the images of the test, and the folder it left as."""

    run: patchmine.Run
    wanted: list[dict[str, Any]]
    folder: Path
    said: str


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


@pytest.fixture(scope="module")
def left(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Left]:
    """A run of each kind."""
    root, made = tmp_path_factory.mktemp("left"), dict[str, Left]()
    for number, (kind, (start, settings)) in enumerate(KINDS.items()):
        out = root / "runs" / str(number)
        run = patchmine.detect(start, data=data, out=out, **{**TEACH, **settings})
        said = list[str]()
        folder = run.export(root / f"away-{number}", to="torch", say=said.append)
        made[kind] = Left(run, found_by(run, data / "test"), folder, said[0])
    return made


@pytest.fixture(scope="module")
def found(
    left: dict[str, Left], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What each folder's own text finds, while the runs are not where they were."""
    root = tmp_path_factory.mktemp("found")
    folders = {kind: str(each.folder) for kind, each in left.items()}
    images = [str(path) for path in sorted((data / "test").iterdir())]
    runs = next(iter(left.values())).run.path.parent
    runs.rename(root / "gone")
    given = [str(root / "found.pt"), json.dumps(folders), json.dumps(images)]
    subprocess.run([sys.executable, "-c", FIND, *given], check=True, timeout=250, cwd=root)
    (root / "gone").rename(runs)
    return torch.load(root / "found.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_text_finds_what_the_run_finds(
    kind: str, left: dict[str, Left], found: dict[str, list[dict[str, Any]]]
) -> None:
    wanted = left[kind].wanted
    assert sum(len(each["names"]) for each in wanted) > 3
    assert "in torch.export" in left[kind].said
    for one, two in zip(found[kind], wanted, strict=True):
        assert one["names"] == two["names"]
        torch.testing.assert_close(one["boxes"], two["boxes"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(one["scores"], two["scores"], rtol=1e-5, atol=1e-5)
        assert ("masks" in one) is ("masks" in two)
        if "masks" in two:
            assert (one["masks"].numpy() == two["masks"]).mean() > 0.999


@pytest.fixture(scope="module")
def taught(left: dict[str, Left]) -> patchmine.Run:
    return left["relative positions"].run


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
