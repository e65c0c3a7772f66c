"""``embedded:moving-photos``: clips that a moving camera takes of the embedded photographs; the
class is the motion.

A data set of videos that needs no network and no video decoder.  Eight motions at random speeds
over random places: what a single frame shows says next to nothing about the class.  The training
clips come from one half of every photograph, the test clips from the other, as in `data.photos`.  A
clip is a function of its number alone.
"""

from __future__ import annotations

import difflib
import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Labels, Source, fingerprint_of
from patchmine.data.sources.photos import PHOTOGRAPHS, half_of_photograph, photo_folder
from patchmine.errors import UserError

NAMES = ("embedded:moving-photos", "embedded:moving-photos/train", "embedded:moving-photos/test")
MOTIONS = (
    "pan-left",
    "pan-right",
    "pan-up",
    "pan-down",
    "zoom-in",
    "zoom-out",
    "rotate-left",
    "rotate-right",
)
"""Where the camera goes; what it sees goes the other way."""
CLIPS = {"train": 12_000, "test": 1_600}
FRAMES, SIDE = 16, 64
"""Frames of a clip; height and width of a frame, pixels."""

# Slowest and fastest, over the whole clip: pixels of the frame, growth of what is seen, degrees.
_PAN, _ZOOM, _TURN = (10.0, 30.0), (1.25, 1.8), (20.0, 70.0)
# Sides of what the camera sees, shares of the shorter side of its half of the photograph.
_VIEWED = (0.25, 0.5)


class Shot(NamedTuple):
    """One clip: photograph, motion, how far it goes, and the view in its middle (centre and side,
    pixels; degrees).
    """

    photograph: int
    motion: int
    amount: float
    row: float
    column: float
    side: float
    angle: float


class MovingPhotos:
    """The clips of one part, ``train`` or ``test``, taken when they are read."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.name = f"embedded:moving-photos/{part}"
        photo_folder(self.name)  # a missing scikit-image is said now, not by the first worker
        facts = f"{part} {PHOTOGRAPHS} {MOTIONS} {CLIPS[part]} {FRAMES} {SIDE} {_PAN} {_ZOOM} {_TURN} {_VIEWED}"
        self.fingerprint = fingerprint_of([facts.encode()])

    def __len__(self) -> int:
        return CLIPS[self.part]

    def read(self, index: int) -> NDArray[np.uint8]:
        """(16, 64, 64, 3) uint8."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        photographs = _photographs(self.part)
        shot = draw_shot(
            self.part, index, [(levels[0].shape[-2], levels[0].shape[-1]) for levels in photographs]
        )
        return film(photographs[shot.photograph], shot)

    def path(self, index: int) -> str:
        """``embedded:moving-photos/train/pan-left/00123``."""
        return f"{self.name}/{self.key(index)}"

    def key(self, index: int) -> str:
        """``pan-left/00123``."""
        return f"{MOTIONS[index % len(MOTIONS)]}/{index:05d}"

    def labels(self) -> Labels:
        """The motions."""
        names = sorted(MOTIONS)
        number = np.array([names.index(motion) for motion in MOTIONS], np.int64)
        return Labels(number[np.arange(len(self)) % len(MOTIONS)], names)


def open_moving_photos(name: str) -> Source:
    """The training clips, the test clips, or both.  UserError for another name, or without
    scikit-image.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5) or NAMES
        raise UserError(f"data={name}: no such embedded videos; did you mean {' or '.join(close)}?")
    if name == NAMES[0]:
        both = Joined([MovingPhotos(part) for part in CLIPS])
        both.name = name
        return both
    return MovingPhotos(name.rpartition("/")[2])


@cache
def _photographs(part: str) -> list[list[Tensor]]:
    """The levels of each photograph; read once per process, and shared with workers that are forked
    later.
    """
    name = f"embedded:moving-photos/{part}"
    halves = [
        half_of_photograph(photo_folder(name), number, part, name)
        for number in range(len(PHOTOGRAPHS))
    ]
    return [levels_of(torch.from_numpy(np.array(half)).permute(2, 0, 1).float()) for half in halves]


def levels_of(photograph: Tensor) -> list[Tensor]:
    """(3, H, W) float32 in bytes, and the same shrunk to a half, a quarter, ... as long as a frame
    fits.
    """
    levels = [photograph]
    while min(levels[-1].shape[-2:]) >= 2 * SIDE:
        levels.append(F.avg_pool2d(levels[-1][None], 2)[0])
    return levels


def draw_shot(part: str, index: int, sizes: list[tuple[int, int]]) -> Shot:
    """Clip ``index`` of a part, over photographs of these (height, width); all that it shows lies
    inside.
    """
    generator = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence((list(CLIPS).index(part), index)))
    )
    motion = index % len(MOTIONS)
    photograph = int(generator.integers(len(sizes)))
    height, width = sizes[photograph]
    slowest, fastest = (_PAN, _PAN, _ZOOM, _TURN)[motion // 2]
    amount = float(generator.uniform(slowest, fastest))
    angle = float(generator.uniform(-10, 10))
    side = min(height, width) * float(generator.uniform(*_VIEWED))
    reach = _reach(motion, amount, angle) * side  # from the centre of the view in its middle
    room = min(height, width) / 2 - 1
    if reach > room:
        side, reach = side * room / reach, room
    row, column = (
        float(generator.uniform(reach, length - 1 - reach)) for length in (height, width)
    )
    return Shot(photograph, motion, amount, row, column, side, angle)


def _reach(motion: int, amount: float, angle: float) -> float:
    """How far from its middle a clip looks along either axis at most, in sides of the view."""
    if motion < 4:
        tilt = math.radians(abs(angle))
        return (math.cos(tilt) + math.sin(tilt)) / 2 + amount / SIDE / 2
    return math.sqrt(0.5) * (math.sqrt(amount) if motion < 6 else 1.0)


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
    return _sample(levels, rows, columns, side, angle)


def _sample(
    levels: list[Tensor], rows: Tensor, columns: Tensor, side: Tensor, angle: Tensor
) -> NDArray[np.uint8]:
    # Of the level at which a pixel of the widest view is about one of its own, so that there is no
    # aliasing.
    level = min(len(levels) - 1, max(0, round(math.log2(float(side.max()) / SIDE))))
    shrunk = levels[level]
    across = ((torch.arange(SIDE) + 0.5) / SIDE - 0.5) * side[
        :, None
    ]  # (T, 64), pixels from the centre
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    down, right = across[:, :, None], across[:, None, :]
    y = rows[:, None, None] + cosine * down - sine * right
    x = columns[:, None, None] + sine * down + cosine * right
    # In shares of the sides, from -1 to 1; shrinking has cut off an odd last row or column.
    full_height, full_width = (length << level for length in shrunk.shape[1:])
    places = torch.stack([(2 * x + 1) / full_width - 1, (2 * y + 1) / full_height - 1], -1)
    frames = F.grid_sample(
        shrunk[None].expand(len(rows), -1, -1, -1),
        places,
        padding_mode="border",
        align_corners=False,
    )
    return frames.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
