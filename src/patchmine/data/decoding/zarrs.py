"""zarr, by zarr-python: the images along the first axis of an array that lies in a folder.

The rule for the array is that of `hdf5`; of OME-Zarr the metadata tell (`ome`).  Only codecs that
are known to unpack numbers are used: one of them, pickle, runs code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from patchmine.data.decoding import stacks
from patchmine.data.decoding.bounds import DecodeError, decoding
from patchmine.data.decoding.ome import Planes, planes_of
from patchmine.data.decoding.reading import Contents, Facts, Reader

SUFFIXES, MAGIC = (".zarr",), ()
_DAMAGED = "is a truncated or damaged zarr folder"
_CODECS = {
    *("blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma", "delta", "shuffle", "packbits"),
    *("fixedscaleoffset", "quantize", "bitround", "astype", "crc32", "crc32c", "adler32"),
    *("bytes", "transpose", "sharding_indexed", "fletcher32"),
}


def count(file: Contents) -> int:
    """How many images a folder holds; 0 of one without.  DecodeError for damage."""
    with _opened(file) as found:
        if isinstance(found, Planes):
            return found.count
        return 0 if found is None else int(found.shape[0])


def probe(file: Contents, number: int) -> Facts:
    """(height, width, channels, dtype name) of an image; DecodeError."""
    with _opened(file) as found:
        del number  # all are alike
        return found.facts() if isinstance(found, Planes) else stacks.facts(found)


def read(file: Contents, number: int, channels: int, max_pixels: int) -> np.ndarray:
    """(C, H, W) of an image, as it is stored; DecodeError."""
    with _opened(file) as found:
        if isinstance(found, Planes):
            return found.image(number, max_pixels)
        # What the chunk of an image takes on the disk is not asked for: a default of max_pixels
        # believes in no chunk beyond half a gigabyte.
        stacks.check(found, number, 0, max_pixels)
        return stacks.image(found[number], channels)


@contextmanager
def _opened(file: Contents) -> Iterator[Any]:
    """The array of images in a folder, or the planes of OME-Zarr; None where there is neither."""
    import zarr

    if isinstance(file, bytes):
        raise DecodeError("is no folder; a zarr array is one")
    with decoding(_DAMAGED):
        node = zarr.open(Path(file), mode="r")
        planes = None if isinstance(node, zarr.Array) else planes_of(node)
        array = _array_of(node) if planes is None else planes.array
        if array is not None:
            _refuse_codecs(array.metadata.to_dict())
        yield planes or array


def _array_of(node: Any) -> Any:
    """The one array of images that is, or lies in, what zarr opened."""
    arrays = {"": node} if hasattr(node, "shape") else dict(node.arrays())
    return stacks.chosen({n: each for n, each in arrays.items() if stacks.holds_images(each)})


def _refuse_codecs(metadata: Any) -> None:
    """DecodeError for codecs that may do more than unpack numbers."""
    parts = [metadata.get(name) or [] for name in ("codecs", "filters", "compressor")]
    names = list[str]()

    def look(part: Any) -> None:
        if isinstance(part, dict):
            names.extend(str(part[key]) for key in ("id", "name") if key in part)
            for inner in part.get("configuration", {}).values():
                look(inner) if isinstance(inner, (list, tuple)) else None
        elif isinstance(part, (list, tuple)):
            for each in part:
                look(each)
        else:
            look(part.get_config() if hasattr(part, "get_config") else part.to_dict())

    for part in parts:
        look(part)
    other = next((n for n in names if n.removeprefix("numcodecs.") not in _CODECS), None)
    if other is not None:
        raise DecodeError(f"is packed by the codec {other[:40]}, which is not used here")


READER = Reader(count, probe, read)
