"""Images too large to decode at once, of which windows are read.

Scenes (GeoTIFF, JPEG 2000) are read by rasterio, slides by openslide, at a level of their pyramid;
other images are decoded whole.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import Any

import numpy as np

from patchmine.data.decoding.arrays import with_gaps
from patchmine.data.decoding.bounds import DecodeError, decoding, missing
from patchmine.data.decoding.decode import decode, probe
from patchmine.data.decoding.orientation import Box
from patchmine.data.decoding.rasters import JPEG_2000, TIFF, Scene, open_raster, refuse_level
from patchmine.data.decoding.reading import open_regular
from patchmine.errors import reason_of

SCENE_SUFFIXES = (".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")


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
                driver = TIFF if name.endswith((".tif", ".tiff")) else JPEG_2000
                return open_raster(path, driver, level)
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


def _slide(path: str, level: int) -> Scene:
    if importlib.util.find_spec("openslide") is None:
        raise missing("a slide", "openslide", "pip install 'patchmine[slides]'")
    import openslide

    with decoding("is no readable slide"):
        slide = openslide.OpenSlide(path)
        slide.set_cache(_slide_cache(os.getpid()))
        refuse_level(level, slide.level_count)
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
