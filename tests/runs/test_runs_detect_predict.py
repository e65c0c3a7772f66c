"""Objects in images without annotations, as users meet them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import patchmine
from fixtures.boxes import COLOURS, write_boxes
from fixtures.detector import teach_tiny
from fixtures.label_maps import write_label_maps
from fixtures.segmenter import teach_tiny as teach_segmenter
from fixtures.small_runs import refused_prediction
from patchmine.errors import UserError
from patchmine.evaluate.rle import library
from spoken import patchmine_says

QUIET: dict[str, Any] = {"workers": 0, "device": "cpu", "say": lambda _: None}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("boxes") / "data"
    return write_boxes(root, {"train": 12, "test": 4})


@pytest.fixture(scope="module")
def taught(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    out = tmp_path_factory.mktemp("taught") / "run"
    return teach_tiny(boxes, out, steps=60, masks=True)


@pytest.fixture(scope="module")
def images(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In folders, of several sizes; the large one is six test images side by side."""
    root = tmp_path_factory.mktemp("images")
    (root / "a" / "b").mkdir(parents=True)
    pictures = [Image.open(file) for file in sorted((boxes / "test").iterdir())]
    large = Image.new("RGB", (3 * 72, 2 * 56))
    for number in range(6):
        large.paste(pictures[number % 4], (number % 3 * 72, number // 3 * 56))
    large.save(root / "a" / "b" / "large.tif")
    pictures[1].save(root / "a" / "two.png")
    pictures[2].resize((36, 28)).save(root / "small.webp", lossless=True)
    return root


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def opened(file: Path) -> Any:
    """As pycocotools opens it."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        return coco, coco.loadRes([dict(each) for each in coco.dataset["annotations"]])


def test_a_folder_of_annotations_overlays_and_a_table(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "predictions"
    words = [f"out={out}", "workers=0", "score_threshold=0.3"]
    said = patchmine_says("predict", str(taught.path), str(images), *words)
    assert "3 of 3 images" in said
    assert "a/b/large.tif has 216x112 pixels" in said
    assert "pieces of 72x72 pixels" in said
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    overlays = [f"overlays/{name}.jpg" for name in ("a/b/large", "a/two", "small")]
    assert files == ["annotations.json", "objects.csv", *overlays]
    coco, results = opened(out / "annotations.json")
    assert coco.loadCats(coco.getCatIds()) == [{"id": 4, "name": "red"}, {"id": 9, "name": "blue"}]
    names = [coco.imgs[number]["file_name"] for number in coco.getImgIds()]
    assert names == ["a/b/large.tif", "a/two.png", "small.webp"]
    assert [coco.imgs[n]["width"] for n in coco.getImgIds()] == [216, 72, 36]
    rows, every = read_csv(out / "objects.csv"), coco.loadAnns(coco.getAnnIds())
    assert len(rows) == len(every) == len(results.anns) > 2
    assert f"{len(rows)} objects" in said
    for row, told in zip(rows, every, strict=True):
        assert row["file"] == coco.imgs[told["image_id"]]["file_name"]
        assert row["class"] == coco.cats[told["category_id"]]["name"]
        assert float(row["score"]) == pytest.approx(told["score"], abs=1e-5)
        assert float(row["score"]) >= 0.3
        sides = [float(row[name]) for name in ("left", "top", "width", "height")]
        assert sides == pytest.approx(told["bbox"], abs=0.01)
        assert library().mask.decode([told["segmentation"]]).sum() == told["area"]
        assert told["iscrowd"] == 0


def test_what_is_found_is_what_was_drawn(
    taught: patchmine.Run, boxes: Path, tmp_path: Path
) -> None:
    """Boxes return to the pixels of images, and may be learned from again."""
    found = taught.predict(boxes / "test", **QUIET)
    assert found["file"] == [f"{number:03d}.png" for number in range(4)]
    hits = 0
    for file, own, names in zip(found["file"], found["boxes"], found["names"], strict=True):
        pixels = np.asarray(Image.open(boxes / "test" / file)).astype(int)
        for (left, top, right, bottom), name in zip(own.round().astype(int), names, strict=True):
            inside = pixels[top:bottom, left:right].mean((0, 1))
            hits += np.abs(inside - np.array(COLOURS[["red", "blue"].index(name)])).max() < 60
    assert hits > 4
    assert hits > 0.7 * sum(map(len, found["boxes"]))
    out = taught.predict(boxes / "test", tmp_path / "p", **QUIET)
    how = {"annotations": out / "annotations.json", "steps": 1, "batch_size": 2}
    again = teach_tiny(boxes / "test", tmp_path / "again", **how)
    assert again.config.category_ids == [4, 9]


def test_objects_are_told_from_python_too(taught: patchmine.Run, images: Path) -> None:
    found = taught.predict(images, score_threshold=0.1, **QUIET)
    assert list(found) == ["file", "boxes", "labels", "names", "scores", "masks"]
    assert found["file"] == ["a/b/large.tif", "a/two.png", "small.webp"]
    for boxes, labels, names, scores, masks in zip(*[*found.values()][1:], strict=True):
        assert boxes.shape == (len(labels), 4)
        assert [["red", "blue"][label] for label in labels] == names
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        assert len(masks) == len(labels)
    alone = taught.predict(images / "a" / "two.png", score_threshold=0.1, batch_size=1, **QUIET)
    np.testing.assert_allclose(alone["boxes"][0], found["boxes"][1], atol=1e-3)


def test_a_large_image_is_looked_at_in_pieces(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    image = images / "a" / "b" / "large.tif"
    whole = taught.predict(image, **QUIET)
    said: list[str] = []
    quiet = {**QUIET, "say": said.append}
    pieces = taught.predict(image, tile="auto", overlap=0.5, **quiet)
    assert len(pieces["boxes"][0]) > len(whole["boxes"][0])
    assert any("in pieces of 72x72 pixels" in line for line in said)
    own = taught.predict(image, tile=[56, 72], overlap=0, **quiet)
    single = [
        box
        for number in range(6)
        for box in _of_one(taught, image, number % 3 * 72, number // 3 * 56, tmp_path)
    ]
    assert len(single) == len(own["boxes"][0]) > 4


def _of_one(run: patchmine.Run, image: Path, left: int, top: int, folder: Path) -> Any:
    """What is found in one of the images that the large one is made of."""
    file = folder / "piece.png"
    Image.open(image).crop((left, top, left + 72, top + 56)).save(file)
    return run.predict(file, **QUIET)["boxes"][0]


def test_nothing_that_is_sure_enough_is_no_fault(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    words = [f"out={out}", "workers=0", "score_threshold=1"]
    said = patchmine_says("predict", str(taught.path), str(images), *words)
    assert "score_threshold=1 or more: lower it" in said
    coco = json.loads((out / "annotations.json").read_text())
    assert (len(coco["images"]), coco["annotations"]) == (3, [])
    assert read_csv(out / "objects.csv") == []
    assert (out / "objects.csv").read_text().startswith("file,class,score,left,top,width,height")
    assert len(list(out.rglob("*.jpg"))) == 3


def test_what_an_earlier_run_does_not_tell_is_done_without(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(taught.path, tmp_path / "run", symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config.pop("category_ids") == [4, 9]
    assert config.pop("usual_size") == [56, 72]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = patchmine.Run(run).predict(images, tmp_path / "p", tile="auto", **QUIET)
    coco = json.loads((out / "annotations.json").read_text())
    assert [each["id"] for each in coco["categories"]] == [1, 2]


def test_broken_images_are_left_out_up_to_a_share(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(images, tmp_path / "images")
    (data / "empty.png").write_bytes(b"")
    Image.new("RGB", (3, 50)).save(data / "tiny.png")  # smaller than a patch
    with pytest.raises(UserError, match=r"2 of 5 images .* max_bad_share"):
        taught.predict(data, tmp_path / "p", **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    out = taught.predict(data, tmp_path / "p", max_bad_share=0.5, **QUIET)
    assert len(json.loads((out / "annotations.json").read_text())["images"]) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["top=2"], "top=2 is for classes of whole images"),
        (["all=true"], "detects: leave it out"),
        (["out=p.csv"], "detects: its objects go to a folder, as out=p/"),
        (["out=full"], "out=full holds other things (kept.txt): name a new folder"),
        (["data=nowhere"], "nowhere"),
        (["score_threshold=1.5"], "score_threshold"),
        (["tile=7"], "tile=7 is smaller than a patch of 8x8 pixels"),
        (["tile=big"], "tile"),
        (["tile=auto", "overlap=1"], "overlap"),
        (["overlap=0.5"], "of use with tile=auto"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str],
    named: str,
    taught: patchmine.Run,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused_prediction(taught, images, words)


def test_settings_of_objects_are_for_runs_that_detect(images: Path, tmp_path: Path) -> None:
    maps = write_label_maps(tmp_path / "maps", {"train": 4, "test": 2})
    run = teach_segmenter(maps, tmp_path / "run", steps=1)
    for words in (["score_threshold=0.3"], ["tile=auto"]):
        said = patchmine_says("predict", str(run.path), str(images), *words, code=2)
        assert f"{words[0]} is for objects, but" in said
        assert "segments: leave it out" in said


def test_category_ids_may_be_chosen(boxes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"category_ids=\[7\]: give a different one for each"):
        teach_tiny(boxes, tmp_path / "run", category_ids=[7])
    run = teach_tiny(boxes, tmp_path / "run", steps=1, category_ids=[7, 8])
    longer = run.extend(tmp_path / "longer", steps=1, say=lambda _: None)
    assert (run.config.category_ids, longer.config.category_ids) == ([7, 8], [4, 9])
