"""Where the parts of a COCO data set lie: the images and the annotations of train, val and test."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from patchmine.data.sources.contract import TEST_FOLDERS, TRAIN_FOLDERS, data_error
from patchmine.errors import shown_name

WHOLE = "whole"
"""The only part of a data set that is not divided."""

_BESIDE = ("annotations.json", "_annotations.coco.json")  # the latter as Roboflow exports it
_YEAR = re.compile(r"(?:20\d\d)?")  # of COCO's own folders
_LAYOUTS = (
    "train/ and val/ with annotations/train.json and annotations/val.json, or an annotations.json "
    "in each of them or beside the images"
)


@dataclass(frozen=True)
class Part:
    """The folder of a part's images, and the COCO file about them."""

    images: Path
    annotations: Path


def find_parts(data: str | Path, annotations: str | Path | None = None) -> dict[str, Part]:
    """The parts of a data set that have annotations: some of "train", "val", "test", or "whole".

    Args:
        data: a folder with a folder for each part, ``train/`` and ``val/`` say, also named
            ``train2017/``, or inside ``images/``; or a folder that is not divided; or a COCO file
            that lies beside its images.
        annotations: the file about a folder that is not divided, or the folder of the files
            ``train.json`` (also ``instances_train.json``) and so on.  None:
            ``DATA/annotations/``, or an ``annotations.json`` with the images of each part.

    Raises:
        UserError: there is no such folder or file, or two folders may be the same part.
    """
    root = Path(data).expanduser()
    if root.is_file() and annotations is None and root.suffix.lower() == ".json":
        return {WHOLE: Part(_image_folder(root.parent), root)}
    if not root.is_dir():
        what = "is no folder" if root.exists() else "there is no such folder"
        raise data_error(data, f"{what}; give a folder of images with annotations in COCO's format")
    place = root / "annotations" if annotations is None else Path(annotations).expanduser()
    if annotations is not None and not place.exists():
        raise data_error(data, f"annotations={shown_name(annotations)} does not exist")
    if place.is_file():
        return {WHOLE: Part(_image_folder(root), place)}
    folders = _part_folders(root, data) or _part_folders(root / "images", data)
    parts = {
        name: Part(_image_folder(folder), file)
        for name, folder in folders.items()
        if (file := _annotations_of(folder, name, root, place)) is not None
    }
    if parts:
        return parts
    whole = None if folders else _annotations_of(root, WHOLE, root, place)
    if whole is None:
        found = f" (found {', '.join(shown_name(f) for f in folders.values())})" if folders else ""
        raise data_error(data, f"no annotations in COCO's format{found}; give {_LAYOUTS}")
    return {WHOLE: Part(_image_folder(root), whole)}


def part_of(name: str) -> str | None:
    """ "train", "val" or "test" of a folder's name, ``valid`` or ``train2017`` say; else None."""
    plain = name.lower()
    for folder in (*TRAIN_FOLDERS, *TEST_FOLDERS):
        if plain.startswith(folder) and _YEAR.fullmatch(plain[len(folder) :]):
            return next(part for part in ("train", "test", "val") if folder.startswith(part))
    return None


def _part_folders(root: Path, data: str | Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for entry in _sorted_entries(root):
        part = part_of(entry.name)
        if part is None or not entry.is_dir():
            continue
        if part in found:
            names = f"{shown_name(found[part])} and {shown_name(entry)}"
            what = f"{names} may both be the {part} part"
            raise data_error(data, f"{what}; leave one of them in the folder")
        found[part] = entry
    return {part: found[part] for part in ("train", "val", "test") if part in found}


def _annotations_of(folder: Path, part: str, root: Path, place: Path) -> Path | None:
    """The COCO file about a folder: in it, or in ``place`` or the root under the part's name."""
    names = [folder.name, *(n for n in (*TRAIN_FOLDERS, *TEST_FOLDERS) if part_of(n) == part)]
    if part == WHOLE:
        names = ["instances", "annotations", *([root.name] if root.name else [])]
    named = [f"{head}{name}.json" for name in names for head in ("", "instances_")]
    beside = [folder / name for name in _BESIDE]
    candidates = [*beside, *(place / name for name in named), *(root / name for name in named)]
    return next((file for file in candidates if file.is_file()), None)


def _image_folder(folder: Path) -> Path:
    """``images/`` in it, where there is one."""
    inner = folder / "images"
    return inner if inner.is_dir() else folder


def _sorted_entries(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder))
    except OSError:
        return []
