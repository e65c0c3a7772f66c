"""numpy's .npy files, whose header is checked against the length of the file."""

from __future__ import annotations

import io
import math

import numpy as np

from patchmine.data.decoding.bounds import DecodeError, decoding

MAGIC = b"\x93NUMPY"
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npy(data: bytes) -> np.ndarray:
    """The array, in the file's own memory.

    DecodeError for a damaged header, for what is no numbers, and for a file too short for it.
    """
    damaged = "is a truncated or damaged npy file"
    with decoding(damaged):
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        if version not in _READERS:  # 3.0 is for tables with names that are no Latin letters
            number = f"{version[0]}.{version[1]}"
            raise DecodeError(f"is an npy file of version {number}, which is no image")
        shape, fortran, dtype = _READERS[version](file)
    if dtype.kind not in "buif":
        kind = str(dtype)[:60]
        raise DecodeError(f"is an npy file that holds values of type {kind}, which is no image")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise DecodeError(f"{damaged} (its shape is none)")
    count, start = math.prod(shape), file.tell()
    if count * dtype.itemsize > len(data) - start:
        there = len(data) - start
        raise DecodeError(f"{damaged} ({there} bytes of values where shape {shape} has more)")
    if not count:
        return np.zeros(shape, dtype)
    values = np.frombuffer(data, dtype, count, start)
    return values.reshape(shape, order="F" if fortran else "C")
