"""Images with label maps: where they are found, what their pixels mean, what is refused."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.label_maps import write_label_maps
from patchmine.data.decoding.classmap import ClassMapError, Colours, read_class_map
from patchmine.data.sources.pairs import open_pairs
from patchmine.errors import UserError


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_label_maps(tmp_path_factory.mktemp("maps"), {"train": 3, "val": 2, "test": 2})


def test_parts_lie_side_by_side(maps: Path, tmp_path: Path) -> None:
    parts = open_pairs(str(maps))
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "val": 2, "test": 2}
    train = parts["train"]
    stored = np.asarray(Image.open(maps / "train" / "labels" / "001.png"))
    assert train.key(1) == "001.jpg"
    assert np.array_equal(train.target(1), stored)
    copied = pickle.loads(pickle.dumps(train))
    assert copied.target_digest == train.target_digest
    # The other way round: images/train beside labels/train.
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            shutil.copytree(maps / part / kind, tmp_path / kind / part)
    turned = open_pairs(str(tmp_path))
    assert {name: len(part) for name, part in turned.items()} == {"train": 3, "val": 2}
    # And without parts, in two folders of any name.
    (alone,) = open_pairs(
        str(tmp_path / "images" / "val"), str(tmp_path / "labels" / "val")
    ).items()
    assert alone[0] == "all"
    assert len(alone[1]) == 2


def test_a_list_names_images_and_labels(maps: Path) -> None:
    lines = ["image,label", *(f"train/images/{n:03d}.jpg,train/labels/{n:03d}.png" for n in (2, 0))]
    (maps / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    (part,) = open_pairs(str(maps / "list.csv")).values()
    assert part.keys == ["train/images/002.jpg", "train/images/000.jpg"]
    (maps / "list.csv").write_text("train/images/000.jpg,train/labels/9.png\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1: the label map train/labels/9\.png does not"):
        open_pairs(str(maps / "list.csv"))


def test_several_folders_are_to_be_written_as_a_list(maps: Path) -> None:
    with pytest.raises(UserError, match=r"one folder or one list: write a list file with a line"):
        open_pairs([str(maps / "train"), str(maps / "test")])


def test_labels_may_add_to_the_image_name(tmp_path: Path) -> None:
    root = write_label_maps(tmp_path, {"train": 2})
    for file in (root / "train" / "labels").iterdir():
        file.rename(file.with_name(f"{file.stem}_mask.png"))
    assert open_pairs(str(root))["train"].labels_of[1].endswith("001_mask.png")
    (root / "train" / "labels" / "001_other.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"several label maps, 001_mask\.png and 001_other\.png"):
        open_pairs(str(root))


def test_an_image_without_label_map_is_named(tmp_path: Path) -> None:
    root = write_label_maps(tmp_path, {"train": 2})
    (root / "train" / "labels" / "001.png").unlink()
    with pytest.raises(UserError, match=r"001\.jpg has no label map: .* no file named 001\.png"):
        open_pairs(str(root))
    shutil.rmtree(root / "train" / "labels")
    with pytest.raises(UserError, match="has no folder labels/"):
        open_pairs(str(root))
    with pytest.raises(UserError, match=r"neither train/images .* labels=\.\.\."):
        open_pairs(str(root / "train" / "images"))


def test_other_labels_are_other_targets(tmp_path: Path) -> None:
    root = write_label_maps(tmp_path, {"train": 2})
    (before,) = open_pairs(str(root)).values()
    digest = before.target_digest
    Image.new("L", (48, 40), 1).save(root / "train" / "labels" / "000.png")
    (after,) = open_pairs(str(root)).values()
    assert before.fingerprint == after.fingerprint
    assert digest != after.target_digest


CELLS = Colours((0, 255), (0, 1), ignored=255)
ROADS = Colours(((128, 64, 128), (0, 0, 142), (0, 0, 0)), (0, 1, 255), ignored=255)


def saved(pixels: np.ndarray, file: Path) -> str:
    if file.suffix == ".npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file)
    return str(file)


def test_values_and_colours_mean_classes(tmp_path: Path) -> None:
    binary = np.array([[0, 255], [255, 0]], np.uint8)
    found = read_class_map(saved(binary, tmp_path / "binary.png"), CELLS)
    assert found.tolist() == [[0, 1], [1, 0]]
    colours = np.array([[[0, 0, 142], [128, 64, 128]], [[0, 0, 0], [0, 0, 142]]], np.uint8)
    found = read_class_map(saved(colours, tmp_path / "road.png"), ROADS)
    assert found.tolist() == [[1, 0], [255, 1]]
    deep = np.array([[1, 300], [65535, 0]], np.uint16)
    for ending in ("png", "tif", "npy"):
        assert np.array_equal(read_class_map(saved(deep, tmp_path / f"deep.{ending}")), deep)


def test_a_palette_picture_holds_its_indices(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 2], [1, 2]], np.uint8), mode="P")
    picture.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    picture.save(tmp_path / "p.png")
    assert read_class_map(str(tmp_path / "p.png")).tolist() == [[0, 2], [1, 2]]


@pytest.mark.parametrize(
    ("name", "pixels", "colours", "said"),
    [
        ("a.png", np.array([[[9, 0, 0]]], np.uint8), None, "colour picture where class numbers"),
        ("a.png", np.array([[[9, 0, 0]]], np.uint8), CELLS, "but palette gives numbers"),
        ("a.png", np.array([[7]], np.uint8), CELLS, r"1 pixels of 7, .* palette\.ignore=7"),
        ("a.png", np.array([[[9, 0, 0]]], np.uint8), ROADS, r"1 pixels of \[9, 0, 0\]"),
        ("a.jpg", np.array([[7]], np.uint8), None, "JPEG, whose compression changes"),
        ("a.npy", np.array([[0.5]]), None, "float64 of shape"),
        ("a.npy", np.array([[-1]]), None, "values from -1"),
    ],
)
def test_what_is_no_class_number_is_refused(
    name: str, pixels: np.ndarray, colours: Colours | None, said: str, tmp_path: Path
) -> None:
    file = saved(pixels, tmp_path / name)
    with pytest.raises(ClassMapError, match=said) as caught:
        read_class_map(file, colours)
    assert name in str(caught.value)


def test_a_damaged_label_map_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    saved(np.zeros((64, 64), np.uint8), file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ClassMapError, match=r"cut\.png cannot be read"):
        read_class_map(str(file))
