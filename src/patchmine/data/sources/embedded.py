"""Data sets that need no network, cut out of the photographs inside scikit-image's wheel.

``embedded:photos``: crops, whose class is the photograph.  ``embedded:moving-photos``: clips that a
moving camera takes, whose class is the motion.  Train and test show different halves of each.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Kind, Labels, Source, data_error, fingerprint_of

PHOTOS, MOVING = "embedded:photos", "embedded:moving-photos"

# Without one of the stereo pair, drawings, text, and what is smaller than 300 pixels or nearly
# empty.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
SIDE = 64
"""Height and width of a crop and of a frame, pixels."""
WINDOWS = (64, 96, 128)
"""Sides of the squares that are cut out and shrunk to crops, pixels of the photograph.

By the 20 nearest training crops, raw pixels tell the photograph of 41 % of the test crops; chance
is 7 %.
"""
CROPS = {"train": 70, "test": 20}
"""Crops of every photograph and window."""

# Where the camera goes; what it sees goes the other way.
MOTIONS = (
    *("pan-left", "pan-right", "pan-up", "pan-down"),
    *("zoom-in", "zoom-out", "rotate-left", "rotate-right"),
)
CLIPS = {"train": 12_000, "test": 1_600}
FRAMES = 16

# Slowest and fastest, over the whole clip: pixels of the frame, growth of what is seen, degrees.
_PAN, _ZOOM, _TURN = (10.0, 30.0), (1.25, 1.8), (20.0, 70.0)
# Sides of what the camera sees, shares of the shorter side of its half of the photograph.
_VIEWED = (0.25, 0.5)


class Cut(NamedTuple):
    """A crop: number of the photograph, and corner and side of the square in its half."""

    photograph: int
    top: int
    left: int
    side: int


class _Embedded(Source):
    """A part, ``train`` or ``test``, whose item 123 has the key ``coffee/00123`` by its class."""

    classes: ClassVar[tuple[str, ...]]

    def __init__(self, base: str, part: str, facts: str, classes: NDArray[np.int64]) -> None:
        super().__init__(f"{base}/{part}", fingerprint_of([facts.encode()]))
        self.part, self._classes = part, classes

    def __len__(self) -> int:
        return len(self._classes)

    def path(self, index: int) -> str:
        return f"{self.name}/{self.key(index)}"

    def key(self, index: int) -> str:
        return f"{self.classes[self._classes[index]]}/{index:05d}"

    def labels(self) -> Labels:
        return Labels(self._classes, list(self.classes))


class PhotoCrops(_Embedded):
    """The crops of one part, cut when they are read."""

    classes = tuple(file.rpartition(".")[0] for file in PHOTOGRAPHS)

    def __init__(self, part: str) -> None:
        self.cuts = [
            Cut(number, top, left, side)
            for number in range(len(PHOTOGRAPHS))
            for height, width in [half_box(number, part)[2:]]
            for side in (min(window, height, width) for window in WINDOWS)
            for top, left in grid(height, width, side, CROPS[part])
        ]
        facts = f"{part} {PHOTOGRAPHS} {SIDE} {self.cuts}"
        super().__init__(PHOTOS, part, facts, np.array([cut.photograph for cut in self.cuts]))

    def read(self, index: int) -> NDArray[np.uint8]:
        """(64, 64, 3) uint8."""
        number, top, left, side = self.cuts[index]
        # Cut out of the half first: resizing a box of the whole would look across the border.
        square = _half(number, self.part).crop((left, top, left + side, top + side))
        return np.array(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


class MovingPhotos(_Embedded):
    """The clips of one part, taken when read; a clip is a function of its number alone."""

    classes = tuple(sorted(MOTIONS))

    def __init__(self, part: str) -> None:
        photo_folder()  # a missing scikit-image is told now, not by the first worker
        settings = f"{CLIPS[part]} {FRAMES} {SIDE} {_PAN} {_ZOOM} {_TURN} {_VIEWED}"
        facts = f"{part} {PHOTOGRAPHS} {MOTIONS} {settings}"
        numbers = np.array([self.classes.index(motion) for motion in MOTIONS])
        super().__init__(MOVING, part, facts, np.resize(numbers, CLIPS[part]))

    def read(self, index: int) -> NDArray[np.uint8]:
        """(16, 64, 64, 3) uint8."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        photographs = _levels(self.part)
        sizes = [(levels[0].shape[-2], levels[0].shape[-1]) for levels in photographs]
        shot = draw_shot(self.part, index, sizes)
        return film(photographs[shot.photograph], shot)


def open_embedded(name: str, kind: Kind) -> Source:
    """The training part, the test part, or both; UserError for another name, or without them."""
    base, part_of = (PHOTOS, PhotoCrops) if kind.name == "image" else (MOVING, MovingPhotos)
    names = (base, f"{base}/train", f"{base}/test")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=2, cutoff=0.5) or names
        what = f"no such embedded {kind.name}s; did you mean {' or '.join(close)}?"
        raise data_error(name, what)
    if name == base:
        return Joined([part_of("train"), part_of("test")], name)
    return part_of(name.rpartition("/")[2])


def photo_folder() -> Path:
    """Where scikit-image, which is not imported, keeps the photographs; UserError without it."""
    wheel = importlib.util.find_spec("skimage")
    if wheel is None or not wheel.submodule_search_locations:
        what = "the photographs come with scikit-image, which is missing"
        raise data_error(PHOTOS, f"{what}: pip install 'patchmine[demo]'")
    return Path(wheel.submodule_search_locations[0]) / "data"


def open_photograph(number: int) -> Image.Image:
    """A photograph as it is stored; UserError where it is missing."""
    file = photo_folder() / PHOTOGRAPHS[number]
    try:
        return Image.open(file)
    except OSError as error:
        what = f"this scikit-image carries no readable {file.name}; install scikit-image>=0.24"
        raise data_error(PHOTOS, what) from error


def half_box(number: int, part: str) -> tuple[int, int, int, int]:
    """Top, left, height, width of a part's half: left or right, of a tall one top or bottom."""
    with open_photograph(number) as image:
        width, height = image.size
    second = part == "test"
    if width >= height:
        return 0, (width - width // 2) * second, height, width // 2
    return (height - height // 2) * second, 0, height // 2, width


@cache
def _half(number: int, part: str) -> Image.Image:
    """The half of a photograph that a part shows, in RGB; read once per process."""
    top, left, height, width = half_box(number, part)
    with open_photograph(number) as image:
        return image.convert("RGB").crop((left, top, left + width, top + height))


def grid(height: int, width: int, side: int, count: int) -> list[tuple[int, int]]:
    """``count`` corners (top, left) of squares, spread evenly over the area, in raster order."""
    rows = max(1, round(math.sqrt(count * (height - side + 1) / (width - side + 1))))
    columns = math.ceil(count / rows)
    tops = np.linspace(0, height - side, rows).round().astype(int)
    lefts = np.linspace(0, width - side, columns).round().astype(int)
    corners = [(int(top), int(left)) for top in tops for left in lefts]
    chosen = np.linspace(0, len(corners) - 1, count).round().astype(int)
    return [corners[number] for number in chosen]


@cache
def _levels(part: str) -> list[list[Tensor]]:
    """The levels of each half; made once per process, and shared with workers forked later."""
    halves = [np.array(_half(number, part)) for number in range(len(PHOTOGRAPHS))]
    return [levels_of(torch.from_numpy(half).permute(2, 0, 1).float()) for half in halves]


def levels_of(photograph: Tensor) -> list[Tensor]:
    """(3, H, W) float32, and the same shrunk to a half, a quarter, ... while a frame fits."""
    levels = [photograph]
    while min(levels[-1].shape[-2:]) >= 2 * SIDE:
        levels.append(F.avg_pool2d(levels[-1][None], 2)[0])
    return levels


class Shot(NamedTuple):
    """One clip: photograph, motion, its reach, and its middle view in pixels and degrees."""

    photograph: int
    motion: int
    amount: float
    row: float
    column: float
    side: float
    angle: float


def draw_shot(part: str, index: int, sizes: list[tuple[int, int]]) -> Shot:
    """Clip ``index`` of a part over photographs of these (height, width), which it never leaves."""
    seed = np.random.SeedSequence((list(CLIPS).index(part), index))
    generator = np.random.Generator(np.random.PCG64(seed))
    motion = index % len(MOTIONS)
    photograph = int(generator.integers(len(sizes)))
    height, width = sizes[photograph]
    amount = float(generator.uniform(*(_PAN, _PAN, _ZOOM, _TURN)[motion // 2]))
    angle = float(generator.uniform(-10, 10))
    side = min(height, width) * float(generator.uniform(*_VIEWED))
    # How far from its middle a clip looks along either axis at most.
    if motion < 4:
        tilt = math.radians(abs(angle))
        reach = side * ((math.cos(tilt) + math.sin(tilt)) / 2 + amount / SIDE / 2)
    else:
        reach = side * (math.sqrt(0.5) * (math.sqrt(amount) if motion < 6 else 1.0))
    room = min(height, width) / 2 - 1
    if reach > room:
        side, reach = side * room / reach, room
    row, column = (
        float(generator.uniform(reach, length - 1 - reach)) for length in sizes[photograph]
    )
    return Shot(photograph, motion, amount, row, column, side, angle)


def film(levels: list[Tensor], shot: Shot) -> NDArray[np.uint8]:
    """(16, 64, 64, 3) uint8: the frames of a shot over a photograph, given by its levels."""
    way = torch.linspace(-0.5, 0.5, FRAMES)
    if shot.motion % 2 == 0:  # left, up, in and left again: the first of each pair
        way = -way
    side, angle = torch.full((FRAMES,), shot.side), torch.full((FRAMES,), math.radians(shot.angle))
    rows, columns = torch.full((FRAMES,), shot.row), torch.full((FRAMES,), shot.column)
    if shot.motion < 2:
        columns = columns + way * shot.amount * shot.side / SIDE
    elif shot.motion < 4:
        rows = rows + way * shot.amount * shot.side / SIDE
    elif shot.motion < 6:
        side = side * shot.amount**way  # the view shrinks where the camera comes nearer
    else:
        angle = angle - way * math.radians(shot.amount)
    # Of the level at which a pixel of the widest view is about one of its own: no aliasing.
    level = min(len(levels) - 1, max(0, round(math.log2(float(side.max()) / SIDE))))
    shrunk = levels[level]
    # Places in the photograph, pixels: the frame's grid from its centre, scaled, turned, moved.
    across = ((torch.arange(SIDE) + 0.5) / SIDE - 0.5) * side[:, None]  # (T, 64)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    down, right = across[:, :, None], across[:, None, :]
    y = rows[:, None, None] + cosine * down - sine * right
    x = columns[:, None, None] + sine * down + cosine * right
    # In shares of the sides, from -1 to 1; shrinking has cut off an odd last row or column.
    full_height, full_width = (length << level for length in shrunk.shape[1:])
    places = torch.stack([(2 * x + 1) / full_width - 1, (2 * y + 1) / full_height - 1], -1)
    images = shrunk[None].expand(FRAMES, -1, -1, -1)
    frames = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    return frames.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
