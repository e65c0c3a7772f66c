"""Images too large to decode at once, of which windows are read.

Scenes (GeoTIFF, JPEG 2000) are read by rasterio, slides by openslide, at a level of their pyramid;
other images are decoded whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchmine.data.decoding.arrays import without_gaps
from patchmine.data.decoding.bounds import DecodeError, decoding, missing, without_log
from patchmine.data.decoding.decode import decode, probe
from patchmine.data.decoding.reading import open_regular

SCENE_SUFFIXES = (".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
_QUIET = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}

Window = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


@dataclass(frozen=True)
class Scene:
    """An opened image; ``window`` gives (C, h, w) pixels and (h, w) bool, where any are known."""

    height: int
    width: int
    window: Callable[[Window], tuple[np.ndarray, np.ndarray]]


@contextmanager
def open_scene(path: str, level: int, max_pixels: int) -> Iterator[Scene]:
    """An image at a level of its pyramid, 0 the largest; raises DecodeError and OSError.

    ``max_pixels`` is for images that are decoded whole.
    """
    name = path.lower()
    if name.endswith(SLIDE_SUFFIXES):
        with _slide(path, level) as scene:
            yield scene
    elif name.endswith(SCENE_SUFFIXES):
        with _raster(path, level) as scene:
            yield scene
    elif level:
        raise DecodeError(f"has no level {level}: only slides and TIFF may have some")
    else:
        with open_regular(path) as handle:
            data = handle.read()
        yield _whole(data, max_pixels)


def _whole(data: bytes, max_pixels: int) -> Scene:
    pixels = decode(data, probe(data)[2], max_pixels).numpy()

    def window(place: Window) -> tuple[np.ndarray, np.ndarray]:
        top, left, height, width = place
        part = pixels[:, top : top + height, left : left + width]
        return part, np.ones(part.shape[1:], bool)

    height, width = pixels.shape[1:]
    return Scene(height, width, window)


@contextmanager
def _raster(path: str, level: int) -> Iterator[Scene]:
    if importlib.util.find_spec("rasterio") is None:
        command = "pip install 'patchmine[geo]'"
        raise missing("a scene of which windows are read", "rasterio", command)
    import rasterio
    from rasterio.enums import ColorInterp

    options: dict[str, Any] = {"overview_level": level - 1} if level else {}
    with decoding("is no readable TIFF or JPEG 2000"), without_log("rasterio"):
        with open_regular(path):  # a pipe or a device is told
            pass
        # No other drivers: some of GDAL's read further files, or run code.
        driver = "GTiff" if path.lower().endswith((".tif", ".tiff")) else "JP2OpenJPEG"
        with rasterio.Env(**_QUIET), rasterio.open(path, driver=driver, **options) as image:
            kinds = zip(image.indexes, image.colorinterp, strict=True)
            bands = [band for band, kind in kinds if kind != ColorInterp.alpha]
            if np.dtype(image.dtypes[0]).kind not in "uif":
                raise DecodeError(f"holds values of type {image.dtypes[0]}, which is no image")

            def window(place: Window) -> tuple[np.ndarray, np.ndarray]:
                top, left, height, width = place
                part = rasterio.windows.Window(left, top, width, height)
                pixels = image.read(bands, window=part)
                known = image.dataset_mask(window=part) > 0
                gaps = np.broadcast_to(~known, pixels.shape)
                if pixels.dtype.kind == "f":
                    gaps = gaps | ~np.isfinite(pixels)
                return without_gaps(pixels, gaps), known

            yield Scene(image.height, image.width, window)


@contextmanager
def _slide(path: str, level: int) -> Iterator[Scene]:
    if importlib.util.find_spec("openslide") is None:
        raise missing("a slide", "openslide", "pip install 'patchmine[slides]'")
    import openslide

    with decoding("is no readable slide"), openslide.OpenSlide(path) as slide:
        if level >= slide.level_count:
            raise DecodeError(f"has no level {level}, but {slide.level_count} from 0 on")
        width, height = slide.level_dimensions[level]
        scale = slide.level_downsamples[level]

        def window(place: Window) -> tuple[np.ndarray, np.ndarray]:
            top, left, rows, columns = place
            corner = round(left * scale), round(top * scale)
            pixels = np.asarray(slide.read_region(corner, level, (columns, rows)))
            known = pixels[..., 3] > 0
            colours = np.moveaxis(pixels[..., :3], 2, 0)
            return without_gaps(colours, np.broadcast_to(~known, colours.shape)), known

        yield Scene(height, width, window)
