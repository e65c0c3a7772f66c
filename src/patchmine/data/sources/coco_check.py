"""What is wrong with a COCO file, entry by entry, before anything is decoded from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from patchmine.data.sources.coco_masks import counts_of
from patchmine.data.sources.contract import contents
from patchmine.errors import UserError, foreign_parser, reason_of, shown_name

_LISTS = ("images", "annotations", "categories")
_LARGEST = 1e9  # of any number; NaN is not below it either
_ROUNDING = 1.0  # pixels by which a box may reach beyond its image
_FEWEST = 6  # coordinates of a polygon
_SHOWN = 60  # characters of a value
_IDS = range(-(2**63), 2**63)

Sizes = Mapping[int, tuple[float, float] | None]
"""Height and width of images by id; None where they are wrong."""


@dataclass(frozen=True)
class Fault:
    """One sentence; ``annotation``: place of the only entry that it spoils, else None."""

    text: str
    annotation: int | None = None

    def __str__(self) -> str:
        return self.text


def read_coco(file: Path) -> Any:
    """What a JSON file holds; UserError where it cannot be read."""
    name = shown_name(file)
    try:
        data = contents(os.fspath(file))
    except OSError as error:
        raise UserError(f"{name} cannot be read ({reason_of(error)})") from error

    def refuse(reason: str) -> UserError:
        return UserError(f"{name} is no JSON file ({reason}): give annotations in COCO's format")

    with foreign_parser(refuse):
        return json.loads(data)


def faults_of(content: Any, file: str | Path, *, masks: bool) -> Iterator[Fault]:
    """Everything that is wrong with a COCO file, in the order of the file.

    Args:
        content: what `read_coco` gives.
        file: for the sentences.
        masks: whether segmentations are looked at too.
    """
    name = shown_name(file)
    for fault in _faults(content, masks):
        yield replace(fault, text=f"{name}: {fault.text}")


def _faults(content: Any, masks: bool) -> Iterator[Fault]:
    wrong = _wrong_shape(content)
    if wrong is not None:
        yield Fault(wrong)
        return
    images, annotations, categories = (content[name] for name in _LISTS)
    if not images:
        yield Fault("names no images: an empty split can be neither learnt from nor scored")
    elif not annotations:
        yield Fault("holds no annotations: without any object there is nothing to learn or score")
    for text in (*_of_categories(categories), *_of_images(images)):
        yield Fault(text)
    known = {number for number in map(_id, categories) if number is not None}
    sizes = {number: _size(entry) for entry in images if (number := _id(entry)) is not None}
    repeated = _Repeats("annotations", "give each annotation an id of its own")
    for place, entry in enumerate(annotations):
        texts = [*repeated.of(place, entry), *_of_object(entry, known, sizes, masks)]
        for text in texts:
            yield Fault(f"{_entry('annotations', place, entry)} {text}", place)


def _wrong_shape(content: Any) -> str | None:
    must = "a COCO file is a JSON object with the lists images, annotations and categories"
    if not isinstance(content, dict):
        return f"holds no object at its top: {must}"
    for name in _LISTS:
        if not isinstance(content.get(name), list):
            return f"has no list {name}: {must}"
        entries = enumerate(content[name])
        other = next((place for place, entry in entries if not isinstance(entry, dict)), None)
        if other is not None:
            return f"{name}[{other}] is {_shown(content[name][other])}: it must be an object {{}}"
    return None


class _Repeats:
    """Tells entries of a list without an id, and those whose id an earlier one has."""

    def __init__(self, name: str, remedy: str) -> None:
        self.name, self.remedy = name, remedy
        self.first: dict[int, int] = {}

    def of(self, place: int, entry: dict[str, Any]) -> Iterator[str]:
        number = _id(entry)
        if number is None:
            yield f"has no whole number as its id: {self.remedy}"
            return
        first = self.first.setdefault(number, place)
        if first != place:
            yield f"has the id of {self.name}[{first}]: {self.remedy}"


def _of_categories(categories: list[dict[str, Any]]) -> Iterator[str]:
    if not categories:
        yield "has an empty list categories: define a category for each category_id"
    repeated = _Repeats("categories", "give each category an id of its own")
    first: dict[str, int] = {}
    for place, entry in enumerate(categories):
        head = _entry("categories", place, entry)
        yield from (f"{head} {text}" for text in repeated.of(place, entry))
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            yield f"{head} has no name: give it one"
        elif first.setdefault(name, place) != place:
            yield f"{head} has the name of categories[{first[name]}]: name them differently"


def _of_images(images: list[dict[str, Any]]) -> Iterator[str]:
    repeated = _Repeats("images", "give each image an id of its own")
    first: dict[str, int] = {}
    for place, entry in enumerate(images):
        head = _entry("images", place, entry)
        yield from (f"{head} {text}" for text in repeated.of(place, entry))
        name = entry.get("file_name")
        if not isinstance(name, str) or not name.strip() or not _encodes(name):
            yield f"{head} has no file_name: give that of its file"
        elif first.setdefault(name, place) != place:
            remedy = "keep one entry of each file, with all its annotations"
            yield f"{head} names {shown_name(name)}, as images[{first[name]}] does: {remedy}"
        if _size(entry) is None:
            sides = f"width {_shown(entry.get('width'))} and height {_shown(entry.get('height'))}"
            yield f"{head} has {sides}: give both in whole pixels above 0"


def _of_object(
    entry: dict[str, Any], categories: set[int], sizes: Sizes, masks: bool
) -> Iterator[str]:
    image, category, crowd = (entry.get(key) for key in ("image_id", "category_id", "iscrowd"))
    if not _is_id(image) or image not in sizes:
        yield f"is of image_id {_shown(image)}, which no entry of images has: remove it or add that"
    if not _is_id(category) or category not in categories:
        what = f"is of category_id {_shown(category)}, which the file does not define"
        yield f"{what}: add it to categories or remove the entry"
    if crowd is not None and crowd not in (0, 1):  # a list has no hash
        yield f"has iscrowd {_shown(crowd)}: it must be 0 or 1"
    size = sizes.get(image) if _is_id(image) else None
    wrong = _wrong_box(entry.get("bbox"), size)
    if wrong is not None:
        yield wrong
    if masks:
        yield from _of_segmentation(entry.get("segmentation"), size)


def _wrong_box(box: Any, size: tuple[float, float] | None) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        must = "it must be four finite numbers, [left, top, width, height]"
        return f"has the bbox {_shown(box)}: {must}"
    left, top, width, height = box
    head = f"has the bbox {_shown(box)}"
    if width <= 0 or height <= 0:
        return f"{head}, which has no area: remove the entry or mend its width and height"
    if size is None:
        return None
    beyond = max(-left, -top, left + width - size[1], top + height - size[0])
    of_image = f"the image of {size[1]}x{size[0]} pixels"
    if left >= size[1] or top >= size[0] or left + width <= 0 or top + height <= 0:
        return f"{head}, which lies outside {of_image}: remove the entry or mend its box"
    if beyond > _ROUNDING:
        how = f"reaches {beyond:g} pixels beyond {of_image}"
        return f"{head}, which {how}: cut it off at the border"
    return None


def _of_segmentation(segmentation: Any, size: tuple[float, float] | None) -> Iterator[str]:
    if isinstance(segmentation, list) and segmentation:
        for place, polygon in enumerate(segmentation):
            wrong = _wrong_polygon(polygon, size)
            if wrong is not None:
                yield f"has segmentation[{place}] {wrong}"
    elif isinstance(segmentation, dict):
        wrong = _wrong_runs(segmentation, size)
        if wrong is not None:
            yield f"has a segmentation {wrong}"
    else:
        must = "give polygons [[x, y, ...]] or run lengths, or set masks=false"
        yield f"has the segmentation {_shown(segmentation)}: {must}"


def _wrong_polygon(polygon: Any, size: tuple[float, float] | None) -> str | None:
    if not isinstance(polygon, list) or not _are_numbers(polygon):
        return f"{_shown(polygon)}: it must be finite numbers, [x, y, x, y, ...]"
    count = len(polygon)
    if count % 2:
        return f"of {count} coordinates: an x without its y, mend the list"
    if count < _FEWEST:
        return f"of {count // 2} points: a polygon has at least 3, remove it or the entry"
    # A little beyond the border is cut off; far away it is a mistake, which would cost the decoder
    # memory for each pixel of its outline.
    if size is not None:
        for name, values, side in (("x", polygon[0::2], size[1]), ("y", polygon[1::2], size[0])):
            if min(values) < -side or max(values) > 2 * side:
                return f"with {name} from {min(values):g} to {max(values):g}, far outside the image"
    return None


def _wrong_runs(segmentation: dict[str, Any], size: tuple[float, float] | None) -> str | None:
    told, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(told, list) or len(told) != 2 or not all(map(_is_id, told)):
        return f"of size {_shown(told)}: it must be [height, width]"
    if size is not None and tuple(told) != size:
        is_ = f"of size {told}, but its image has [height, width] = {[*size]}"
        return f"{is_}: encode the mask again in the image's size"
    damaged = "damaged counts: encode the mask again"
    values = counts_of(counts) if isinstance(counts, str) else counts
    if not isinstance(values, list) or not all(_is_id(value) and value >= 0 for value in values):
        return f"with {damaged}"
    if sum(values) != told[0] * told[1]:
        is_ = f"whose counts sum to {sum(values)}, not to {told[0]} x {told[1]} pixels"
        return f"{is_}: encode the mask again"
    return None


def _entry(name: str, place: int, entry: dict[str, Any]) -> str:
    number = _id(entry)
    return f"{name}[{place}]" if number is None else f"{name}[{place}] (id {number})"


def _id(entry: dict[str, Any]) -> int | None:
    number = entry.get("id")
    return number if _is_id(number) else None


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and value in _IDS


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    if _is_id(height) and _is_id(width) and 0 < height < _LARGEST and 0 < width < _LARGEST:
        return height, width
    return None


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) in {int, float} and -_LARGEST < value < _LARGEST for value in values)


def _encodes(name: str) -> bool:
    """Whether a file can have the name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
