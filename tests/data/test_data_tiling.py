"""Huge images cut into tiles: windows of them, no empty ones, and going on after a stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_scenes import COLOURS, scene
from PIL import Image

from patchmine.data import tiling
from patchmine.data.decoding.decode import decode
from patchmine.data.sources.source import open_source
from patchmine.data.tiling import Cut, cut_tiles, open_scenes
from patchmine.errors import UserError


def tiles_of(folder: Path) -> dict[str, np.ndarray]:
    """(C, h, w) by name."""
    source = open_source(folder)
    return {
        source.key(index): decode(source.read(index), 3).numpy() for index in range(len(source))
    }


def test_tiles_are_windows_that_cover_the_image(tmp_path: Path) -> None:
    scene(tmp_path / "in/a/x.tif", COLOURS)
    done = cut_tiles(open_scenes(str(tmp_path / "in")), tmp_path / "out", Cut(64, overlap=16))
    assert (done.images, done.tiles, done.empty) == (1, 2 * 3, 0)
    covered = np.zeros((100, 130), bool)
    for name, pixels in tiles_of(tmp_path / "out").items():
        place = name.removeprefix("a/x_tif/y").removesuffix(".png")
        top, left = map(int, place.split("_x"))
        np.testing.assert_array_equal(pixels, COLOURS[:, top : top + 64, left : left + 64])
        covered[top : top + 64, left : left + 64] = True
    assert covered.all()
    labels = open_source(tmp_path / "out").labels()
    assert labels is not None
    assert labels.names == ["a"]


def test_empty_tiles_are_left_out_and_gaps_filled(tmp_path: Path) -> None:
    pixels = COLOURS.astype(np.uint16) * 100
    pixels[:, :64, :64] = 7  # no data
    pixels[:, 64:, 64:] = 0  # black
    pixels[:, 10, 70] = 7
    scene(tmp_path / "x.tif", pixels, nodata=7)
    done = cut_tiles(open_scenes(str(tmp_path / "x.tif")), tmp_path / "out", Cut(64))
    assert done.empty >= 1
    names = sorted(path.stem for path in (tmp_path / "out").rglob("*.npy"))
    assert "y000000_x000000" not in names
    (kept,) = (tmp_path / "out").rglob("y000000_x000064.npy")
    tile = np.load(kept)
    window = pixels[:, :64, 64:128].astype(float)
    window[:, 10, 6] = np.nan
    np.testing.assert_array_equal(tile[:, 10, 6], np.rint(np.nanmean(window, (1, 2))))
    everything = cut_tiles(
        open_scenes(str(tmp_path / "x.tif")), tmp_path / "all", Cut(64, max_empty=1)
    )
    assert everything.tiles == done.tiles + done.empty


def test_glass_is_empty_and_small_images_are_one_tile(tmp_path: Path) -> None:
    glass = np.full((100, 130, 3), 240, np.uint8)
    glass[:, 64:] = COLOURS.transpose(1, 2, 0)[:, 64:]
    Image.fromarray(glass).save(tmp_path / "x.png")
    Image.fromarray(glass[:20, 70:]).save(tmp_path / "y.png")
    done = cut_tiles(open_scenes(str(tmp_path)), tmp_path / "out", Cut(64))
    assert done.tiles == 4 + 1
    assert not list((tmp_path / "out/x_png").glob("*_x000000.png"))
    assert tiles_of(tmp_path / "out")["y_png/y000000_x000000.png"].shape == (3, 20, 60)


def test_a_tile_may_be_a_single_row(tmp_path: Path) -> None:
    row = np.arange(300, dtype=np.uint8).reshape(1, 100, 3)
    Image.fromarray(row).save(tmp_path / "x.png")
    Image.fromarray(row[..., 0]).save(tmp_path / "y.png")
    cut_tiles(open_scenes(str(tmp_path)), tmp_path / "out", Cut(64))
    tiles = tiles_of(tmp_path / "out")
    np.testing.assert_array_equal(
        tiles["x_png/y000000_x000036.png"], row[:, 36:].transpose(2, 0, 1)
    )
    assert tiles["y_png/y000000_x000000.png"].shape == (3, 1, 64)


def test_levels_of_a_pyramid(tmp_path: Path) -> None:
    large = np.repeat(np.repeat(COLOURS[:, :64, :64], 2, 1), 2, 2)
    file = scene(tmp_path / "x.tif", large, levels=2)
    cut_tiles(open_scenes(str(file)), tmp_path / "out", Cut(64, level=1))
    (tile,) = tiles_of(tmp_path / "out").values()
    np.testing.assert_array_equal(tile, COLOURS[:, :64, :64])
    with pytest.raises(
        UserError, match=r"nothing could be cut; .* has no level 5, but 2 from 0 on"
    ):
        cut_tiles(open_scenes(str(file)), tmp_path / "other", Cut(64, level=5))


def test_slides_are_read_at_a_level(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    file = scene(tmp_path / "x.tif", np.tile(COLOURS, (1, 4, 4)), photometric="RGB")
    slide = file.rename(tmp_path / "x.svs")  # openslide knows it by its contents
    done = cut_tiles(open_scenes(str(slide)), tmp_path / "out", Cut(200))
    assert done.tiles == 2 * 3
    with pytest.raises(UserError, match="has no level 3, but 1 from 0 on"):
        cut_tiles(open_scenes(str(slide)), tmp_path / "other", Cut(200, level=3))


def test_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        scene(tmp_path / f"in/{name}.tif", COLOURS)
    files, out, calls = open_scenes(str(tmp_path / "in")), tmp_path / "out", 0
    write = tiling._write

    def stop(pixels: np.ndarray, place: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        write(pixels, place)

    monkeypatch.setattr(tiling, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        cut_tiles(files, out, Cut(64))
    assert sorted(path.name for path in out.iterdir()) == [".tiles.json", "a_tif"]
    done = cut_tiles(files, out, Cut(64))
    assert (done.kept, done.images, len(tiles_of(out))) == (1, 2, 3 * 6)
    with pytest.raises(UserError, match=r"holds tiles of other settings \(size=64\)"):
        cut_tiles(files, out, Cut(32))
    with pytest.raises(UserError, match="there is something already"):
        cut_tiles(files, tmp_path / "in", Cut(64))
    with pytest.raises(UserError, match="overlap=64: give less than size=64"):
        cut_tiles(files, out, Cut(64, overlap=64))


def test_images_whose_folders_would_be_one_are_both_cut(tmp_path: Path) -> None:
    scene(tmp_path / "in/a.b.tif", COLOURS)
    scene(tmp_path / "in/a_b.tif", COLOURS)
    files, out = open_scenes(str(tmp_path / "in")), tmp_path / "out"
    assert cut_tiles(files, out, Cut(64)).images == 2
    assert sorted(path.name for path in out.glob("a*")) == ["a_b_tif", "a_b_tif_1"]
    assert cut_tiles(files, out, Cut(64)).kept == 2


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    whole = scene(tmp_path / "in/a.tif", COLOURS)
    (tmp_path / "in/b.tif").write_bytes(whole.read_bytes()[:300])
    vrt = b"<VRTDataset rasterXSize='9' rasterYSize='9'></VRTDataset>"
    (tmp_path / "in/c.tif").write_bytes(vrt)
    told: list[str] = []
    done = cut_tiles(open_scenes(str(tmp_path / "in")), tmp_path / "out", Cut(64), say=told.append)
    assert (done.images, done.failed) == (1, 2)
    assert all("is left out: it is no readable TIFF or JPEG 2000" in line for line in told)
