"""Where in an image there is data: read, cut, resized, mirrored and kept apart (missing=mask)."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from patchmine.data.badfiles import BadFiles
from patchmine.data.decoding.decode import DecodeError, decode, decode_known
from patchmine.data.loader import data_statistics, plain_batches, train_batches
from patchmine.data.settings import ViewSettings
from patchmine.data.sources.source import open_source
from patchmine.data.views.geometry import Geometry, resize, resize_known
from patchmine.data.views.images import PlainView, TrainView
from patchmine.data.views.normalise import normalise
from patchmine.train.settings import MachineSettings, ScheduleSettings
from patchmine.types import Batch

SIZE = (24, 20)


def bands(dtype: str, count: int = 2) -> np.ndarray:
    """(C, H, W), no value of which is below 20."""
    values = np.random.default_rng(0).integers(20, 200, (count, *SIZE))
    return values.astype(dtype)


def geotiff(file: Path, pixels: np.ndarray, nodata: str) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    tags = [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(
        file, pixels, photometric="minisblack", planarconfig="separate", extratags=tags
    )
    return file.read_bytes()


@pytest.mark.parametrize(
    ("nodata", "dtype"), [("0", "uint8"), ("7", "uint16"), ("-9999", "float32"), ("nan", "float32")]
)
def test_a_geotiff_says_where_it_has_no_data(nodata: str, dtype: str, tmp_path: Path) -> None:
    pixels = bands(dtype, 4)
    pixels[:, 5:9, 7:] = float(nodata)
    data = geotiff(tmp_path / "x.tif", pixels, nodata)
    image, known = decode_known(data, 4)
    assert torch.equal(image, decode(data, 4))
    expected = torch.ones(4, *SIZE, dtype=torch.bool)
    expected[:, 5:9, 7:] = False
    assert torch.equal(known, expected)
    whole = geotiff(tmp_path / "y.tif", bands(dtype, 4), nodata)
    assert decode_known(whole, 4)[1] is None


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_transparent_parts_are_missing_and_filled() -> None:
    pixels = np.moveaxis(bands("uint8", 4), 0, 2).copy()
    pixels[:6, :, 3] = 0
    pixels[6:, :, 3] = 255
    image, known = decode_known(png(pixels), 3)
    assert not known[:, :6].any()
    assert known[:, 6:].all()
    for channel in range(3):
        mean = round(float(pixels[6:, :, channel].mean()))
        assert (image[channel, :6] == mean).all()
        assert np.array_equal(image[channel, 6:], pixels[6:, :, channel])
    assert decode_known(png(pixels), 4)[1] is None  # alpha is a channel like others
    grey, known = decode_known(png(pixels), 1)
    assert grey.shape == known.shape == (1, *SIZE)
    assert not known[:, :6].any()
    assert known[:, 6:].all()
    assert decode_known(png(pixels[..., :3]), 3)[1] is None


def npy(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, pixels)
    return out.getvalue()


@pytest.mark.parametrize("form", [npy, lambda pixels: pixels, torch.from_numpy])
def test_nan_in_arrays_is_missing_only_where_it_is_asked_for(form: Any) -> None:
    pixels = bands("float32")
    pixels[1, 3, 4] = np.nan
    with pytest.raises(DecodeError, match="not finite"):
        decode(form(pixels), 2)
    image, known = decode_known(form(pixels), 2)
    assert (~known).nonzero().tolist() == [[1, 3, 4]]
    assert float(image[1, 3, 4]) == pytest.approx(float(np.nanmean(pixels[1])), rel=1e-5)
    pixels[0, 0, 0] = np.inf
    with pytest.raises(DecodeError, match="not finite"):
        decode_known(form(pixels), 2)


def test_an_image_without_any_data_is_zero() -> None:
    image, known = decode_known(np.full((2, 4, 4), np.nan, np.float32), 2)
    assert not known.any()
    assert image.count_nonzero() == 0


def test_grey_of_which_some_is_missing_spreads_over_the_channels() -> None:
    pixels = bands("float32", 1)
    pixels[0, 2] = np.nan
    image, known = decode_known(pixels, 3)
    assert image.shape == known.shape == (3, *SIZE)
    assert torch.equal(known[0], known[2])
    assert not known[:, 2].any()


# ---- cut and resized ----


def weights(before: int, after: int, mode: str) -> Tensor:
    """(after, before): what `resize` makes a line of."""
    lines = torch.eye(before)[:, None, :].expand(before, 4, before)
    return resize(lines, (4, after), mode)[:, 0].T


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(9, 7), (31, 40), SIZE])
def test_a_resized_pixel_is_the_mean_of_those_with_data(mode: str, size: tuple[int, int]) -> None:
    image = torch.from_numpy(bands("float32"))
    known = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(0)) > 0.3
    known[:, :10, :8] = False
    found, now = resize_known(image, known, size, mode)
    plain = resize(image, size, mode)
    rows, columns = weights(SIZE[0], size[0], mode), weights(SIZE[1], size[1], mode)
    assert now.any()
    assert not now.all()
    for channel in range(2):
        for y in range(size[0]):
            for x in range(size[1]):
                weight = rows[y][:, None] * columns[x]  # (H, W), whose sum is 1
                share = float((weight * known[channel]).sum())
                if abs(share - 0.5) < 1e-5:
                    continue
                assert bool(now[channel, y, x]) == (share >= 0.5)
                mean = (weight * known[channel] * image[channel]).sum() / share
                expected = mean if share >= 0.5 else plain[channel, y, x]
                assert float(found[channel, y, x]) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_no_known_pixel_has_anything_of_a_missing_one(dtype: torch.dtype) -> None:
    image = torch.full((3, *SIZE), 100, dtype=dtype)
    known = torch.ones(3, *SIZE, dtype=torch.bool)
    known[:, 4:13, :9] = False
    for fill in (0, 255):
        filled = torch.where(known, image, torch.tensor(fill, dtype=dtype))
        for size in ((11, 13), (50, 37), SIZE):
            found, now = resize_known(filled, known, size)
            assert found.dtype == dtype
            torch.testing.assert_close(found[now], torch.full_like(found[now], 100))
            assert 0 < int((~now).sum()) < now.numel() / 2


def test_where_all_is_known_it_is_resized_as_ever() -> None:
    image = torch.from_numpy(bands("uint8", 3))
    for known in (None, torch.ones_like(image, dtype=torch.bool)):
        found, now = resize_known(image, known, (11, 9))
        assert torch.equal(found, resize(image, (11, 9)))
        assert now.all()
    geometry = Geometry((2, 3, 8, 9), (6, 6), canvas=(16, 15))
    found, now = geometry.apply_known(image, None)
    assert torch.equal(found, geometry.apply(image))
    assert now.all()


def half_known() -> np.ndarray:
    """White where there is data and nothing elsewhere, in a pattern that no mirroring keeps."""
    pixels = np.full((1, 40, 48), 1.0, np.float32)
    pixels[:, 8:30, 5:20] = np.nan
    pixels[:, 25:, 30:] = np.nan
    return pixels


@pytest.mark.parametrize("kind", [TrainView, PlainView])
def test_views_and_what_is_known_of_them_have_one_geometry(kind: Any) -> None:
    # Missing pixels hold the mean of the others, so another value is put under them.
    settings = ViewSettings(image_size=(16, 16), channels=2, missing="mask", crop_scale=(0.3, 1))
    pixels = half_known()
    marks = np.where(np.isnan(pixels), -1.0, 1.0).astype(np.float32)
    raw = np.concatenate([pixels, marks])
    seen = 0
    for seed in range(8):
        sample = kind(settings)(raw, np.random.default_rng(seed))
        (view,), known = sample.views, sample.known
        assert known.shape == view.shape
        assert known[1].all()
        # The second channel, of which all is known, says where the first has data.
        sure = view[1].abs() > 0.6
        assert torch.equal(known[0][sure], (view[1] > 0)[sure])
        torch.testing.assert_close(view[0][known[0]], torch.ones_like(view[0][known[0]]))
        seen += int(sure.sum())
    assert seen > 1000


def test_what_is_known_is_mirrored_with_its_view() -> None:
    known = torch.rand(2, 3, 4, 5) > 0.5
    flip = torch.tensor([True, False])
    batch = Batch([torch.zeros(2, 3, 4, 5)], torch.arange(2), torch.zeros(2, 4), flip, known=known)
    found = normalise(batch, torch.zeros(3), torch.ones(3), "cpu").known
    assert torch.equal(found[0], known[0].flip(-1))
    assert torch.equal(found[1], known[1])


# ---- data sets ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 pictures of 8 bits, every second of which is transparent in parts."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    root.mkdir()
    for number in range(12):
        pixels = rng.integers(0, 255, (20, 24, 4), np.uint8)
        pixels[..., 3] = 255
        if number % 2:
            pixels[:, :8, 3] = 0
        file = root / f"{number:02d}.png"
        file.write_bytes(png(pixels))
        os.utime(file, (time.time() - 60,) * 2)  # old enough to be kept
    return root


def batches(folder: Path, missing: str, **machine: Any) -> Iterator[Batch]:
    settings = ViewSettings(image_size=(16, 16), missing=missing)
    return train_batches(
        open_source(folder),
        TrainView(settings),
        ScheduleSettings(batch_size=4),
        MachineSettings(**{"workers": 0, **machine}),
        seed=0,
        steps=range(5),
        steps_per_epoch=3,
        bad=BadFiles(None, 0.0),
    )


def test_a_plain_batch_carries_nothing_more(folder: Path) -> None:
    for batch in batches(folder, "fill"):
        assert batch.known is None
        assert batch.views[0].dtype == torch.uint8


@pytest.mark.bitwise
def test_workers_and_a_cache_give_the_same_batches(folder: Path, tmp_path: Path) -> None:
    alone = list(batches(folder, "mask"))
    assert any(not batch.known.all() for batch in alone)
    assert all(batch.known.dtype == torch.bool for batch in alone)
    kept = dict(cache=str(tmp_path / "kept"))
    list(batches(folder, "fill", **kept))  # what it keeps misses nothing any more
    for machine in ({"workers": 2}, kept, kept):
        others = list(batches(folder, "mask", **machine))
        for one, other in zip(alone, others, strict=True):
            assert torch.equal(one.known, other.known)
            assert torch.equal(one.views[0], other.views[0])


def test_batches_of_evaluations_know_it_too(folder: Path) -> None:
    view = PlainView(ViewSettings(image_size=(16, 16), missing="mask"))
    (batch,) = plain_batches(open_source(folder), view, batch_size=12)
    assert batch.known.shape == (12, 3, 16, 16)
    assert batch.known[::2].all()
    assert not batch.known[1::2, :, :, 0].any()


def test_statistics_are_those_of_pixels_with_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(5, 2, (2, 64, 64)).astype(np.float32) for _ in range(6)]
    for image in images[:4]:
        image[:, :48] = np.nan
    images[5][1] = np.nan  # which then says nothing of this channel
    for number, image in enumerate(images):
        np.save(tmp_path / f"{number}.npy", image)
    settings = ViewSettings(channels=2, missing="mask")
    mean, std = data_statistics(open_source(tmp_path), settings)
    for channel in range(2):
        some = [image[channel][~np.isnan(image[channel])] for image in images]
        some = [values.astype(np.float64) for values in some if len(values)]
        first = np.mean([values.mean() for values in some])
        second = np.mean([np.square(values).mean() for values in some])
        assert float(mean[channel]) == pytest.approx(first, rel=1e-5)
        assert float(std[channel]) == pytest.approx(np.sqrt(second - first**2), rel=1e-4)
    assert mean.tolist() == pytest.approx([5, 5], abs=0.1)
    assert std.tolist() == pytest.approx([2, 2], abs=0.1)
