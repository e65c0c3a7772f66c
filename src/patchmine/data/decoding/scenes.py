"""Images too large to decode at once, of which windows are read.

Scenes (GeoTIFF, JPEG 2000) are read by rasterio, slides by openslide, at a level of their pyramid;
other images are decoded whole.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from patchmine.data.decoding.arrays import with_gaps
from patchmine.data.decoding.bounds import DecodeError, decoding, missing, without_log
from patchmine.data.decoding.decode import decode, probe
from patchmine.data.decoding.orientation import Box
from patchmine.data.decoding.reading import open_regular
from patchmine.errors import reason_of

SCENE_SUFFIXES = (".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
# Of GDAL: no look at what lies beside a file; megabytes of blocks that all scenes of a process may
# keep, instead of a twentieth of the memory, which many workers have together.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 256}


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


def open_scene(path: str, level: int, max_pixels: int) -> Scene:
    """An image at a level of its pyramid, 0 the largest; raises DecodeError.

    ``max_pixels`` is for images that are decoded whole.
    """
    name = path.lower()
    try:
        with open_regular(path) as handle:  # a pipe or a device is told
            if name.endswith(SLIDE_SUFFIXES):
                return _slide(path, level)
            if name.endswith(SCENE_SUFFIXES):
                return _raster(path, level)
            if level:
                raise DecodeError(f"has no level {level}: only slides and TIFF may have some")
            return _whole(handle.read(), max_pixels)
    except OSError as error:
        raise DecodeError(f"cannot be read ({error.strerror or reason_of(error)})") from error


def _whole(data: bytes, max_pixels: int) -> Scene:
    pixels = decode(data, probe(data)[2], max_pixels).numpy()

    def window(place: Box) -> tuple[np.ndarray, np.ndarray]:
        top, left, height, width = place
        part = pixels[:, top : top + height, left : left + width].copy()
        return part, np.ones(part.shape[1:], bool)

    channels, height, width = pixels.shape
    kind = pixels.dtype.name
    return Scene(height, width, channels, kind, window, lambda: None, pixels.nbytes)


def _raster(path: str, level: int) -> Scene:
    if importlib.util.find_spec("rasterio") is None:
        command = "pip install 'patchmine[geo]'"
        raise missing("a scene of which windows are read", "rasterio", command)
    import rasterio
    from rasterio.enums import ColorInterp

    with _by_gdal():
        # No other drivers: some of GDAL's read further files, or run code.
        driver = "GTiff" if path.lower().endswith((".tif", ".tiff")) else "JP2OpenJPEG"
        image = rasterio.open(path, driver=driver)
        kinds = zip(image.indexes, image.colorinterp, strict=True)
        bands = [band for band, kind in kinds if kind != ColorInterp.alpha]
        dtype, levels = image.dtypes[0], 1 + len(image.overviews(1))
        if np.dtype(dtype).kind not in "uif":
            raise DecodeError(f"holds values of type {dtype}, which is no image")
        _refuse_level(level, levels)
        if level:
            image.close()
            image = rasterio.open(path, driver=driver, overview_level=level - 1)

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


def _slide(path: str, level: int) -> Scene:
    if importlib.util.find_spec("openslide") is None:
        raise missing("a slide", "openslide", "pip install 'patchmine[slides]'")
    import openslide

    with decoding("is no readable slide"):
        slide = openslide.OpenSlide(path)
        slide.set_cache(_slide_cache(os.getpid()))
        _refuse_level(level, slide.level_count)
        width, height = slide.level_dimensions[level]
        scale = slide.level_downsamples[level]

    def window(place: Box) -> tuple[np.ndarray, np.ndarray]:
        top, left, rows, columns = place
        corner = round(left * scale), round(top * scale)
        with decoding("is no readable slide"):
            pixels = np.asarray(slide.read_region(corner, level, (columns, rows)))
        known = pixels[..., 3] > 0
        colours = np.moveaxis(pixels[..., :3], 2, 0)
        return with_gaps(colours, np.broadcast_to(~known, colours.shape)), known

    return Scene(height, width, 3, "uint8", window, slide.close)


@lru_cache(maxsize=1)
def _slide_cache(process: int) -> Any:
    """For the decoded tiles of all slides of a process, where each would have one so large."""
    import openslide

    del process  # after a fork there is another, since a lock of this one may be held
    return openslide.OpenSlideCache(32 << 20)


def _refuse_level(level: int, count: int) -> None:
    if level >= count:
        raise DecodeError(f"has no level {level}, but {count} from 0 on")
