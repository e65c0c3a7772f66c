"""COCO files: where their parts lie, what is read of them, and masks against a slow decoder."""

from __future__ import annotations

import json
import pickle
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import POLYGON, SIZE, annotation, coco, write_part
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as pycoco
from torch import Tensor

from patchmine.data.decoding.decode import decode
from patchmine.data.sources.coco import CocoImage, CocoSource, open_coco
from patchmine.data.sources.coco_masks import class_map, counts_of, masks_of, packed
from patchmine.data.sources.coco_parts import find_parts, part_of
from patchmine.errors import UserError
from patchmine.types import Objects

HEIGHT, WIDTH = SIZE
RUNS = {"size": [HEIGHT, WIDTH], "counts": [3, 5, 100, HEIGHT * WIDTH - 108]}


def slow_mask(counts: list[int], height: int, width: int) -> Tensor:
    """Pixel by pixel down the columns."""
    mask, value, pixel = torch.zeros(height, width, dtype=torch.bool), False, 0
    for count in counts:
        for _ in range(count):
            mask[pixel % height, pixel // height] = value
            pixel += 1
        value = not value
    return mask


def by_pycocotools(segmentation: Any, height: int, width: int) -> Tensor:
    runs = segmentation
    if isinstance(segmentation, list):
        runs = pycoco.merge(pycoco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = pycoco.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its arrays are of numpy 1
        return torch.from_numpy(pycoco.decode(runs)).bool()


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 81), max_size=12))
def test_run_lengths(height: int, width: int, cuts: list[int]) -> None:
    places = sorted(min(cut, height * width) for cut in cuts)
    counts = np.diff([0, *places, height * width]).tolist()
    whole = {"size": [height, width], "counts": counts}
    short = pycoco.frPyObjects(whole, height, width)["counts"].decode()
    assert counts_of(short) == counts
    masks = masks_of([packed(whole), packed({**whole, "counts": short})], height, width)
    assert masks.dtype == torch.bool
    assert torch.equal(masks[0], slow_mask(counts, height, width))
    assert torch.equal(masks[1], masks[0])


def test_polygons_are_pycocotools() -> None:
    draws = np.random.default_rng(0)
    shapes = [POLYGON, [0.3, 0.7, 29.9, 4.1, 11.1, 19.7], [-2, -3, 35, 4, 12, 25]]
    shapes += [(draws.random(2 * n) * WIDTH).round(2).tolist() for n in (3, 5, 8)]
    segmentations = [[shape] for shape in shapes] + [shapes[:2], RUNS]
    masks = masks_of([packed(each) for each in segmentations], *SIZE)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        assert torch.equal(mask, by_pycocotools(segmentation, *SIZE))
    assert masks[0].sum() == 66  # the polygon of 10.5 x 6 covers 11 columns of 6
    assert masks_of([], *SIZE).shape == (0, *SIZE)


def test_what_is_read(tmp_path: Path) -> None:
    objects = [
        annotation(5, image=2, bbox=[-0.5, 4, 10, 16.5], category_id=3),
        annotation(4, area=17.5),
        annotation(9, image=2, segmentation=RUNS, iscrowd=1),
    ]
    source = CocoSource(write_part(tmp_path, tmp_path / "a.json", coco(objects, 3)), masks=True)
    assert len(source) == 3
    assert source.names == ["blob", "cell"]  # in the order of the ids 3 and 7
    assert source.category_ids.tolist() == [3, 7]
    assert source.image(1) == CocoImage(2, "2.png", HEIGHT, WIDTH)
    assert decode(source.read(1), 3).shape == (3, *SIZE)
    first, second, negative = (source.target(index) for index in range(3))
    assert first.boxes.tolist() == [[2, 3, 12.5, 9]]
    assert second.boxes.tolist() == [[0, 4, 9.5, 20], [2, 3, 12.5, 9]]  # cut off at the border
    assert (first.labels.tolist(), second.labels.tolist()) == ([1], [0, 1])
    assert second.crowd.tolist() == [False, True]
    assert source.areas(0).tolist() == [17.5]
    assert source.areas(1).tolist() == [165, 63]
    assert torch.equal(second.masks[1], by_pycocotools(RUNS, *SIZE))
    assert (len(negative), negative.boxes.shape, negative.masks.shape) == (0, (0, 4), (0, *SIZE))
    assert first.boxes.dtype == torch.float32
    assert first.labels.dtype == torch.int64
    again = pickle.loads(pickle.dumps(source)).target(1)
    assert torch.equal(again.masks, second.masks)
    assert torch.equal(again.boxes, second.boxes)
    assert CocoSource(source.part).target(0).masks is None


def test_digests_tell_changes(tmp_path: Path) -> None:
    def opened(objects: list[dict[str, Any]], masks: bool = True, images: int = 2) -> CocoSource:
        part = write_part(tmp_path, tmp_path / "a.json", coco(objects, images))
        return CocoSource(part, masks=masks)

    base = opened([annotation(1)])
    other_mask = annotation(1, segmentation=RUNS)
    assert opened([annotation(1)]).target_digest == base.target_digest
    assert opened([other_mask]).target_digest != base.target_digest
    assert opened([other_mask]).fingerprint == base.fingerprint
    assert opened([annotation(1)], images=3).fingerprint != base.fingerprint
    boxes = opened([annotation(1)], masks=False)
    assert opened([other_mask], masks=False).target_digest == boxes.target_digest
    for change in ({"image": 2}, {"category_id": 3}, {"bbox": [2, 3, 10, 6]}, {"iscrowd": 1}):
        assert opened([annotation(1, **change)], masks=False).target_digest != boxes.target_digest


def test_files_without_an_entry_are_noted(tmp_path: Path) -> None:
    part = write_part(tmp_path / "a", tmp_path / "a.json")
    assert CocoSource(part).notes == ()
    for name in ("3.png", "4.png"):
        (part.images / name).write_bytes((part.images / "1.png").read_bytes())
    (part.images / "notes.txt").write_text("no image")
    source = CocoSource(part, "photos")
    told = f"data=photos: 2 images are not named in {part.annotations} and left out, as 3.png"
    assert source.notes == (told,)
    assert len(source) == 2


def test_file_names_may_begin_with_the_folder(tmp_path: Path) -> None:
    content = coco()
    part = write_part(tmp_path / "images", tmp_path / "annotations.json", content)
    for entry in content["images"]:
        entry["file_name"] = f"images/{entry['file_name']}"
    part.annotations.write_text(json.dumps(content))
    source = CocoSource(part)
    assert source.notes == ()
    assert source.key(0) == "images/1.png"
    assert source.read(0) == (tmp_path / "images" / "1.png").read_bytes()


LAYOUTS = {
    "annotations beside": ("train", "annotations/train.json", "train"),
    "in each part": ("train", "train/annotations.json", "train"),
    "beside images": ("train/images", "train/annotations.json", "train"),
    "of COCO": ("train2017", "annotations/instances_train2017.json", "train"),
    "of Roboflow": ("valid", "valid/_annotations.coco.json", "val"),
    "validation": ("Validation", "annotations/val.json", "val"),
    "inside images": ("images/test", "annotations/test.json", "test"),
    "at the root": ("val", "val.json", "val"),
    "whole": (".", "annotations.json", "whole"),
    "whole with images": ("images", "annotations.json", "whole"),
    "whole, instances": ("images", "annotations/instances.json", "whole"),
}


@pytest.mark.parametrize(("images", "file", "name"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(images: str, file: str, name: str, tmp_path: Path) -> None:
    part = write_part(tmp_path / images, tmp_path / file)
    assert find_parts(tmp_path) == {name: part}
    assert len(open_coco(tmp_path)[name]) == 2


def test_parts_without_annotations_are_no_parts(tmp_path: Path) -> None:
    for part in ("test", "val", "train"):
        write_part(tmp_path / part, tmp_path / "annotations" / f"{part}.json")
    (tmp_path / "annotations" / "test.json").unlink()
    assert list(find_parts(tmp_path)) == ["train", "val"]


def test_explicit_annotations(tmp_path: Path) -> None:
    part = write_part(tmp_path / "photos", tmp_path / "elsewhere" / "mine.json")
    assert find_parts(part.images, part.annotations) == {"whole": part}
    write_part(tmp_path / "data" / "val", tmp_path / "elsewhere" / "val.json")
    assert list(find_parts(tmp_path / "data", tmp_path / "elsewhere")) == ["val"]
    with pytest.raises(UserError, match=r"annotations=.*none\.json does not exist"):
        find_parts(tmp_path, tmp_path / "none.json")
    beside = write_part(tmp_path / "b" / "images", tmp_path / "b" / "mine.json")
    assert find_parts(beside.annotations) == {"whole": beside}


def test_folders_without_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        find_parts(tmp_path / "none")
    with pytest.raises(UserError, match=r"no annotations in COCO's format; give train/ and val/"):
        find_parts(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"no annotations in COCO's format \(found .*train\)"):
        find_parts(tmp_path)
    (tmp_path / "train2017").mkdir()
    with pytest.raises(UserError, match=r"train and .*train2017 may both be the train part"):
        find_parts(tmp_path)


def test_names_of_parts() -> None:
    assert [part_of(name) for name in ("Training", "valid", "testing", "val2014")] == [
        *("train", "val", "test", "val")
    ]
    assert [part_of(name) for name in ("trainer", "values", "images", "train2", "")] == [None] * 5


@pytest.mark.parametrize(
    ("categories", "told"),
    [
        ([{"id": 3, "name": "blob"}], "id 7 in .*train.json is 'cell' and in .*val.json is absent"),
        (
            [{"id": 3, "name": "blob"}, {"id": 7, "name": "nut"}],
            "id 7 in .* is 'cell' and in .* is 'nut'",
        ),
    ],
)
def test_categories_are_those_of_all_parts(
    categories: list[dict[str, Any]], told: str, tmp_path: Path
) -> None:
    write_part(tmp_path / "train", tmp_path / "train.json")
    other = coco([annotation(1, category_id=3)])
    other["categories"] = categories
    write_part(tmp_path / "val", tmp_path / "val.json", other)
    with pytest.raises(UserError, match=rf"the categories differ: category {told}"):
        open_coco(tmp_path)


def test_masks_need_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write_part(tmp_path, tmp_path / "a.json")
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert len(CocoSource(part)) == 2
    with pytest.raises(UserError, match=r"pip install 'patchmine\[det\]'"):
        CocoSource(part, masks=True)


def test_class_maps() -> None:
    masks = torch.zeros(4, 3, 4, dtype=torch.bool)
    masks[0, 0] = masks[1, :, 0] = masks[2, :2] = masks[3, 2, 3] = True
    labels, crowd = torch.tensor([0, 1, 0, 4]), torch.tensor([False, False, True, False])
    objects = Objects(torch.zeros(4, 4), labels, crowd, masks)
    expected = [[2, 1, 1, 1], [2, 255, 255, 255], [2, 0, 0, 5]]
    assert class_map(objects, 5).tolist() == expected
    assert class_map(objects.chosen(labels == 9), 5).tolist() == [[0] * 4] * 3
    assert class_map(objects, 5, ignore=-1).min() == -1
    with pytest.raises(ValueError, match="ignore=5"):
        class_map(objects, 5, ignore=5)
    with pytest.raises(ValueError, match="needs the masks"):
        class_map(Objects(torch.zeros(4, 4), labels, crowd), 5)


@pytest.fixture(scope="module")
def unpacked(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blood cells with boxes and nuclei with masks; the few images that are opened."""
    root = tmp_path_factory.mktemp("unpacked")
    for name in ("bccd", "nuclei"):
        archive = shared / "data" / f"{name}.tar.xz"
        if not archive.is_file():
            pytest.skip(f"{archive} is missing")
        with tarfile.open(archive) as members:
            members.extractall(root, filter="data")
    return root


def test_blood_cells(unpacked: Path) -> None:
    parts = open_coco(unpacked / "bccd")
    assert {name: len(source) for name, source in parts.items()} == {
        **{"train": 205, "val": 87, "test": 72}
    }
    assert parts["val"].names == ["RBC", "WBC", "Platelets"]
    assert parts["val"].target(0).boxes[0].tolist() == [260, 177, 491, 376]
    assert sum(len(parts["val"].target(index)) for index in range(87)) == 1137
    assert list(parts["test"].wrong_sizes()) == []


def test_nuclei(unpacked: Path) -> None:
    parts = open_coco(unpacked / "nuclei", masks=True)
    assert {name: len(source) for name, source in parts.items()} == {"train": 100, "val": 40}
    source = parts["val"]
    content = json.loads((unpacked / "nuclei" / "val" / "annotations.json").read_text())
    for index in (0, 17, 39):
        number, found = source.image(index).id, source.target(index)
        entries = [entry for entry in content["annotations"] if entry["image_id"] == number]
        assert len(found) == len(entries) > 0
        for mask, entry in zip(found.masks, entries, strict=True):
            runs = {**entry["segmentation"], "counts": entry["segmentation"]["counts"].encode()}
            assert torch.equal(mask, by_pycocotools(runs, 256, 256))
        assert np.array_equal(found.masks.sum((1, 2)).numpy(), source.areas(index))
