"""Small scenes and slides, for the tests of tiles and of windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchmine.data.tiling import Cut, list_tiles, open_scenes

HEAD = "path,level,x,y,width,height,scene_width,scene_height"
COLOURS = np.random.default_rng(0).integers(1, 200, (3, 100, 130)).astype(np.uint8)
BIG = np.tile(COLOURS, (1, 3, 3))  # 300 rows, 390 columns


def scene(file: Path, pixels: np.ndarray, levels: int = 1, **options: Any) -> Path:
    """A tiled GeoTIFF of (C, H, W), which openslide knows as a slide by its contents."""
    rasterio = pytest.importorskip("rasterio")
    height, width = pixels.shape[1:]
    file.parent.mkdir(parents=True, exist_ok=True)
    shape: dict[str, Any] = dict(
        width=width, height=height, count=len(pixels), dtype=pixels.dtype.name
    )
    where = rasterio.Affine(10, 0, 0, 0, -10, 0)
    tiled = dict(tiled=True, blockxsize=32, blockysize=32, compress="deflate")
    with rasterio.open(file, "w", "GTiff", transform=where, **shape, **tiled, **options) as image:
        image.write(pixels)
    if levels > 1:
        with rasterio.open(file, "r+") as image:
            image.build_overviews(
                [2**level for level in range(1, levels)], rasterio.enums.Resampling.nearest
            )
    return file


def listed(folder: Path, cut: Cut, name: str = "tiles.csv") -> Path:
    """The list of the tiles of all images in ``folder/in``."""
    list_tiles(open_scenes(str(folder / "in")), folder / name, cut)
    return folder / name


def table(file: Path, *rows: str, head: str = HEAD) -> Path:
    file.write_text("\n".join([head, *rows]) + "\n")
    return file
