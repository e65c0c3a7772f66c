"""Detection from a backbone to a tested run, as users meet it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import patchmine
from fixtures.boxes import write_boxes
from fixtures.detector import MODEL, TEACH, teach
from fixtures.small_runs import DECODER, SMALL, assert_near, made_by_two
from patchmine.errors import UserError
from patchmine.runs import checking
from patchmine.runs.folder import RunFolder
from patchmine.train.checkpoint import load
from spoken import patchmine_says

PRETRAIN: dict[str, Any] = {"model": "vit_tiny_patch16_224", "blr": 1e-2, **MODEL, **SMALL}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(
        tmp_path_factory.mktemp("boxes") / "data", {"train": 12, "val": 3, "test": 4}
    )


@pytest.fixture(scope="module")
def backbone(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "mae"
    return patchmine.pretrain(
        data=boxes / "train", out=out, steps=2, batch_size=4, **PRETRAIN, **DECODER
    ).path


@pytest.fixture(scope="module")
def taught(backbone: Path, boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    out = tmp_path_factory.mktemp("taught") / "run"
    return teach(backbone, boxes, out, steps=60, masks=True, eval_every=10)


def test_a_run_is_tested_on_whole_images(taught: patchmine.Run, backbone: Path) -> None:
    result = json.loads((taught.eval_dir / "test.json").read_text())
    assert result["protocol"] == "detect"
    assert result["classes"] == ["red", "blue"]
    assert set(result["per_class"]) == {"red", "blue"}
    assert result["map50"] > 30
    assert result["mask_map50"] > 30
    assert {"map", "map75", "mask_map", "mask_map75"} <= set(result)
    assert result["images"]["test"] == 4
    assert result["chosen_by"] == "validation on 3 images"
    exported = timm.create_model(f"local-dir:{taught.export_dir}", pretrained=True)
    weight = taught.encoder().blocks[0].attn.qkv.weight
    assert torch.equal(exported.blocks[0].attn.qkv.weight, weight)
    assert not torch.equal(RunFolder(backbone).encoder().blocks[0].attn.qkv.weight, weight)
    best = max(line["eval"]["map"] for line in taught.metrics() if "eval" in line)
    assert load((taught.checkpoint_dir / "best").resolve()).facts["best"]["score"] == best
    assert taught.detector().names == ["red", "blue"]


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "vitdet", "masks": True, "window": 3, "global_blocks": [3]},
        {"trainable": "none", "window": 0, "share": "50%"},
        {"trainable": "lora:2"},
        {"model": "resnet18", "image_size": 64, "patch_size": None, "model_args": {}},
    ],
)
def test_heads_and_backbones(
    settings: dict[str, Any], backbone: Path, boxes: Path, tmp_path: Path
) -> None:
    start = settings.get("model", backbone)
    run = teach(start, boxes, tmp_path / "run", steps=1, log_every=1, **settings)
    first = next(line for line in run.metrics() if "loss" in line)
    terms = ["proposal", "proposal_box", "class", "box"] + ["mask"] * ("masks" in settings)
    assert first["loss"] == pytest.approx(sum(first[term] for term in terms), rel=1e-4)
    result = json.loads((run.eval_dir / "test.json").read_text())
    assert 0 <= result["map"] <= 100
    assert ("mask_map" in result) is ("masks" in settings)
    assert result["images"]["train"] == (6 if "share" in settings else 12)
    if start == backbone:
        before = RunFolder(backbone).encoder().blocks[0].attn.qkv.weight
        after = run.encoder().blocks[0].attn.qkv.weight
        assert torch.equal(before, after) is (settings.get("trainable") == "none")


def test_resumed_in_mid_epoch_with_workers_it_is_the_same(
    backbone: Path, boxes: Path, tmp_path: Path, weights: Any
) -> None:
    settings = dict(steps=4, checkpoint_every=2, drop_path=0.3, window=4, global_blocks=[3])
    whole = teach(backbone, boxes, tmp_path / "whole", **settings, masks=True, keep_checkpoints=9)
    cut = shutil.copytree(whole.path, tmp_path / "cut")
    for file in (*cut.glob("checkpoints/*4*"), cut / "eval" / "test.json"):
        file.unlink()
    (cut / "checkpoints" / "last").unlink()
    patchmine.resume(cut, workers=1, say=lambda _: None)
    first, second = weights(whole), weights(cut)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (cut / "eval" / "test.json").read_text() == (whole.eval_dir / "test.json").read_text()


def test_a_run_is_extended(taught: patchmine.Run, tmp_path: Path) -> None:
    longer = taught.extend(tmp_path / "longer", steps=1, say=lambda _: None)
    assert longer.config.kind == "detect"
    assert longer.metrics()[-1]["step"] == 1


def test_data_may_lie_in_files_and_folders_of_their_own(
    backbone: Path, boxes: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(boxes, tmp_path / "data")
    file = (data / "annotations" / "train.json").rename(tmp_path / "objects.json")
    held_out = (data / "test").rename(tmp_path / "held_out")
    shutil.move(data / "annotations" / "test.json", held_out / "annotations.json")
    words = [str(backbone), f"data={data / 'train'}", f"annotations={file}", "check=true"]
    words += [f"out={tmp_path / 'run'}", "image_size=64"]
    said = patchmine_says("detect", *words)
    assert "the last fifth of the list is tested on (10 images to train on, 2 to test)" in said
    said = patchmine_says("detect", *words, f"test={held_out}", "val_share=0.25")
    assert "images: 9 with 18 objects for train, 3 with 6 objects for val, 4 with" in said
    said = patchmine_says("detect", *words, f"val={held_out}", f"test={data}")
    assert "4 with 8 objects for val, 3 with 6 objects for test" in said


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_a_check_lists_all_that_is_wrong(backbone: Path, boxes: Path, tmp_path: Path) -> None:
    data = shutil.copytree(boxes, tmp_path / "data")
    words = [str(backbone), f"data={data}", f"out={tmp_path / 'run'}", "workers=0"]
    said = patchmine_says("detect", *words, "check=true")
    assert "2 classes; images: 12 with 24 objects for train, 3 with 6 objects for val" in said

    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [5, 5, 0, 4]
        content["annotations"][1]["category_id"] = 77

    changed(data / "annotations" / "train.json", spoil)
    Image.new("RGB", (7, 9)).save(data / "val" / "000.png")
    (data / "test" / "001.png").unlink()
    said = patchmine_says("detect", *words, "check=true", code=2)
    for told in ("4 faults", "bbox", "77", "000.png has 7x9 pixels", "001.png"):
        assert told in said
    said = patchmine_says("detect", *words, "check=true", "skip_bad_objects=true", code=2)
    assert "2 faults" in said
    assert "77" not in said
    assert not (tmp_path / "run").exists()
    said = patchmine_says("detect", *words, code=2)
    assert "77" in said
    assert "skip_bad_objects=true leaves such annotations out" in said


def test_classes_and_objects_that_are_not_there(
    backbone: Path, boxes: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(boxes, tmp_path / "data")
    words = [str(backbone), f"data={data}", f"out={tmp_path / 'run'}", "check=true"]
    said = patchmine_says("detect", *words, "classes=[red,green]", code=2)
    assert "classes=['red', 'green'], but the categories of" in said

    def crowd(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["iscrowd"] = 1

    changed(data / "annotations" / "val.json", crowd)
    said = patchmine_says("detect", *words, code=2)
    assert "the 3 images of" in said
    assert "to choose the best checkpoint by have no object" in said
    change = {"categories": [{"id": 4, "name": "red"}, {"id": 9, "name": "green"}]}
    changed(data / "annotations" / "val.json", lambda content: content.update(change))
    assert "the categories differ: category id 9" in patchmine_says("detect", *words, code=2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["head=pyramid"], "head"),
        (["image_size=30"], "image_size"),
        (["patch_size=5", "image_size=60"], "patches of 5x5 pixels"),
        (["window=-1"], "window"),
        (["window=4", "global_blocks=[9]"], "global_blocks=9, but the model has blocks 0 to 3"),
        (["global_blocks=[1]"], "global_blocks"),
        (["samples=60"], "samples: given 60; must not be above proposals=50"),
        (["scale=[2,1]"], "scale"),
        (["annotations=missing.json"], "annotations"),
        (["val_share=0.5"], "val_share=0.5, but"),
        (["share=1%"], "share=1% of 12 images is none"),
        (["test=[a,b]"], "one folder or COCO file"),
        (["model=video_vit_small_patch16"], "reads videos"),
        (["mixup=1"], "mixup"),
        (["data=missing"], "there is no such file or folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str], named: str, backbone: Path, boxes: Path, tmp_path: Path
) -> None:
    given = [f"data={boxes}", f"out={tmp_path / 'run'}", "workers=0", "proposals=50", "samples=9"]
    said = patchmine_says("detect", str(backbone), *given, *words, code=2)
    assert named in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_patience_needs_something_to_wait_for(backbone: Path, boxes: Path, tmp_path: Path) -> None:
    words = [f"data={boxes / 'train'}", f"annotations={boxes / 'annotations' / 'train.json'}"]
    words += [f"out={tmp_path / 'run'}", "patience=2", "check=true"]
    said = patchmine_says("detect", str(backbone), *words, code=2)
    assert "patience=2, but there is nothing to validate on" in said


def test_what_is_not_installed_is_told_first(
    backbone: Path, boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = checking.importlib.util.find_spec
    monkeypatch.setattr(
        checking.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "faster_coco_eval" else find(name, *rest),
    )
    with pytest.raises(UserError, match=r"faster_coco_eval.*pip install patchmine\[det\]"):
        teach(backbone, boxes, tmp_path / "run")


def test_a_run_of_another_kind_says_so(
    taught: patchmine.Run, backbone: Path, boxes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="learned to detect and knows no classes of images"):
        taught.classify()
    with pytest.raises(UserError, match="was pre-trained and knows no objects"):
        RunFolder(backbone).detector()
    with pytest.raises(UserError, match=r"kind=detect.*no pre-training method"):
        taught.method()
    image = boxes / "test" / "000.png"
    said = patchmine_says("show", str(taught.path), str(image), code=2)
    assert "learned to detect, and show draws what pre-training does: `patchmine predict" in said
    said = patchmine_says("predict", str(taught.export_dir), str(image), code=2)
    assert "a run that segments or detects is given itself" in said
    words = [str(taught.path / "config.yaml"), f"out={tmp_path / 'other'}"]
    said = patchmine_says("pretrain", *words, code=2)
    assert "kind=detect: these settings are for another kind of run" in said
    again = patchmine_says(
        "detect", str(taught.path), f"data={boxes}", f"out={tmp_path / 'run'}", "check=true"
    )
    assert "fit" in again  # and yet serves as a start


@pytest.mark.slow
def test_two_processes_give_what_one_gives(backbone: Path, boxes: Path, tmp_path: Path) -> None:
    settings = dict(steps=3, masks=True, drop_path=0.2, blr=1e-2)
    one = teach(backbone, boxes, tmp_path / "one", **settings)
    two = made_by_two("detect", backbone, boxes, tmp_path / "two", {**TEACH, **settings})
    assert_near(one, two, rtol=1e-3)
    scores = [json.loads((run.eval_dir / "test.json").read_text())["map"] for run in (one, two)]
    assert scores[0] == pytest.approx(scores[1], abs=0.2)
    last = [[line["loss"] for line in run.metrics() if "loss" in line] for run in (one, two)]
    assert np.allclose(*last, rtol=1e-4)
