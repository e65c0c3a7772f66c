"""OME-Zarr (NGFF 0.1 to 0.5): the planes of the largest image of a pyramid, channels together.

The metadata of a group name its axes, of t, c, z, y and x, and the arrays of its levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchmine.data.decoding.bounds import DecodeError, check_pixels
from patchmine.data.decoding.reading import Facts

_ALL = "tczyx"
_GROUPS = ("plate", "well", "bioformats2raw.layout")
_WORK = 12  # bytes for each value beside the stored ones


@dataclass(frozen=True)
class Planes:
    """An array of two to five dimensions, by the letters of its axes: an item for each t and z."""

    array: Any
    axes: str

    @property
    def count(self) -> int:
        """How many planes there are."""
        return self._along("t") * self._along("z")

    def facts(self) -> Facts:
        """(height, width, channels, dtype name) of a plane."""
        sides = self._along("y"), self._along("x"), self._along("c")
        return *sides, np.dtype(self.array.dtype).name

    def image(self, number: int, max_pixels: int) -> np.ndarray:
        """(C, H, W) of a plane; those of a time follow each other.  DecodeError if too large."""
        height, width, channels, _ = self.facts()
        if number >= self.count:
            raise DecodeError(f"has no plane {number} any more; it has changed since it was listed")
        chunks = dict(zip(self.axes, self.array.chunks, strict=True))
        together = math.prod(chunks.get(axis, 1) for axis in "tz")  # planes that are unpacked
        work = channels * (np.dtype(self.array.dtype).itemsize * together + _WORK)
        check_pixels(height, width, max_pixels, stored=0, work=work)
        t, z = divmod(number, self._along("z"))
        place = tuple({"t": t, "z": z}.get(axis, slice(None)) for axis in self.axes)
        return np.ascontiguousarray(np.asarray(self.array[place]).reshape(-1, height, width))

    def _along(self, axis: str) -> int:
        return int(self.array.shape[self.axes.index(axis)]) if axis in self.axes else 1


def planes_of(group: Any) -> Planes | None:
    """The planes of a group of zarr's; None where it has no such metadata.

    Raises:
        DecodeError: it is one of several images, or its metadata or array are not as they should.
    """
    attributes = dict(group.attrs)
    told = attributes.get("ome", attributes)  # since 0.5
    if not isinstance(told, Mapping):
        return None
    if "multiscales" not in told:
        kind = next((name for name in _GROUPS if name in told), None)
        if kind is not None:
            what = f"is an OME-Zarr of several images ({kind})"
            raise DecodeError(f"{what}: put each of these into a folder that ends in .zarr")
        return None
    try:
        scales = told["multiscales"][0]
        axes = "".join(_letter(axis) for axis in scales.get("axes", _ALL))
        array = group[scales["datasets"][0]["path"]]
        shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        what = "has metadata of OME-Zarr that name no axes, or no array of pixels"
        raise DecodeError(f"{what} ({type(error).__name__}: {error})") from error
    if axes != "".join(axis for axis in _ALL if axis in axes) or not axes.endswith("yx"):
        raise DecodeError(f"has the axes {axes}; those read are some of t, c, z, then y, x")
    if len(shape) != len(axes) or dtype.kind not in "buif" or 0 in shape:
        what = f"holds an array of shape {shape} and type {dtype} for the axes {axes}"
        raise DecodeError(f"{what}, which is no image")
    return Planes(array, axes)


def _letter(axis: Any) -> str:
    """The name of an axis; before 0.4 it stood there by itself."""
    return str(axis["name"] if isinstance(axis, Mapping) else axis).lower()
