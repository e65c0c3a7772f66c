"""``patchmine data tile``: huge images cut into tiles, or these listed, without the empty ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchmine.data.decoding.arrays import filled, with_nan
from patchmine.data.decoding.bounds import DecodeError, reading_item
from patchmine.data.decoding.orientation import Box
from patchmine.data.decoding.rasters import Scene
from patchmine.data.decoding.scenes import open_scene
from patchmine.data.settings import LIST_SUFFIXES, MAX_PIXELS
from patchmine.data.sources.contract import data_error
from patchmine.data.sources.folder import FileSource, open_folder
from patchmine.data.sources.listfile import open_files, open_list
from patchmine.data.sources.windows import (
    SCENES,
    TABLE_SUFFIXES,
    Row,
    image_in_list,
    is_window_list,
    window_writer,
)
from patchmine.errors import Say, UserError, reason_of, shown_name, silent
from patchmine.system.disk import output, remedy, replacing, settle, sweep

_NOTE = ".tiles.json"
_WHITE, _GREYNESS = 220, 20  # of glass in a slide: how bright at least, how coloured at most


@dataclass(frozen=True)
class Cut:
    """How tiles are cut.

    Attributes:
        size: pixels of a side; an image that is smaller gives a smaller tile.
        overlap: pixels that neighbours have in common; the last ones in a row or column more.
        level: of the pyramid of a slide or TIFF, 0 the largest.
        max_empty: share of a tile without data, black or nearly white above which it is left out.
        keep_missing: pixels without data stay known as such, for ``missing=mask``.
    """

    size: int = 512
    overlap: int = 0
    level: int = 0
    max_empty: float = 0.9
    keep_missing: bool = False


@dataclass
class Tiled:
    """What was done; ``kept`` images were cut by an earlier call, ``failed`` cannot be read."""

    images: int = 0
    tiles: int = 0
    empty: int = 0
    kept: int = 0
    failed: int = 0
    first_failure: str = ""


def open_scenes(data: str) -> FileSource:
    """The images in a folder or list, or a single one, that tiles are to be cut of; UserError."""
    path = Path(data).expanduser()
    if path.is_dir():
        files = open_folder(path, data, None, SCENES)
    elif is_window_list(path):
        raise data_error(data, "this lists tiles already; give the images that they are of")
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        files = open_list(path, data, None, SCENES)
    elif path.name.lower().endswith(SCENES.suffixes) and path.is_file():
        files = open_files([data], SCENES)
    else:
        missing = "" if path.exists() else "there is no such file or folder; "
        what = f"{missing}give a folder of images, a list file of them, or an image"
        raise data_error(data, what)
    if not len(files):
        raise data_error(
            data, f"no image in this folder; those end in {', '.join(SCENES.suffixes)}"
        )
    return files


def tile_images(
    data: str, out: Path, cut: Cut, max_pixels: int, progress: Callable[[int, int], None], say: Say
) -> Tiled:
    """`cut_tiles` of what ``data`` names, or `list_tiles` where ``out`` is a table; ``say`` hears
    what came of it as well.
    """
    work = list_tiles if is_list(out) else cut_tiles
    files = open_scenes(data)
    for note in files.notes:
        say(note)
    done = work(files, out, cut, max_pixels=max_pixels, progress=progress, say=say)
    for line in _summary(done, out):
        say(line)
    return done


def cut_tiles(
    files: FileSource,
    out: Path,
    cut: Cut,
    *,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
) -> Tiled:
    """Write the tiles of each image into a folder of its own below ``out``, which then is whole.

    A call that was stopped goes on when it is made again: images whose folder is there are not cut
    once more.  A tile is a PNG where it is grey or RGB of 8 bits, else an .npy of shape (C, H, W).
    Of one that keeps what is missing, the PNG has alpha and the .npy is of floats with NaN.

    Args:
        files: the images (`open_scenes`).
        out: a new folder, or one that an equal call began.
        cut: how they are cut.
        max_pixels: of images that have no windows and are decoded whole.
        progress: told (images done, images to do).
        say: hears what cannot be read.

    Returns:
        What was done.

    Raises:
        UserError: ``out`` holds something else or cannot be written, or nothing can be read.
    """
    _check(cut)
    done, folders = Tiled(), _folders(files)

    def work(index: int) -> None:
        _cut_into(out / folders[index], files.path(index), cut, max_pixels, done)

    try:
        _begin(out, files, cut)
        _through(files, work, done, progress, say)
    except OSError as error:
        what = f"the tiles cannot be written ({reason_of(error)}); {remedy(error)}"
        raise UserError(f"out={shown_name(out)}: {what}") from error
    return done


def list_tiles(
    files: FileSource,
    out: Path,
    cut: Cut,
    *,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
) -> Tiled:
    """Write a table of the same tiles, .csv or .tsv, which ``data=`` reads where they lie.

    It appears once it is complete.  Arguments and errors are those of `cut_tiles`.
    """
    _check(cut)
    labels, done = files.labels(), Tiled()
    names = [image_in_list(files.path(index), out, "out") for index in range(len(files))]
    if os.path.lexists(out) and not out.is_dir() and not is_window_list(out):
        what = "there is something else already; give the name of a new list"
        raise UserError(f"out={shown_name(out)}: {what}")
    with output(out) as new, new.open("w", encoding="utf-8", errors="surrogateescape") as handle:
        write = window_writer(handle, out, labelled=labels is not None)

        def work(index: int) -> None:
            label = None if labels is None else labels.names[labels.ids[index]]
            rows, empty = _rows_of(files.path(index), names[index], label, cut, max_pixels)
            write(rows)
            done.images += 1
            done.tiles += len(rows)
            done.empty += empty

        _through(files, work, done, progress, say)
    return done


def _rows_of(
    path: str, name: str, label: str | None, cut: Cut, max_pixels: int
) -> tuple[list[Row], int]:
    """What stands in the list of an image, and how many tiles were left out."""
    rows, empty = list[Row](), 0
    with reading_item(), closing(open_scene(path, cut.level, max_pixels)) as scene:
        for place, pixels in tiles_of(scene, cut):
            if pixels is None:
                empty += 1
            else:
                rows.append(Row(name, cut.level, place, (scene.width, scene.height), label))
    return rows, empty


def is_list(out: Path) -> bool:
    """Whether tiles are to be listed rather than cut; UserError for lists of other kinds."""
    if out.suffix.lower() in set(LIST_SUFFIXES) - set(TABLE_SUFFIXES):
        may = " or ".join(TABLE_SUFFIXES)
        raise UserError(f"out={shown_name(out)}: a list of tiles ends in {may}, a folder in none")
    return out.suffix.lower() in TABLE_SUFFIXES


def _check(cut: Cut) -> None:
    if cut.overlap >= cut.size:
        raise UserError(f"overlap={cut.overlap}: give less than size={cut.size}")


def _through(
    files: FileSource,
    work: Callable[[int], None],
    done: Tiled,
    progress: Callable[[int, int], None] | None,
    say: Say,
) -> None:
    """Every image, of which those that cannot be read are told; UserError where all are such."""
    for index in range(len(files)):
        try:
            work(index)
        except DecodeError as error:
            told = f"{shown_name(files.path(index))} is left out: it {error}"
            done.first_failure = done.first_failure or told
            done.failed += 1
            say(told)
        if progress is not None:
            progress(index + 1, len(files))
    if done.failed == len(files):
        raise data_error(files.name, f"nothing could be cut; {done.first_failure}")


def _folders(files: FileSource) -> list[str]:
    """A folder for each image, below ``out`` and without dots; those of equal names are told apart
    by number, as one would be taken for the other that was cut before.
    """
    names = dict[str, None]()
    for index in range(len(files)):
        name = files.key(index).lstrip("/").replace("..", "_").replace(".", "_")
        if name in names:
            name = f"{name}_{index}"
        while name in names:
            name += "_"
        names[name] = None
    return list(names)


def _summary(done: Tiled, out: Path) -> list[str]:
    """Sentences about it."""
    images = f"{done.images:,} image{'s' * (done.images != 1)}"
    told = [f"{done.tiles:,} tiles of {images}: {shown_name(out)}"]
    if done.empty:
        told.append(f"{done.empty:,} empty ones were left out (max_empty)")
    if done.kept:
        told.append(f"{done.kept:,} images had been cut before")
    if done.failed:
        told.append(f"{done.failed:,} could not be read and are left out")
    return told


def _begin(out: Path, files: FileSource, cut: Cut) -> None:
    """Note what the tiles in ``out`` are of; UserError where it holds others, or something else."""
    note, facts = out / _NOTE, {"data": files.fingerprint, **asdict(cut)}
    if not cut.keep_missing:
        del facts["keep_missing"]  # which earlier versions did not note
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        changed = [name for name in facts if before.get(name) != facts[name]]
        if changed:
            was = ", ".join(f"{name}={before.get(name)}" for name in changed if name != "data")
            what = (
                f"holds tiles of other settings ({was})" if was else "holds tiles of other images"
            )
            raise UserError(f"out={shown_name(out)} {what}: give these, or a new folder")
        return
    if any(out.iterdir()):
        raise UserError(f"out={shown_name(out)}: there is something already; give a new folder")
    with replacing(note) as room:
        room.write_text(json.dumps(facts), encoding="utf-8")


def _cut_into(folder: Path, path: str, cut: Cut, max_pixels: int, done: Tiled) -> None:
    """Make the folder of one image whole, unless it is; DecodeError of what cannot be read."""
    if folder.is_dir():
        done.kept += 1
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as room:
        room.mkdir()
        tiles, empty = _cut_one(path, room, cut, max_pixels)
    done.images += 1
    done.tiles += tiles
    done.empty += empty


def _cut_one(path: str, room: Path, cut: Cut, max_pixels: int) -> tuple[int, int]:
    """Numbers of tiles that were written and left out."""
    tiles = empty = 0
    with reading_item(), closing(open_scene(path, cut.level, max_pixels)) as scene:
        for (top, left, *_), pixels in tiles_of(scene, cut):
            if pixels is None:
                empty += 1
                continue
            _write(pixels, room / f"y{top:06d}_x{left:06d}")
            tiles += 1
    return tiles, empty


def tiles_of(scene: Scene, cut: Cut) -> Iterator[tuple[Box, np.ndarray | None]]:
    """Each tile's place and its pixels (C, h, w), None of an empty one; row after row.

    Masked where some are missing, if that is to be kept.
    """
    height, width = min(cut.size, scene.height), min(cut.size, scene.width)
    for top in _starts(scene.height, cut):
        for left in _starts(scene.width, cut):
            place = top, left, height, width
            found, known = scene.window(place)
            pixels = filled(found)
            is_empty = float(_is_empty(pixels, known).mean()) > cut.max_empty
            yield place, None if is_empty else found if cut.keep_missing else pixels


def _starts(length: int, cut: Cut) -> Sequence[int]:
    """Where tiles begin along an axis; the last one ends where the image does."""
    last = max(0, length - cut.size)
    return [*range(0, last, cut.size - cut.overlap), last]


def _is_empty(pixels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(h, w) bool of a tile (C, h, w): without data, black, or as bright as glass."""
    empty = ~known | (pixels == 0).all(0)
    if pixels.dtype == np.uint8 and len(pixels) == 3:
        low, high = pixels.min(0), pixels.max(0)
        empty |= (low >= _WHITE) & (high - low <= _GREYNESS)
    return empty


def _write(pixels: np.ndarray, place: Path) -> None:
    """``pixels``: masked where they are to be told missing."""
    if pixels.dtype == np.uint8 and len(pixels) in (1, 3):
        file = place.with_suffix(".png")
        pixels = _with_alpha(pixels) if isinstance(pixels, np.ma.MaskedArray) else pixels
        image = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)
        Image.fromarray(np.ascontiguousarray(image)).save(file)
    else:
        file = place.with_suffix(".npy")
        np.save(file, with_nan(pixels), allow_pickle=False)
    settle(file)


def _with_alpha(pixels: np.ma.MaskedArray[Any, Any]) -> np.ndarray:
    """(C + 1, h, w) of bytes, transparent where a channel is missing."""
    known = ~np.ma.getmaskarray(pixels).any(0, keepdims=True)
    return np.concatenate([filled(pixels), known * np.uint8(255)])
