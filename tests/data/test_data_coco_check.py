"""Everything that can be wrong with a COCO file is one sentence with file, entry and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco_files import POLYGON, SIZE, annotation, coco, write_part
from PIL import Image

from patchmine.data.sources.coco import CocoSource, faults_of_part
from patchmine.data.sources.coco_check import faults_of, read_coco
from patchmine.data.sources.coco_parts import Part
from patchmine.errors import UserError

HEIGHT, WIDTH = SIZE
RUNS = {"size": [HEIGHT, WIDTH], "counts": [0, 5, HEIGHT * WIDTH - 5]}


def faults(content: Any) -> list[str]:
    return [str(fault) for fault in faults_of(content, "val.json", masks=True)]


def test_a_sound_file_has_no_faults() -> None:
    sound = [
        annotation(1),
        annotation(2, bbox=[-1, -0.5, WIDTH + 1.5, HEIGHT + 1]),  # a pixel of rounding
        annotation(3, segmentation=RUNS, iscrowd=1),
        annotation(4, segmentation={"size": [HEIGHT, WIDTH], "counts": "05cb0"}),
        annotation(5, segmentation=[POLYGON, [1, 1, 4, 1, 4, 5]], category_id=3),
    ]
    assert faults(coco(sound)) == []


BOXES = {
    "zero width": ([2, 3, 0, 5], "has no area"),
    "negative height": ([2, 3, 5, -1], "has no area"),
    "outside": ([WIDTH, 3, 5, 5], "lies outside the image of 30x20 pixels"),
    "left of it": ([-9, 3, 5, 5], "lies outside the image"),
    "beyond": ([25, 3, 7.5, 5], "reaches 2.5 pixels beyond"),
    "NaN": ([2, float("nan"), 5, 5], "four finite numbers"),
    "infinite": ([2, 3, float("inf"), 5], "four finite numbers"),
    "three numbers": ([2, 3, 5], "four finite numbers"),
    "text": (["2", 3, 5, 5], "four finite numbers"),
    "none": (None, "has the bbox null"),
}


@pytest.mark.parametrize(("box", "told"), BOXES.values(), ids=BOXES)
def test_boxes(box: Any, told: str) -> None:
    (fault,) = faults(coco([annotation(1), annotation(42, bbox=box)]))
    assert fault.startswith("val.json: annotations[1] (id 42) has the bbox")
    assert told in fault


SEGMENTATIONS = {
    "two points": ([[1, 1, 4, 5]], "of 2 points: a polygon has at least 3"),
    "odd": ([[1, 1, 4, 1, 4, 5, 2]], "of 7 coordinates"),
    "second polygon": ([POLYGON, []], "segmentation[1] of 0 points"),
    "flat": (POLYGON, "it must be finite numbers"),
    "NaN": ([[1, 1, 4, 1, 4, float("nan")]], "it must be finite numbers"),
    "far away": ([[1, 1, 4, 1, 4, 1e8]], "far outside the image"),
    "other size": ({**RUNS, "size": [WIDTH, HEIGHT]}, "[height, width] = [20, 30]"),
    "no size": ({"counts": RUNS["counts"]}, "of size null"),
    "sum": ({**RUNS, "counts": [0, 5, 7]}, "sum to 12, not to 20 x 30"),
    "negative": ({**RUNS, "counts": [-5, 605]}, "damaged counts"),
    "compressed sum": ({**RUNS, "counts": "05eb0"}, "not to 20 x 30"),
    "unfinished": ({**RUNS, "counts": "05c"}, "damaged counts"),
    "strange letters": ({**RUNS, "counts": "0 é"}, "damaged counts"),
    "none": (None, "set masks=false"),
    "empty": ([], "set masks=false"),
}


@pytest.mark.parametrize(("segmentation", "told"), SEGMENTATIONS.values(), ids=SEGMENTATIONS)
def test_segmentations(segmentation: Any, told: str) -> None:
    content = coco([annotation(1), annotation(42, segmentation=segmentation)])
    found = faults(content)
    assert len(found) == (len(POLYGON) if segmentation is POLYGON else 1)
    assert found[0].startswith("val.json: annotations[1] (id 42) has ")
    assert told in found[0]
    assert not list(faults_of(content, "val.json", masks=False))


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = coco()
    change(content)
    return content


ENTRIES = {
    "category": (
        lambda c: c["annotations"][0].update(category_id=5),
        "annotations[0] (id 1) is of category_id 5, which the file does not define",
    ),
    "image": (
        lambda c: c["annotations"][0].update(image_id=9),
        "annotations[0] (id 1) is of image_id 9, which no entry of images has",
    ),
    "unhashable image": (
        lambda c: c["annotations"][0].update(image_id=[1]),
        "annotations[0] (id 1) is of image_id [1]",
    ),
    "crowd": (
        lambda c: c["annotations"][0].update(iscrowd=[1]),
        "annotations[0] (id 1) has iscrowd [1]: it must be 0 or 1",
    ),
    "annotation twice": (
        lambda c: c["annotations"].append(annotation(1)),
        "annotations[1] (id 1) has the id of annotations[0]",
    ),
    "annotation without id": (
        lambda c: c["annotations"][0].pop("id"),
        "annotations[0] has no whole number as its id",
    ),
    "image twice": (
        lambda c: c["images"][1].update(id=1),
        "images[1] (id 1) has the id of images[0]",
    ),
    "file twice": (
        lambda c: c["images"][1].update(file_name="1.png"),
        "images[1] (id 2) names 1.png, as images[0] does",
    ),
    "no file name": (
        lambda c: c["images"][1].update(file_name="\0"),
        "images[1] (id 2) has no file_name",
    ),
    "no width": (
        lambda c: c["images"][1].pop("width"),
        "images[1] (id 2) has width null and height 20",
    ),
    "category twice": (
        lambda c: c["categories"][1].update(id=7),
        "categories[1] (id 7) has the id of categories[0]",
    ),
    "name twice": (
        lambda c: c["categories"][1].update(name="cell"),
        "categories[1] (id 3) has the name of categories[0]",
    ),
    "no name": (lambda c: c["categories"][1].update(name=" "), "categories[1] (id 3) has no name"),
    "no list": (lambda c: c.pop("images"), "has no list images"),
    "no object": (
        lambda c: c["images"].append("3.png"),
        'images[2] is "3.png": it must be an object',
    ),
    "no annotations": (lambda c: c["annotations"].clear(), "holds no annotations"),
}


@pytest.mark.parametrize(("change", "told"), ENTRIES.values(), ids=ENTRIES)
def test_entries(change: Callable[[dict[str, Any]], Any], told: str) -> None:
    (fault,) = faults(changed(change))
    assert fault.startswith(f"val.json: {told}")


def test_an_empty_split() -> None:
    content = {"images": [], "annotations": [], "categories": coco()["categories"]}
    assert faults(content) == [
        "val.json: names no images: an empty split can be neither learnt from nor scored"
    ]


def test_other_json_is_no_coco_file() -> None:
    (fault,) = faults([1, 2])
    assert "a COCO file is a JSON object with the lists images, annotations" in fault


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b"<xml>"])
def test_what_is_no_json(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "val.json").write_bytes(text)
    with pytest.raises(UserError, match=r"val\.json is no JSON file .*COCO's format"):
        read_coco(tmp_path / "val.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_coco(tmp_path)


def bad_part(folder: Path) -> Part:
    """Eight wrong objects of nine."""
    wrong = [annotation(n, bbox=[0, 0, 0, 4], segmentation=[[1, 2]]) for n in range(2, 10)]
    return write_part(folder / "val", folder / "val.json", coco([annotation(1), *wrong]))


def test_opening_tells_the_first_faults_and_how_many_more(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        CocoSource(bad_part(tmp_path), masks=True)
    lines = str(refused.value).splitlines()
    assert len(lines) == 7
    assert "annotations[1] (id 2) has the bbox [0, 0, 0, 4], which has no area" in lines[0]
    assert "annotations[1] (id 2) has segmentation[0] of 1 points" in lines[1]
    assert lines[5] == "and 11 more, which check=true lists"
    assert lines[6] == "skip_bad_objects=true leaves such annotations out"


def test_wrong_objects_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    source = CocoSource(bad_part(tmp_path), masks=True, skip_bad_objects=True)
    assert [len(source.target(index)) for index in range(2)] == [1, 0]
    (note,) = source.notes
    assert "8 wrong annotations are left out, as " in note
    assert "annotations[1] (id 2)" in note


def test_a_wrong_image_is_never_left_out(tmp_path: Path) -> None:
    part = write_part(tmp_path / "val", tmp_path / "val.json")
    content = coco([annotation(1), annotation(2, bbox=[0, 0, 0, 0])])
    content["images"][1]["width"] = 0
    part.annotations.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"images\[1\] \(id 2\) has width 0") as refused:
        CocoSource(part, skip_bad_objects=True)
    assert len(str(refused.value).splitlines()) == 1


def test_a_missing_file(tmp_path: Path) -> None:
    part = write_part(tmp_path / "val", tmp_path / "val.json")
    (part.images / "2.png").unlink()
    told = r"val\.json: images\[1\] \(id 2\) names 2\.png, which is missing in .*val"
    with pytest.raises(UserError, match=told):
        CocoSource(part)
    assert len(list(faults_of_part(part))) == 1


def test_a_file_of_another_size_is_told_when_it_is_read(tmp_path: Path) -> None:
    part = write_part(tmp_path / "val", tmp_path / "val.json")
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(part.images / "2.png")
    source = CocoSource(part)
    assert source.read(0)
    with pytest.raises(UserError, match=r"2\.png has 30x21 pixels, .*\(id 2\).* says 30x20"):
        source.read(1)
    Image.new("RGB", (HEIGHT, WIDTH)).save(part.images / "2.png")
    with pytest.raises(UserError, match="its sides are exchanged"):
        source.read(1)


def test_checking_lists_everything(tmp_path: Path) -> None:
    part = bad_part(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(part.images / "1.png")
    (part.images / "2.png").write_bytes(b"no image")
    found = list(faults_of_part(part, masks=True))
    assert len(found) == 18
    assert "1.png has 30x21 pixels" in found[16]
    assert "2.png" in found[17]
    assert len(list(faults_of_part(part))) == 10
    part.annotations.write_text("{}", encoding="utf-8")
    assert list(faults_of_part(part)) == [
        f"{part.annotations}: has no list images: a COCO file is a JSON object with the lists "
        "images, annotations and categories"
    ]
    part.annotations.write_text("{", encoding="utf-8")
    assert "no JSON file" in next(faults_of_part(part))
