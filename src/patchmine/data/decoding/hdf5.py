"""HDF5, by h5py: the images along the first axis of an array.

The array is the only one of numbers that has shape (N, H, W), (N, H, W, C) or (N, C, H, W), or of
several the one called images, image, data or x.  Links to other files, and values of Python
objects, are not followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from patchmine.data.decoding import stacks
from patchmine.data.decoding.bounds import decoding
from patchmine.data.decoding.reading import Contents, Facts, Reader, open_stored, stored_size

SUFFIXES, MAGIC = (".h5", ".hdf5", ".hdf"), ((0, b"\x89HDF\r\n\x1a\n"),)
_DAMAGED = "is a truncated or damaged HDF5 file"


def count(file: Contents) -> int:
    """How many images a file holds; 0 of one without.  DecodeError for damage."""
    with _opened(file) as (array, _):
        return 0 if array is None else int(array.shape[0])


def probe(file: Contents, number: int) -> Facts:
    """(height, width, channels, dtype name) of an image; DecodeError."""
    with _opened(file) as (array, _):
        del number  # all are alike
        return stacks.facts(array)


def read(file: Contents, number: int, channels: int, max_pixels: int) -> np.ndarray:
    """(C, H, W) of an image, as it is stored; DecodeError."""
    with _opened(file) as (array, stored):
        stacks.check(array, number, stored, max_pixels)
        return stacks.image(array[number], channels)


@contextmanager
def _opened(file: Contents) -> Iterator[tuple[Any, int]]:
    """The array of images in a file (None where there is none) and the bytes of the file."""
    import h5py

    with open_stored(file) as handle, decoding(_DAMAGED):
        stored = stored_size(handle)
        with h5py.File(handle, "r") as content:
            found = dict[str, Any]()

            def look(name: str, item: Any) -> None:
                inside = isinstance(item, h5py.Dataset) and not item.is_virtual
                if inside and not item.external and stacks.holds_images(item):
                    found[name] = item

            content.visititems(look)  # which follows no links
            yield stacks.chosen(found), stored


READER = Reader(count, probe, read)
