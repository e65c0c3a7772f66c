"""``embedded:photos``: the photographs inside scikit-image's wheel, cut into crops; the class is
the photograph.

A data set that needs no network: the demo pre-trains on it.  Training crops come from one half of
every photograph, test crops from the other, so that a test crop shows what no training crop shows.
The files are read where the wheel has put them; scikit-image itself is not imported, and never
asked to fetch anything.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Labels, Source, fingerprint_of
from patchmine.errors import UserError

NAMES = ("embedded:photos", "embedded:photos/train", "embedded:photos/test")

# Without one of the stereo pair, drawings, text, and what is smaller than 300 pixels or nearly
# empty.
PHOTOGRAPHS = (
    *(
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
    ),
    *(
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
)
SIDE = 64
"""Height and width of a crop, pixels."""
WINDOWS = (64, 96, 128)
"""Sides of the squares that are cut out and shrunk to crops, pixels of the photograph.

By the 20 nearest training crops, raw pixels tell the photograph of 41 % of the test crops; chance
is 7 %.
"""
CROPS = {"train": 70, "test": 20}
"""Crops of every photograph and window."""


class Cut(NamedTuple):
    """Where a crop comes from: number of the photograph, corner and side of the square in its half."""

    photograph: int
    top: int
    left: int
    side: int


class PhotoCrops:
    """The crops of one part, ``train`` or ``test``, cut when they are read."""

    def __init__(self, part: str, folder: Path) -> None:
        self.part, self.folder = part, folder
        self.name = f"embedded:photos/{part}"
        self._halves: dict[int, Image.Image] = {}
        self._cuts = [
            Cut(number, top, left, min(window, *size))
            for number in range(len(PHOTOGRAPHS))
            for size in [_half_box(self._size(number), part)[2:]]
            for window in WINDOWS
            for top, left in _grid(size[0], size[1], min(window, *size), CROPS[part])
        ]
        self.fingerprint = fingerprint_of([f"{part} {PHOTOGRAPHS} {SIDE} {self._cuts}".encode()])

    def __len__(self) -> int:
        return len(self._cuts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_halves": {}}

    def read(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(64, 64, 3) uint8."""
        cut = self._cuts[index]
        # The half is cut out first: resizing a box of the whole would look a few pixels across the
        # border.
        box = (cut.left, cut.top, cut.left + cut.side, cut.top + cut.side)
        return np.array(
            self._half(cut.photograph).crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        )

    def path(self, index: int) -> str:
        """``embedded:photos/train/coffee/00123``."""
        return f"{self.name}/{self.key(index)}"

    def key(self, index: int) -> str:
        """``coffee/00123``."""
        return f"{Path(PHOTOGRAPHS[self._cuts[index].photograph]).stem}/{index:05d}"

    def labels(self) -> Labels:
        """The photographs."""
        return Labels(
            np.array([cut.photograph for cut in self._cuts], np.int64),
            [Path(file).stem for file in PHOTOGRAPHS],
        )

    def _size(self, number: int) -> tuple[int, int]:
        with _open(self.folder, number, self.name) as image:
            return image.size

    def _half(self, number: int) -> Image.Image:
        if number not in self._halves:
            self._halves[number] = half_of_photograph(self.folder, number, self.part, self.name)
        return self._halves[number]


def open_photos(name: str) -> Source:
    """The training crops, the test crops, or both.  UserError for another name, or without
    scikit-image.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5) or NAMES
        raise UserError(f"data={name}: no such embedded data; did you mean {' or '.join(close)}?")
    folder = photo_folder(name)
    if name == "embedded:photos":
        both = Joined([PhotoCrops(part, folder) for part in CROPS])
        both.name = name
        return both
    return PhotoCrops(name.rpartition("/")[2], folder)


def photo_folder(name: str) -> Path:
    """Where scikit-image keeps the photographs.  UserError about ``data=name`` where there is no
    scikit-image.
    """
    wheel = importlib.util.find_spec("skimage")
    if wheel is None or not wheel.submodule_search_locations:
        raise UserError(
            f"data={name}: the photographs come with scikit-image, which is missing: pip install 'patchmine[demo]'"
        )
    return Path(wheel.submodule_search_locations[0]) / "data"


def half_of_photograph(folder: Path, number: int, part: str, name: str) -> Image.Image:
    """The half of a photograph that ``part`` ("train" or "test") shows, in RGB.  UserError about
    ``data=name``.
    """
    with _open(folder, number, name) as image:
        top, left, height, width = _half_box(image.size, part)
        return image.convert("RGB").crop((left, top, left + width, top + height))


def _open(folder: Path, number: int, name: str) -> Image.Image:
    file = folder / PHOTOGRAPHS[number]
    try:
        return Image.open(file)
    except OSError as error:
        raise UserError(
            f"data={name}: this scikit-image carries no readable {file.name}; install scikit-image>=0.24"
        ) from error


def _half_box(size: tuple[int, int], part: str) -> tuple[int, int, int, int]:
    """Top, left, height, width of a part's half: left or right, of a tall photograph top or bottom."""
    width, height = size
    second = part == "test"
    if width >= height:
        return 0, (width - width // 2) * second, height, width // 2
    return (height - height // 2) * second, 0, height // 2, width


def _grid(height: int, width: int, side: int, count: int) -> list[tuple[int, int]]:
    """``count`` corners (top, left) of squares, spread evenly over the area, in raster order."""
    rows = max(1, round(math.sqrt(count * (height - side + 1) / (width - side + 1))))
    columns = math.ceil(count / rows)
    tops = np.linspace(0, height - side, rows).round().astype(int)
    lefts = np.linspace(0, width - side, columns).round().astype(int)
    corners = [(int(top), int(left)) for top in tops for left in lefts]
    chosen = np.linspace(0, len(corners) - 1, count).round().astype(int)
    return [corners[number] for number in chosen]
