"""The images of a COCO file, each with its objects."""

from __future__ import annotations

import copy
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.decode import probe
from patchmine.data.sources.coco_check import Fault, faults_of, read_coco
from patchmine.data.sources.coco_masks import masks_of, packed, require_pycocotools
from patchmine.data.sources.coco_parts import Part, find_parts
from patchmine.data.sources.contract import IMAGES, contents, fingerprint_of
from patchmine.data.sources.folder import open_folder
from patchmine.data.sources.index import Index, IndexedSource, Marks, PathList, new_index
from patchmine.data.sources.members import PassedOver
from patchmine.errors import UserError, shown_name
from patchmine.types import Objects

_FAULTS_TOLD = 5  # by the error that refuses a file


class CocoImage(NamedTuple):
    """What a COCO file says of one image."""

    id: int
    file_name: str
    height: int
    width: int


class CocoSource(IndexedSource):
    """The images of a COCO file in its order, with their objects; there may be none in an image.

    Args:
        part: folder and file.
        name: what the user typed after ``data=``.
        masks: whether objects have masks.
        skip_bad_objects: leave out annotations that are wrong, and tell so in ``notes``, instead
            of refusing the file.

    Attributes:
        names: of the categories in the order of their ids; an object's label is a place in it.
        category_ids: (K,) int64, the ids themselves.

    Raises:
        UserError: the file cannot be read, something in it is wrong, or a file is missing.
    """

    def __init__(
        self,
        part: Part,
        name: str | None = None,
        *,
        masks: bool = False,
        skip_bad_objects: bool = False,
    ) -> None:
        if masks:
            require_pycocotools()
        content = read_coco(part.annotations)
        notes, bad = _verdict(content, part, masks, skip_bad_objects)
        root = _root(part.images, content["images"])
        files = _Files(root, part)
        refused = [Fault(text) for text in files.missing(content["images"])]
        if refused:
            raise UserError(_told(refused))
        name = os.fspath(part.images) if name is None else name
        super().__init__(name, _index(content, bad, masks, [*notes, *files.unnamed(content)]))
        self.root, self.part, self.masks = root, part, masks
        self.names: list[str] = list(self.index.stamp["names"])
        self.places = np.arange(len(self.index))  # in the file, of the images

    @property
    def category_ids(self) -> NDArray[np.int64]:
        """(K,) the ids of the categories in the file, in the order of ``names``."""
        return self.index.columns["category"]

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        return self.index.path(int(self.places[index]))

    def chosen(self, places: NDArray[np.int64]) -> CocoSource:
        """Some of the images, in that order."""
        other = copy.copy(self)
        other.places = self.places[places]
        other.fingerprint = fingerprint_of([self.fingerprint.encode(), places.astype("<i8")])
        return other

    def counts(self) -> NDArray[np.int64]:
        """(K,) the objects of each category in these images, crowds left out."""
        columns = self.index.columns
        of_image = np.repeat(np.arange(len(self.index)), np.diff(columns["first"]))
        counted = np.isin(of_image, self.places) & ~columns["crowd"]
        return np.bincount(columns["labels"][counted], minlength=len(self.names))

    def median_size(self) -> tuple[int, int]:
        """(height, width) of these images, the median of each side."""
        sides = (self.index.columns[name][self.places] for name in ("height", "width"))
        height, width = (int(np.median(side)) for side in sides)
        return height, width

    def read(self, index: int) -> bytes:
        """The encoded image; UserError where it has another size than the COCO file says."""
        raw = contents(self.path(index))
        wrong = self._wrong_size(index, raw)
        if wrong is not None:
            raise UserError(wrong)
        return raw

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.key(index))  # noqa: PTH118, once per image

    def image(self, index: int) -> CocoImage:
        """Id, file name and size as the COCO file has them."""
        columns, place = self.index.columns, self.places[index]
        number, height, width = (int(columns[name][place]) for name in ("id", "height", "width"))
        return CocoImage(number, self.key(index), height, width)

    def target(self, index: int) -> Objects:
        """The objects of one image, in its pixels and the order of the file."""
        columns, objects = self.index.columns, self._objects(index)
        masks = None
        if self.masks:
            _, _, height, width = self.image(index)
            ends = columns["segmentation_offsets"][objects.start : objects.stop + 1].tolist()
            blob = columns["segmentations"]
            texts = [blob[ends[n] : ends[n + 1]].tobytes() for n in range(len(ends) - 1)]
            masks = masks_of(texts, height, width)
        return Objects(
            torch.tensor(columns["boxes"][objects]),
            torch.tensor(columns["labels"][objects]),
            torch.tensor(columns["crowd"][objects]),
            masks,
        )

    def areas(self, index: int) -> NDArray[np.float32]:
        """(N,) areas by which COCO tells small, medium and large objects; of boxes without one."""
        return self.index.columns["areas"][self._objects(index)]

    @property
    def target_digest(self) -> str:
        """Changes when an object or a category does."""
        names = "\0".join(self.names).encode("utf-8", "surrogatepass")
        columns = self.index.columns
        learnt = ("first", "boxes", "labels", "crowd", "height", "width")
        masks = ("segmentations", "segmentation_offsets") if self.masks else ()
        values = (columns[name] for name in (*learnt, *masks))
        return fingerprint_of([names, *values, self.places.astype("<i8")])

    def wrong_sizes(self) -> Iterator[str]:
        """Images that cannot be opened or have other sizes than the COCO file says."""
        for index in range(len(self)):
            try:
                wrong = self._wrong_size(index, contents(self.path(index)))
            except (OSError, DecodeError) as error:
                wrong = f"{shown_name(self.path(index))} {error}"
            if wrong is not None:
                yield wrong

    def _objects(self, index: int) -> slice:
        place = self.places[index]
        start, end = self.index.columns["first"][place : place + 2].tolist()
        return slice(start, end)

    def _wrong_size(self, index: int, raw: bytes) -> str | None:
        height, width = probe(raw)[:2]
        told = self.image(index)
        if (height, width) == (told.height, told.width):
            return None
        file, of = shown_name(self.path(index)), shown_name(self.part.annotations)
        if (height, width) == (told.width, told.height):
            turned = "if it was annotated lying, remove the orientation from the file's EXIF data"
            hint = f" (its sides are exchanged: {turned})"
        else:
            hint = ""
        what = f"has {width}x{height} pixels, but images (id {told.id}) in {of} says"
        return f"{file} {what} {told.width}x{told.height}: correct the entry or the file{hint}"


def open_coco(
    data: str | Path,
    annotations: str | Path | None = None,
    *,
    masks: bool = False,
    skip_bad_objects: bool = False,
) -> dict[str, CocoSource]:
    """The parts of a data set by name, as `find_parts` finds them, with equal categories.

    Raises:
        UserError: of `find_parts` and `CocoSource`, and where categories differ between parts.
    """
    settings = dict(masks=masks, skip_bad_objects=skip_bad_objects)
    sources = {
        name: CocoSource(part, f"{os.fspath(data)}", **settings)
        for name, part in find_parts(data, annotations).items()
    }
    check_categories(list(sources.values()))
    return sources


def check_categories(sources: list[CocoSource]) -> None:
    """UserError where two parts define other categories, by id or by name."""
    first = sources[0]
    expected = dict(zip(first.category_ids.tolist(), first.names, strict=True))
    for source in sources[1:]:
        found = dict(zip(source.category_ids.tolist(), source.names, strict=True))
        if found == expected:
            continue
        number = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        told = [
            f"{shown_name(part.annotations)} {_category(categories.get(number))}"
            for part, categories in ((first.part, expected), (source.part, found))
        ]
        what = f"the categories differ: category id {number} in {' and in '.join(told)}"
        raise UserError(f"{what}; give all files the same list of categories")


def faults_of_part(
    part: Part, *, masks: bool = False, skip_bad_objects: bool = False
) -> Iterator[str]:
    """Everything that is wrong with a part: its COCO file, missing files, sizes that differ.

    ``skip_bad_objects``: but for annotations, which are left out.
    """
    try:
        content = read_coco(part.annotations)
    except UserError as error:
        yield str(error)
        return
    spoilt = False
    for fault in faults_of(content, part.annotations, masks=masks):
        spoilt = spoilt or fault.annotation is None
        if fault.annotation is None or not skip_bad_objects:
            yield str(fault)
    if spoilt:
        return
    missing = list(_Files(_root(part.images, content["images"]), part).missing(content["images"]))
    yield from missing
    if not missing:
        yield from CocoSource(part, skip_bad_objects=True).wrong_sizes()


def _verdict(
    content: Any, part: Part, masks: bool, skip_bad_objects: bool
) -> tuple[list[str], set[int]]:
    """Notes, and places of the annotations to leave out; UserError where the file is refused."""
    faults = list(faults_of(content, part.annotations, masks=masks))
    bad = {fault.annotation for fault in faults if fault.annotation is not None}
    if not skip_bad_objects:
        if faults:
            raise UserError(_told(faults))
        return [], set()
    refused = [fault for fault in faults if fault.annotation is None]
    if refused:
        raise UserError(_told(refused))
    first = f", as {faults[0]}" if faults else ""
    return [f"{len(bad):,} wrong annotations are left out{first}"] if bad else [], bad


def _told(faults: list[Fault]) -> str:
    lines = [str(fault) for fault in faults[:_FAULTS_TOLD]]
    more = len(faults) - len(lines)
    if more:
        lines.append(f"and {more:,} more, which check=true lists")
    if all(fault.annotation is not None for fault in faults):
        lines.append("skip_bad_objects=true leaves such annotations out")
    return "\n".join(lines)


def _category(name: str | None) -> str:
    return "is absent" if name is None else f"is '{shown_name(name)}'"


def _root(images: Path, entries: list[dict[str, Any]]) -> Path:
    """The folder that file names start from: that of the images, or the one it lies in."""
    first = entries[0]["file_name"]
    outside = (images / first).is_file() or not (images.parent / first).is_file()
    return images if outside else images.parent


class _Files:
    """The image files of a part against the entries of its COCO file."""

    def __init__(self, root: Path, part: Part) -> None:
        self.root, self.part = root, part
        listed = open_folder(part.images, os.fspath(part.images), None, IMAGES)
        below = os.path.relpath(part.images, root)
        prefix = "" if below == os.curdir else f"{below}/"
        self.keys = {prefix + listed.key(number) for number in range(len(listed))}

    def missing(self, images: list[dict[str, Any]]) -> Iterator[str]:
        """A sentence for each entry without a file."""
        file, folder = shown_name(self.part.annotations), shown_name(self.root)
        for place, entry in enumerate(images):
            name = entry["file_name"]
            if name not in self.keys and not (self.root / name).is_file():
                what = f"{file}: images[{place}] (id {entry['id']}) names {shown_name(name)}"
                yield f"{what}, which is missing in {folder}: add the file or remove the entry"

    def unnamed(self, content: dict[str, Any]) -> list[str]:
        """A note where the folder holds files that the COCO file does not name."""
        left = self.keys - {os.path.normpath(entry["file_name"]) for entry in content["images"]}
        if not left:
            return []
        such = f"{len(left):,} image{'s are' if len(left) > 1 else ' is'}"
        file = shown_name(self.part.annotations)
        return [f"{such} not named in {file} and left out, as {shown_name(min(left))}"]


def _index(content: dict[str, Any], bad: set[int], masks: bool, notes: list[str]) -> Index:
    """Images and objects as columns: those of image i are numbers first[i] to first[i + 1]."""
    images = content["images"]
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    paths = PathList()
    for entry in images:
        paths.add(entry["file_name"])
    columns = {name: _whole(entry[name] for entry in images) for name in ("id", "height", "width")}
    columns["category"] = _whole(entry["id"] for entry in categories)
    kept = [entry for place, entry in enumerate(content["annotations"]) if place not in bad]
    place_of = {entry["id"]: place for place, entry in enumerate(images)}
    of_image = _whole(place_of[entry["image_id"]] for entry in kept)
    order = np.argsort(of_image, kind="stable")
    kept, of_image = [kept[place] for place in order.tolist()], of_image[order]
    columns["first"] = np.searchsorted(of_image, np.arange(len(images) + 1))
    label_of = {entry["id"]: label for label, entry in enumerate(categories)}
    columns["labels"] = _whole(label_of[entry["category_id"]] for entry in kept)
    objects: dict[str, NDArray[Any]] = {
        "boxes": _boxes(kept, columns["height"][of_image], columns["width"][of_image]),
        "crowd": np.array([bool(entry.get("iscrowd")) for entry in kept], bool),
        "areas": np.array([_area(entry) for entry in kept], np.float32),
    }
    if masks:
        objects |= _segmentations(kept)
    names = [entry["name"] for entry in categories]
    all_columns = {**columns, **objects}
    return new_index(IMAGES, paths, Marks(), PassedOver(), all_columns, notes, names=names)


def _whole(values: Iterator[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)


def _boxes(
    entries: list[dict[str, Any]], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.float32]:
    """(N, 4) of [left, top, width, height] as (left, top, right, bottom) inside the image."""
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return np.clip(boxes, 0, np.stack([widths, heights] * 2, 1)).astype(np.float32)


def _area(entry: dict[str, Any]) -> float:
    area: Any = entry.get("area")
    if type(area) in {int, float} and 0 <= area < np.inf:
        return float(area)
    return float(entry["bbox"][2]) * float(entry["bbox"][3])


def _segmentations(entries: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    blob, offsets = bytearray(), array("q", [0])
    for entry in entries:
        blob += packed(entry["segmentation"])
        offsets.append(len(blob))
    return {
        "segmentations": np.frombuffer(blob, np.uint8),
        "segmentation_offsets": np.frombuffer(offsets, np.int64),
    }
