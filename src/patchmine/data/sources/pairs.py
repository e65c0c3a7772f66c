"""Images with label maps: pictures of class numbers, one for each image, by folders or a list."""

from __future__ import annotations

import csv
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.classmap import ClassMap, Colours, read_class_map
from patchmine.data.sources.contract import (
    TEST_FOLDERS,
    TRAIN_FOLDERS,
    Source,
    contents,
    fingerprint_of,
)
from patchmine.data.sources.folder import open_folder
from patchmine.data.sources.index import file_identity
from patchmine.errors import UserError, shown_name

VAL_FOLDERS = tuple(name for name in TEST_FOLDERS if name.startswith("val"))
_HELD_OUT = tuple(name for name in TEST_FOLDERS if name not in VAL_FOLDERS)
_PART_FOLDERS = {"train": TRAIN_FOLDERS, "val": VAL_FOLDERS, "test": _HELD_OUT}

_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "photos")
_LABEL_FOLDERS = (
    *("labels", "label", "masks", "mask", "annotations", "annotation", "gt", "gtfine"),
    *("segmentationclass", "segmentation", "ground_truth", "groundtruth"),
)
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".npy", ".jpg", ".jpeg")
_JOINTS = ("_", "-", ".")  # between an image's name and what its label adds: 7_mask.png of 7.jpg
_LISTS = (".txt", ".csv", ".tsv")

Parts = dict[str, "MapSource"]
"""By "train", "val" and "test"; "all" where the data have no parts."""


class MapSource(Source):
    """Images with the class of every pixel.

    Attributes:
        names: of the classes, by their numbers, where the source knows them.
    """

    encoded = True
    names: Sequence[str] = ()

    @abstractmethod
    def target(self, index: int) -> ClassMap:
        """(H, W) int32, the class of every pixel.  UserError that names the file."""

    @abstractmethod
    def target_name(self, index: int) -> str:
        """Where the classes of an image stand, for messages."""

    @abstractmethod
    def chosen(self, places: NDArray[np.int64]) -> MapSource:
        """Some of them, in that order."""


class LabelMaps(MapSource):
    """Images, each with the file of its label map.

    Args:
        name: what the user typed.
        images: files, in order.
        labels: files, one for each image.
        keys: names of the images inside their source.
        colours: which pixel values mean which class; None: they are the class numbers.
    """

    def __init__(
        self,
        name: str,
        images: Sequence[str],
        labels: Sequence[str],
        keys: Sequence[str],
        colours: Colours | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        sizes = (f"{key}\0{_size(file)}" for key, file in zip(keys, images, strict=True))
        super().__init__(name, fingerprint_of(_encoded(sizes)), notes)
        self.images, self.labels_of, self.keys = [*images], [*labels], [*keys]
        self.colours = colours

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        return contents(self.images[index])

    def identity(self, index: int) -> bytes | None:
        return file_identity(self.images[index])

    def path(self, index: int) -> str:
        return self.images[index]

    def key(self, index: int) -> str:
        return self.keys[index]

    def target_name(self, index: int) -> str:
        return f"the label map {shown_name(self.labels_of[index])}"

    def target(self, index: int) -> ClassMap:
        return read_class_map(self.labels_of[index], self.colours)

    @property
    def target_digest(self) -> str:
        """Changes when a label's name or size does, or what its values mean."""
        names = (f"{os.path.basename(file)}\0{_size(file)}" for file in self.labels_of)  # noqa: PTH119
        return fingerprint_of(_encoded([*names, repr(self.colours)]))

    def chosen(self, places: NDArray[np.int64]) -> LabelMaps:
        lists = (self.images, self.labels_of, self.keys)
        images, labels, keys = ([each[place] for place in places.tolist()] for each in lists)
        return LabelMaps(self.name, images, labels, keys, self.colours, self.notes)


@dataclass(frozen=True)
class _Folders:
    images: Path
    labels: Path


def open_pairs(
    data: str | Sequence[str], labels: str | None = None, colours: Colours | None = None
) -> Parts:
    """The images and label maps that the user names, by their part.

    Args:
        data: a folder with ``{train,val,test}/{images,labels}``, with ``{images,labels}/{train,
            ...}`` or with ``images`` and ``labels``; or a list file of "image label" lines.
        labels: the folder of label maps of the images in the folder ``data``.
        colours: see `LabelMaps`.

    Raises:
        UserError: there are no images, or no label map for one of them.
    """
    if not isinstance(data, str):
        if len(data) != 1:
            raise UserError(
                f"data={shown_name(str(list(data)))}: images with label maps come from one folder "
                "or one list: write a list file with a line 'image,label' for each of them"
            )
        data = data[0]
    root = Path(data)
    if root.suffix.lower() in _LISTS and root.is_file():
        return {"all": _of_list(root, data, colours)}
    if not root.is_dir():
        raise UserError(f"data={shown_name(data)}: there is no such folder or list of images")
    if labels is not None:
        if not Path(labels).is_dir():
            raise UserError(f"labels={shown_name(labels)}: there is no such folder of label maps")
        folders = {"all": _Folders(root, Path(labels))}
        folders = _divided(root, Path(labels)) or folders
    else:
        folders = _layout(root)
    return {part: _of_folders(found, data, colours) for part, found in folders.items()}


def _layout(root: Path) -> dict[str, _Folders]:
    """Where the images and labels of each part lie."""
    images, labels = _child(root, _IMAGE_FOLDERS), _child(root, _LABEL_FOLDERS)
    if images is not None and labels is not None:
        return _divided(images, labels) or {"all": _Folders(images, labels)}
    found = {}
    for part, names in _PART_FOLDERS.items():
        inner = _child(root, names)
        if inner is None:
            continue
        images, labels = _child(inner, _IMAGE_FOLDERS), _child(inner, _LABEL_FOLDERS)
        if images is None or labels is None:
            missing = "images" if images is None else "labels"
            raise UserError(
                f"{shown_name(inner)} has no folder {missing}/: give {part}/images and "
                f"{part}/labels, or name the folder of label maps as labels=..."
            )
        found[part] = _Folders(images, labels)
    if not found:
        raise UserError(
            f"data={shown_name(root)} has neither train/images and train/labels nor images and "
            "labels in it: name the folder of label maps as labels=..., or give a list of lines "
            "'image label'"
        )
    return found


def _divided(images: Path, labels: Path) -> dict[str, _Folders]:
    """The parts of ``images/train`` beside ``labels/train``; empty where there are none."""
    found = {}
    for part, names in _PART_FOLDERS.items():
        inner, beside = _child(images, names), _child(labels, names)
        if inner is not None and beside is not None:
            found[part] = _Folders(inner, beside)
    return found


def _child(folder: Path, names: Sequence[str]) -> Path | None:
    """The first folder in ``folder`` with one of the names, in any case."""
    inside = {entry.name.lower(): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
    return next((inside[name] for name in names if name in inside), None)


def _of_folders(folders: _Folders, name: str, colours: Colours | None) -> LabelMaps:
    images = open_folder(folders.images, name, None)
    if len(images) == 0:
        raise UserError(f"{shown_name(folders.images)} holds no images")
    by_stem = _labels_by_stem(folders.labels)
    keys = [images.key(index) for index in range(len(images))]
    labels = [_label_of(key, by_stem, folders) for key in keys]
    files = [images.path(index) for index in range(len(images))]
    notes = list(images.notes)
    if unused := sum(map(len, by_stem.values())) - len(set(labels)):
        notes.append(f"{unused:,} label maps of {shown_name(folders.labels)} belong to no image")
    return LabelMaps(name, files, labels, keys, colours, notes)


def _labels_by_stem(folder: Path) -> dict[str, list[str]]:
    """Label files by their path below the folder without ending."""
    found: dict[str, list[str]] = {}
    for place, _, files in os.walk(folder, followlinks=True):
        below = os.path.relpath(place, folder)
        for file in sorted(files):
            stem, ending = os.path.splitext(file)  # noqa: PTH122, many files
            if ending.lower() in _LABEL_SUFFIXES and not file.startswith("."):
                key = stem if below == "." else f"{below}/{stem}"
                found.setdefault(key.replace(os.sep, "/"), []).append(os.path.join(place, file))  # noqa: PTH118
    return found


def _label_of(key: str, by_stem: Mapping[str, Sequence[str]], folders: _Folders) -> str:
    stem = key.rpartition(".")[0] or key
    fitting = by_stem.get(stem, ())
    if not fitting:
        longer = [each for each in by_stem if each.startswith(stem)]
        fitting = [file for each in longer if each[len(stem)] in _JOINTS for file in by_stem[each]]
    if len(fitting) == 1:
        return fitting[0]
    image = shown_name(folders.images / key)
    if not fitting:
        raise UserError(
            f"{image} has no label map: {shown_name(folders.labels)} holds no file named "
            f"{shown_name(Path(stem).name)}.png; add it, or remove the image"
        )
    both = " and ".join(shown_name(Path(file).name) for file in fitting[:2])
    raise UserError(f"{image} has several label maps, {both}: keep one of them")


def _of_list(file: Path, name: str, colours: Colours | None) -> LabelMaps:
    """Lines of an image and its label map, relative to the list."""
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    delimiter = next((each for each in ("\t", ",", ";") if each in text), " ")
    images, labels, keys = [], [], []
    for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1):
        cells = [cell.strip() for cell in row if cell.strip()]
        if not cells or cells[0].startswith("#") or (number == 1 and _is_head(file, cells)):
            continue
        if len(cells) != 2:
            raise UserError(
                f"{shown_name(file)}, line {number}: {len(cells)} entries where an image and its "
                "label map belong, as in 'images/7.jpg,labels/7.png'"
            )
        for cell, kind in zip(cells, ("image", "label map"), strict=True):
            if not (file.parent / cell).is_file():
                raise UserError(
                    f"{shown_name(file)}, line {number}: the {kind} {shown_name(cell)} does not "
                    "exist (paths are relative to the list): correct or remove the line"
                )
        images.append(str(file.parent / cells[0]))
        labels.append(str(file.parent / cells[1]))
        keys.append(cells[0])
    if not images:
        raise UserError(f"{shown_name(file)} names no images")
    return LabelMaps(name, images, labels, keys, colours)


def _is_head(file: Path, cells: Sequence[str]) -> bool:
    """Whether a first line names columns instead of files."""
    return all("." not in cell for cell in cells) and not (file.parent / cells[0]).exists()


def _encoded(texts: Any) -> list[bytes]:
    return [text.encode("utf-8", "surrogateescape") for text in texts]


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size  # noqa: PTH116, once per image
    except OSError:
        return -1
