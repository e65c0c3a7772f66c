"""numpy's .npy files, whose header is checked against the length of the file before an array is
made of it.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np

from patchmine.data.decoding.bounds import DecodeError, decoding

MAGIC = b"\x93NUMPY"
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class NpyHeader(NamedTuple):
    """Shape, type, whether the first axis varies fastest, and where the values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int


def read_npy_header(data: bytes) -> NpyHeader:
    """Raises DecodeError for a damaged header, for what is no numbers, and for a file that is
    shorter than it says.
    """
    with decoding("is a truncated or damaged npy file"):
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        if version not in _READERS:  # 3.0 is for tables with names that are no Latin letters
            raise DecodeError(
                f"is an npy file of version {version[0]}.{version[1]}, which is no image"
            )
        shape, fortran, dtype = _READERS[version](file)
    if dtype.kind not in "buif":
        raise DecodeError(
            f"is an npy file that holds values of type {str(dtype)[:60]}, which is no image"
        )
    if not all(
        isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape
    ):
        raise DecodeError("is a truncated or damaged npy file (its shape is none)")
    needed, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if needed > there:
        raise DecodeError(
            f"is a truncated or damaged npy file ({there} bytes of values where shape {shape} has more)"
        )
    return NpyHeader(shape, dtype, fortran, file.tell())


def read_npy(data: bytes, header: NpyHeader) -> np.ndarray:
    """The array, in the file's own memory."""
    count = math.prod(header.shape)
    if not count:
        return np.zeros(header.shape, header.dtype)
    values = np.frombuffer(data, header.dtype, count, header.start)
    return values.reshape(header.shape, order="F" if header.fortran else "C")
