"""Classes of pixels as colours: alone, over the picture they are of, and side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.tasks.settings import VOID

Pixels = NDArray[np.uint8]

_FIRST = (62, 64, 72)  # of class 0, the ground in most data
_LEVELS = (0, 43, 86, 128, 171, 213, 255)
_ROWS = 256  # of an image that are painted at a time
_DULL = 60  # a colour whose channels are closer together is grey to the eye


def class_colours(names: Sequence[str], palette: Mapping[str, Any]) -> Pixels:
    """(K, 3) RGB: those of the palette where it has colours; else ones that are told apart.

    Args:
        names: of the classes.
        palette: as the settings of a run have it.
    """
    own = [palette.get(name) for name in names if name != VOID]
    if names and all(isinstance(colour, tuple | list) for colour in own):
        return np.array(own, np.uint8)
    return _distinct(len(names))


def _distinct(count: int) -> Pixels:
    """So many colours, each as far as can be from all before it."""
    channels = np.array(np.meshgrid(_LEVELS, _LEVELS, _LEVELS)).reshape(3, -1).T
    candidates = channels[np.ptp(channels, axis=1) >= _DULL]
    chosen = [np.array(_FIRST)]
    nearest = np.linalg.norm(_perceived(candidates) - _perceived(chosen[0]), axis=1)
    while len(chosen) < count:
        place = int(nearest.argmax())  # of more classes than candidates the last ones look alike
        chosen.append(candidates[place])
        distance = np.linalg.norm(_perceived(candidates) - _perceived(chosen[-1]), axis=1)
        nearest = np.minimum(nearest, distance)
    return np.array(chosen[:count], np.uint8).reshape(-1, 3)


def _perceived(colours: NDArray[Any]) -> NDArray[np.float64]:
    """(..., 3) in which distances are about those that are seen (Oklab, Ottosson 2020)."""
    shares = colours / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            (0.4122214708, 0.5363325363, 0.0514459929),
            (0.2119034982, 0.6806995451, 0.1073969566),
            (0.0883024619, 0.2817188376, 0.6299787005),
        ]
    )
    lab = np.array(
        [
            (0.2104542553, 0.7936177850, -0.0040720468),
            (1.9779984951, -2.4285922050, 0.4505937099),
            (0.0259040371, 0.7827717662, -0.8086757660),
        ]
    )
    return np.asarray(np.cbrt(linear @ cones.T) @ lab.T)


def overlay(picture: Pixels, classes: NDArray[Any], colours: Pixels) -> Pixels:
    """(H, W, 3): the picture, half of it the colours of its classes, and their borders in full."""
    drawn = np.empty((*classes.shape, 3), np.uint8)
    for top in range(0, len(classes), _ROWS):  # large images need little beside the result
        rows = slice(top, top + _ROWS)
        own, painted = classes[rows], colours[classes[rows]]
        mixed = (picture[rows] // 2) + (painted // 2)
        borders = np.zeros(own.shape, bool)
        borders[:, 1:] |= own[:, 1:] != own[:, :-1]
        borders[1:] |= own[1:] != own[:-1]
        if top:
            borders[0] |= own[0] != classes[top - 1]
        mixed[borders] = painted[borders]
        drawn[rows] = mixed
    return drawn
