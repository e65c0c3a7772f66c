"""Which of the images in a folder are the frames of one video.

Optical flow, depth and masks are often kept beside the frames, under names of their own:
``img_00001.jpg``, ``flow_x_00001.jpg``, ``flow_y_00001.jpg``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from patchmine.data.decoding.decode import DecodeError

OTHER_SERIES = "images of another series than the frames'"

AUXILIARY = {
    *(
        "flow",
        "flows",
        "flowx",
        "flowy",
        "optflow",
        "tvl",
        "depth",
        "depths",
        "disp",
        "disparity",
        "normal",
        "normals",
    ),
    *(
        "mask",
        "masks",
        "matte",
        "alpha",
        "seg",
        "segm",
        "segmentation",
        "label",
        "labels",
        "annotation",
        "gt",
        "edge",
    ),
    *("edges", "pose", "keypoints", "heatmap", "heat", "thumb", "thumbnail", "thumbs", "preview"),
}
"""Words in the name of a series by which it is not the video itself but what was worked out from
it.
"""

_CAMERA = re.compile(r"((?:cam|camera|view|sensor|lens)[ _-]?)(\d+)")
_NUMBER = re.compile(r"\d+")


def frames_of(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of the frames, and those of other series, each in the order given.

    Names that differ in their numbers alone are one series, beside which names without a number do
    not count.  Several series are one video as long as no number comes twice.  Else the series
    without a word of `AUXILIARY` in its name is the video.

    Raises:
        DecodeError: where that leaves several series, or none.
    """
    series: dict[str, list[str]] = {}
    numbers: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        pattern, number = _pattern(name)
        series.setdefault(pattern, []).append(name)
        numbers.setdefault(pattern, set()).add(number)
    if any(pattern and len(found) > 1 for pattern, found in numbers.items()):
        numbers.pop(
            "", None
        )  # beside numbered frames, a name without a number is a cover or a poster
    chosen = list(numbers)
    if _collide(list(numbers.values())):
        chosen = [
            pattern for pattern in numbers if not AUXILIARY & {*re.split(r"[^a-z]+", pattern)}
        ]
    if (numbers and not chosen) or _collide([numbers[pattern] for pattern in chosen]):
        found = sorted(chosen or numbers)
        more = f" and {len(found) - 4:,} more" if len(found) > 4 else ""
        raise DecodeError(
            f"holds several series of frames ({', '.join(found[:4])}{more}): keep those of one video in a folder"
        )
    kept = {name for pattern in chosen for name in series[pattern]}
    return [name for name in names if name in kept], [name for name in names if name not in kept]


def _pattern(name: str) -> tuple[str, tuple[int, ...]]:
    """A name with ``#`` in the place of its numbers, and these; a name without numbers is a frame
    of its own.
    """
    lower = os.path.basename(name.lower())  # noqa: PTH119, once per frame
    # The number of a camera belongs to the name of its series; so do digits in the ending, as in
    # `.jp2`.
    stem, dot, ending = lower.rpartition(".")
    stem, ending = (stem, dot + ending) if dot else (ending, "")
    stem = _CAMERA.sub(
        lambda found: found[1] + "".join(chr(ord("A") + int(digit)) for digit in found[2]), stem
    )
    numbers = tuple(int(number[-18:]) for number in _NUMBER.findall(stem))
    return (_NUMBER.sub("#", stem) + ending, numbers) if numbers else ("", (hash(lower),))


def _collide(numbers: list[set[tuple[int, ...]]]) -> bool:
    return len(set().union(*numbers)) < sum(map(len, numbers))
