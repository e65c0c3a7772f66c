"""A run that segments leaves whole: as one ONNX file, and as one that torch alone opens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchmine
from fixtures.segmenter import draw_maps, teach_tiny
from patchmine.runs.folder import RunFolder
from spoken import patchmine_says

NAMES = ["ground", "tree", "sea"]
SIZE = (3, 24, 24)
BY_TORCH_ALONE = """
import sys, numpy, torch
told = {"network.json": ""}
network = torch.export.load(sys.argv[1], extra_files=told).module()
with torch.no_grad():
    numpy.save(sys.argv[3], network(torch.from_numpy(numpy.load(sys.argv[2]))))
print(told["network.json"])
assert not {"patchmine", "timm"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    root = tmp_path_factory.mktemp("taught")
    settings = dict(head="dpt", head_width=16, short_side=30, steps=4, test_stride=10)
    return teach_tiny(draw_maps(root / "maps"), root / "run", classes=NAMES, **settings)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def wanted(taught: patchmine.Run, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return RunFolder(taught.path).segmenter().network().eval()(images)


def assert_told(told: Any) -> None:
    assert (told["architecture"], told["interpolation"]) == ("vit_tiny_patch16_224", "bilinear")
    assert (told["class_names"], told["image_size"]) == (NAMES, [24, 24])
    assert (told["test_stride"], told["short_side"], told["palette"]) == (10, 30, {})
    assert (told["loss"], told["head"]) == ("ce", "dpt")
    assert [len(told["mean"]), len(told["std"])] == [3, 3]
    assert "crop_pct" not in told  # images are seen whole


def test_onnxruntime_gives_its_scores(
    taught: patchmine.Run, images: torch.Tensor, wanted: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="`export` is not installed")
    file = tmp_path / "x.onnx"
    said = patchmine_says("export", str(taught.path), "to=onnx", f"out={file}")
    assert "scores in onnxruntime" in said
    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_outputs()
    assert (given.name, given.shape) == ("scores", ["batch", 3, 24, 24])
    (found,) = session.run(["scores"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    plain = {"architecture", "interpolation", "loss", "head"}
    assert_told({k: text if k in plain else json.loads(text) for k, text in told.items()})


def test_torch_alone_gives_its_scores(
    taught: patchmine.Run, images: torch.Tensor, wanted: torch.Tensor, tmp_path: Path
) -> None:
    file = taught.export(to="torch", say=lambda _: None)
    assert file == taught.path / "export.pt2"
    np.save(tmp_path / "images.npy", images)
    names = [file, tmp_path / "images.npy", tmp_path / "scores.npy"]
    program = [sys.executable, "-c", BY_TORCH_ALONE, *map(str, names)]
    ended = subprocess.run(program, check=True, capture_output=True, text=True, timeout=250)
    torch.testing.assert_close(torch.from_numpy(np.load(names[2])), wanted)
    assert_told(json.loads(ended.stdout))


def test_its_encoder_leaves_alone_where_that_is_asked_for(
    taught: patchmine.Run, images: torch.Tensor, tmp_path: Path
) -> None:
    said = list[str]()
    file = taught.export(tmp_path / "x.pt2", to="torch", what="encoder", say=said.append)
    assert "features in torch.export" in said[0]
    with torch.no_grad():
        found = torch.export.load(file).module()(images)
        torch.testing.assert_close(found, taught.encoder()(images))
    folder = taught.export(tmp_path / "timm")
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 0
    with pytest.raises(patchmine.UserError, match=r"what=full .* learned to segment: leave the"):
        taught.export(what="full")
