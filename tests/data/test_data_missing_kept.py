"""Tiles and shards that keep where there is no data (missing=keep)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchmine.data.decoding.decode import decode, decode_known
from patchmine.data.sharding import write_shards
from patchmine.data.sources.source import open_source
from patchmine.data.tiling import Cut, cut_tiles, open_scenes
from patchmine.data.views.normalise import as_float


def scene(file: Path, pixels: np.ndarray, nodata: float) -> Path:
    """A GeoTIFF of (C, H, W)."""
    rasterio = pytest.importorskip("rasterio")
    height, width = pixels.shape[1:]
    shape: dict[str, Any] = dict(
        width=width, height=height, count=len(pixels), dtype=pixels.dtype.name, nodata=nodata
    )
    where = rasterio.Affine(10, 0, 0, 0, -10, 0)
    with rasterio.open(file, "w", "GTiff", transform=where, **shape) as image:
        image.write(pixels)
    return file


def first_item(folder: Path, channels: int) -> tuple[Tensor, Tensor | None]:
    source = open_source(folder)
    return decode_known(source.read(0), channels)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [("uint8", 1), ("uint8", 3), ("uint8", 5), ("uint16", 3), ("int16", 2), ("float32", 2)],
)
def test_a_tile_with_missing_pixels_is_read_as_its_scene(
    dtype: str, channels: int, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(10, 200, (channels, 20, 24)).astype(dtype)
    pixels[:, 3:9, 5:] = 1
    file = scene(tmp_path / "x.tif", pixels, nodata=1)
    files, known = open_scenes(str(file)), np.ones(pixels.shape, bool)
    known[:, 3:9, 5:] = False
    cut_tiles(files, tmp_path / "kept", Cut(64, keep_missing=True))
    found, now = first_item(tmp_path / "kept", channels)
    assert np.array_equal(now, known)
    # The values are those of a tile that forgets what is missing, which holds their mean.
    cut_tiles(files, tmp_path / "filled", Cut(64))
    plain, nothing = first_item(tmp_path / "filled", channels)
    assert nothing is None
    level = {"uint8": 1 / 255, "uint16": 1 / 65535, "int16": 1 / 65535}.get(dtype, 1e-3)
    torch.testing.assert_close(as_float(found)[now], as_float(plain)[now], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(as_float(found), as_float(plain), atol=level, rtol=1e-5)


def test_a_tile_that_misses_nothing_is_as_ever(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(10, 200, (3, 20, 24)).astype(np.uint8)
    files = open_scenes(str(scene(tmp_path / "x.tif", pixels, nodata=1)))
    for name, keep in (("kept", True), ("filled", False)):
        cut_tiles(files, tmp_path / name, Cut(64, keep_missing=keep))
    kept, filled = (next((tmp_path / n).rglob("*.png")).read_bytes() for n in ("kept", "filled"))
    assert kept == filled


def test_shards_keep_nan_of_slices_only_where_asked(tmp_path: Path) -> None:
    nib = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).normal(0, 1, (8, 9, 2)).astype(np.float32)
    volume[2, 3, 0] = np.nan
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "x.nii")
    source = open_source(tmp_path / "x.nii")
    expected, known = decode_known(source.read(0), 1)
    for name, keep in (("kept", True), ("filled", False)):
        write_shards(source, tmp_path / name, keep_missing=keep)
    found, now = first_item(tmp_path / "kept", 1)
    assert torch.equal(now, known)
    assert int((~now).sum()) == 1
    torch.testing.assert_close(found, expected)
    found, now = first_item(tmp_path / "filled", 1)
    assert now is None
    assert torch.equal(found, decode(source.read(0), 1))


def test_images_that_miss_pixels_are_not_shrunk(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(10, 200, (3, 40, 44)).astype(np.uint8)
    pixels[:, 3:9, 5:] = 1
    (tmp_path / "data").mkdir()
    source = open_source(scene(tmp_path / "data" / "x.tif", pixels, nodata=1).parent)
    done = write_shards(source, tmp_path / "kept", max_side=16, keep_missing=True)
    assert (done.shrunk, done.too_large) == (0, 1)
    assert first_item(tmp_path / "kept", 3)[1] is not None
    done = write_shards(source, tmp_path / "filled", max_side=16)
    assert (done.shrunk, done.too_large) == (1, 0)
