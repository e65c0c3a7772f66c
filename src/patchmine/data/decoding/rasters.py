"""TIFF and JPEG 2000 by rasterio: any bits and bands, and windows of them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from patchmine.data.decoding.arrays import with_gaps
from patchmine.data.decoding.bounds import DecodeError, decoding, missing, without_log
from patchmine.data.decoding.orientation import Box
from patchmine.data.decoding.reading import Contents

TIFF, JPEG_2000 = "GTiff", "JP2OpenJPEG"
# Of GDAL: no look at what lies beside a file; megabytes of blocks that all scenes of a process may
# keep, instead of a twentieth of the memory, and one thread, since many workers read together.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 256, "GDAL_NUM_THREADS": 1}


@dataclass(frozen=True)
class Scene:
    """An opened image, at a level of its pyramid.

    Attributes:
        height: in pixels of this level, as is ``width``.
        channels: of its pixels, whose type is called ``dtype``.
        window: gives (C, h, w) pixels, masked where there is no data, and (h, w) bool, where any
            are known; raises DecodeError.
        close: to be called in the end.
        held: bytes of pixels that it keeps in memory until then.
    """

    height: int
    width: int
    channels: int
    dtype: str
    window: Callable[[Box], tuple[np.ndarray, np.ndarray]]
    close: Callable[[], None]
    held: int = 0


def open_raster(file: Contents, driver: str, level: int = 0) -> Scene:
    """A TIFF or JPEG 2000 at a level of its pyramid, 0 the largest.

    Args:
        file: where it lies, or all of it.
        driver: `TIFF` or `JPEG_2000`: others of GDAL's read further files, or run code.
        level: of its pyramid.

    Raises:
        DecodeError: rasterio is missing, or it cannot read this.
    """
    if importlib.util.find_spec("rasterio") is None:
        command = "pip install 'patchmine[geo]'"
        raise missing("a scene or a JPEG 2000 of many bits or bands", "rasterio", command)
    import rasterio
    from rasterio.enums import ColorInterp

    opened = file if isinstance(file, str) else io.BytesIO(file)
    with _by_gdal():
        image = rasterio.open(opened, driver=driver)
        kinds = zip(image.indexes, image.colorinterp, strict=True)
        bands = [band for band, kind in kinds if kind != ColorInterp.alpha]
        dtype, levels = image.dtypes[0], 1 + len(image.overviews(1))
        if np.dtype(dtype).kind not in "uif":
            raise DecodeError(f"holds values of type {dtype}, which is no image")
        refuse_level(level, levels)
        if level:
            image.close()
            image = rasterio.open(opened, driver=driver, overview_level=level - 1)

    def window(place: Box) -> tuple[np.ndarray, np.ndarray]:
        top, left, height, width = place
        part = rasterio.windows.Window(left, top, width, height)
        with _by_gdal():
            pixels = image.read(bands, window=part)
            known = image.dataset_mask(window=part) > 0
        gaps = np.broadcast_to(~known, pixels.shape)
        if pixels.dtype.kind == "f":
            gaps = gaps | ~np.isfinite(pixels)
        return with_gaps(pixels, gaps), known

    return Scene(image.height, image.width, len(bands), dtype, window, image.close)


@contextmanager
def _by_gdal() -> Iterator[None]:
    import rasterio

    told = "is no readable TIFF or JPEG 2000"
    with decoding(told), without_log("rasterio"), rasterio.Env(**_GDAL):
        yield


def refuse_level(level: int, count: int) -> None:
    """DecodeError for a level that a pyramid of ``count`` does not have."""
    if level >= count:
        raise DecodeError(f"has no level {level}, but {count} from 0 on")
