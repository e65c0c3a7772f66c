"""NIfTI, by nibabel: axial slices as a radiologist sees them.

Slices go from the feet to the head, those of a second volume in the file follow the first's.  In
each the front is at the top and the right side of the body at the left, as in DICOM, however the
voxels lie in the file.  Of an odd number of channels the middle one is the slice, the others are
its neighbours.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from patchmine.data.decoding.arrays import with_gaps
from patchmine.data.decoding.bounds import DecodeError, check_pixels, decoding, without_log
from patchmine.data.decoding.reading import Contents, Facts, Reader, open_stored, stored_size

_GZIP = b"\x1f\x8b"
SUFFIXES, MAGIC = (".nii", ".nii.gz"), ((344, b"n+1\0"), (4, b"n+2\0"), (0, _GZIP))
_DAMAGED = "is a truncated or damaged NIfTI file"
_EXPANSION = 1032  # bytes that deflate makes of one at most
_RIGHT, _FRONT, _UP = 0, 1, 2  # axes of the body
_COLOURS = {128: 3, 2304: 4}  # by the number of the type
_WORK = 12  # bytes for each value beside the stored ones


@dataclass(frozen=True)
class _Volume:
    """An opened file: ``axes[k]`` is the axis of its array along the k-th of the body's, and
    ``turned[k]`` whether its values run against it.
    """

    data: Any
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    turned: tuple[bool, ...]
    colours: int
    dtype: str
    stored: int

    @property
    def slices(self) -> int:
        """In one volume."""
        return self.shape[self.axes[_UP]]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a slice."""
        return self.shape[self.axes[_FRONT]], self.shape[self.axes[_RIGHT]]

    def plane(self, number: int, rest: tuple[int, ...]) -> np.ndarray:
        """(H, W) or (H, W, colours) of a slice of the volume ``rest``."""
        if self.turned[_UP]:
            number = self.slices - 1 - number
        place: list[Any] = [slice(None)] * 3
        place[self.axes[_UP]] = number
        plane = np.asarray(self.data[(*place, *rest)])
        if self.axes[_FRONT] > self.axes[_RIGHT]:
            plane = plane.T
        if not self.turned[_FRONT]:
            plane = plane[::-1]
        if not self.turned[_RIGHT]:
            plane = plane[:, ::-1]
        if plane.dtype.names:  # colours
            return np.stack([plane[name] for name in plane.dtype.names], 2)
        return plane


def count(file: Contents) -> int:
    """How many slices a file holds; DecodeError for damage."""
    with _opened(file) as volume:
        return volume.slices * math.prod(volume.shape[3:])


def probe(file: Contents, number: int) -> Facts:
    """(height, width, channels, dtype name) of a slice by itself; DecodeError."""
    with _opened(file) as volume:
        del number  # all are alike
        return *volume.size, volume.colours, volume.dtype


def read(file: Contents, number: int, channels: int, max_pixels: int) -> np.ndarray:
    """(C, H, W) uint8 or float32 of a slice, with neighbours as the channels ask; DecodeError.

    Masked where values are not finite.
    """
    with _opened(file) as volume:
        height, width = volume.size
        planes = channels if volume.colours == 1 and channels % 2 else 1
        # Where slices are not stored one after the other, the others are read too.
        spread = volume.slices if volume.axes[_UP] != 2 else planes
        work = _WORK * planes * volume.colours + spread * volume.data.dtype.itemsize
        check_pixels(height, width, max_pixels, stored=volume.stored, work=work)
        which, place = divmod(number, volume.slices)
        if which >= math.prod(volume.shape[3:]):
            raise DecodeError(f"has no slice {number} any more; it has changed since it was listed")
        rest = tuple(int(index) for index in np.unravel_index(which, volume.shape[3:]))
        numbers = range(place - planes // 2, place + planes // 2 + 1)
        nearest = [min(max(each, 0), volume.slices - 1) for each in numbers]
        found = [volume.plane(each, rest) for each in nearest]
    if volume.colours > 1:
        return np.ascontiguousarray(np.moveaxis(found[0], 2, 0))
    image = np.stack(found).astype(volume.dtype)
    return image if image.dtype == np.uint8 else with_gaps(image, ~np.isfinite(image))


@contextmanager
def _opened(file: Contents) -> Iterator[_Volume]:
    """A file, of which whatever goes wrong in reading it is a DecodeError."""
    with open_stored(file) as handle, decoding(_DAMAGED), without_log("nibabel.global"):
        stored = stored_size(handle)
        packed = handle.read(2) == _GZIP
        handle.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=handle)) if packed else handle
        yield _volume(stream, stored, stored * (_EXPANSION if packed else 1))


def _volume(stream: BinaryIO, stored: int, unpacked: int) -> _Volume:
    """``unpacked``: bytes that the file can hold."""
    import nibabel

    start = stream.read(348)
    stream.seek(0)
    kinds = {b"n+1\0": nibabel.Nifti1Image, b"n+2\0": nibabel.Nifti2Image}
    kind = kinds.get(start[344:348]) or kinds.get(start[4:8])
    if kind is None:
        raise DecodeError("is no NIfTI file in one piece (.nii, .nii.gz)")
    image = cast(Any, kind).from_stream(stream)
    data, header = image.dataobj, image.header
    shape = (*image.shape, *[1] * (3 - len(image.shape)))
    if min(shape, default=0) < 1:
        raise DecodeError(f"holds no pixels (its shape is {shape})")
    if data.offset + math.prod(shape) * data.dtype.itemsize > unpacked:
        raise DecodeError(f"{_DAMAGED} (shape {shape} is more than it has room for)")
    colours = _COLOURS.get(int(header["datatype"]), 1)
    if colours == 1 and data.dtype.kind not in "uif":
        raise DecodeError(f"holds values of type {data.dtype}, which is no image")
    plain = data.dtype == np.uint8 and (data.slope, data.inter) == (1, 0)
    orientation = cast(Any, nibabel).io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise DecodeError(f"{_DAMAGED} (it does not say where its voxels lie)")
    axes = tuple(int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3))
    turned = tuple(bool(orientation[axis, 1] < 0) for axis in axes)
    shown = data if len(image.shape) >= 3 else _Reshaped(data, shape)
    dtype = "uint8" if plain or colours > 1 else "float32"
    return _Volume(shown, shape, axes, turned, colours, dtype, stored)


class _Reshaped:
    """A flat picture as a volume of one slice."""

    def __init__(self, data: Any, shape: tuple[int, ...]) -> None:
        self.data, self.shape, self.dtype = data, shape, data.dtype

    def __getitem__(self, place: Any) -> np.ndarray:
        return np.asarray(self.data).reshape(self.shape)[place]


READER = Reader(count, probe, read)
