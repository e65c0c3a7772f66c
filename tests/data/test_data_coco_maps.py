"""COCO annotations as label maps: what becomes of objects, which layouts are found, refusals."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from coco_files import SIZE, annotation, coco, write_part

from fixtures.label_maps import write_label_maps
from patchmine.data.sources.coco_maps import coco_parts, open_coco_maps
from patchmine.data.sources.pairs import MapSource
from patchmine.errors import UserError

HEIGHT, WIDTH = SIZE
CROWD = {"size": [HEIGHT, WIDTH], "counts": [0, 4 * HEIGHT, HEIGHT * (WIDTH - 4)]}


def opened(
    root: Path, labels: str | None = None, ignored: int = 255, **how: bool
) -> dict[str, MapSource]:
    usual = {"skip_bad_objects": False, "every_fault": False}
    return open_coco_maps(coco_parts(str(root), labels), str(root), ignored, **{**usual, **how})


def written(root: Path) -> Path:
    """Two parts: three images with objects of both categories and a crowd, and two with one."""
    objects = [
        annotation(1),
        annotation(2, category_id=3, segmentation=[[10, 5, 20, 5, 20, 12, 10, 12]]),
        annotation(3, bbox=[0, 0, 4, HEIGHT], segmentation=CROWD, iscrowd=1),
    ]
    for part, content in (("train", coco(objects, images=3)), ("val", coco())):
        write_part(root / part / "images", root / part / "annotations.json", content)
    return root


def test_objects_become_classes(tmp_path: Path) -> None:
    parts = opened(written(tmp_path))
    train = parts["train"]
    assert [(name, len(part)) for name, part in parts.items()] == [("train", 3), ("val", 2)]
    assert train.names == ["background", "blob", "cell"]  # categories in the order of their ids
    labels = train.target(0)
    assert (labels.dtype, labels.shape) == (np.int32, SIZE)
    # cell at (2..12, 3..9), blob over it from column 10, the crowd where nothing else is
    assert (labels[4, 5], labels[7, 11], labels[10, 15], labels[15, 25]) == (2, 1, 1, 0)
    assert (labels[0, 0], labels[4, 3], labels[15, 3]) == (255, 2, 255)
    assert not train.target(1).any()
    assert "annotations.json (image 1)" in train.target_name(0)


def test_some_of_them_are_chosen(tmp_path: Path) -> None:
    train = opened(written(tmp_path))["train"]
    some = train.chosen(np.array([2, 0])).chosen(np.array([1, 0]))
    assert [some.key(index) for index in range(len(some))] == ["1.png", "3.png"]
    assert np.array_equal(some.target(0), train.target(0))
    assert some.fingerprint != train.fingerprint
    assert some.target_digest != train.target_digest
    copied = pickle.loads(pickle.dumps(some))
    assert (copied.fingerprint, copied.target_digest) == (some.fingerprint, some.target_digest)
    assert opened(tmp_path, ignored=9)["train"].target_digest != train.target_digest


def test_a_file_may_be_named(tmp_path: Path) -> None:
    part = write_part(tmp_path / "photos", tmp_path / "instances.json")
    assert list(opened(part.images, str(part.annotations))) == ["all"]
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        coco_parts(str(part.images), str(tmp_path / "none.json"))


def test_label_maps_are_no_coco_files(tmp_path: Path) -> None:
    maps = write_label_maps(tmp_path, {"train": 1, "test": 1})
    assert coco_parts(str(maps), None) == {}
    assert coco_parts(str(maps / "list.csv"), None) == {}
    assert coco_parts(str(written(tmp_path / "both") / "train"), "labels") == {}


def test_an_ignored_class_and_faults_are_refused(tmp_path: Path) -> None:
    root = written(tmp_path)
    with pytest.raises(UserError, match=r"ignore_index=2 is the number of a class.*index=255"):
        opened(root, ignored=2)
    wrong = coco([annotation(n, segmentation=[[1, 1, 2, 2]]) for n in range(1, 9)])
    write_part(root / "val" / "images", root / "val" / "annotations.json", wrong)
    with pytest.raises(UserError, match="and 3 more"):
        opened(root)
    with pytest.raises(UserError, match="8 faults"):
        opened(root, every_fault=True)
    assert len(opened(root, skip_bad_objects=True)["val"]) == 2
