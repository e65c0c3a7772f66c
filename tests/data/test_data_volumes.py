"""NIfTI, FITS, HDF5 and zarr: every slice, plane or image of a file is an item."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_files import spoiled
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from patchmine.data.decoding.bounds import DecodeError, install_command
from patchmine.data.decoding.decode import decode, decode_known, probe
from patchmine.data.decoding.domains import Part
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError

RNG = np.random.default_rng(0)
SCAN = RNG.integers(-1000, 3000, (20, 30, 12)).astype(np.int16)  # rightwards, forwards, upwards
PLANES = RNG.normal(size=(5, 20, 30)).astype(np.float32)
IMAGES = RNG.integers(0, 256, (10, 16, 18, 3)).astype(np.uint8)


def images(source: Source, channels: int) -> list[Tensor]:
    return [decode(source.read(index), channels) for index in range(len(source))]


# NIfTI


def nifti(file: Path, array: np.ndarray, affine: Any = None, **header: Any) -> Path:
    nib = pytest.importorskip("nibabel")
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    if header:
        image.header.set_slope_inter(**header)
    image.to_filename(file)
    return file


def seen(scan: np.ndarray, number: int) -> np.ndarray:
    """The axial slice: the front at the top, the right side of the body at the left."""
    return scan[::-1, ::-1, number].T


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAR", "ILP"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_slices_look_alike_however_they_are_stored(
    tmp_path: Path, orientation: str, ending: str
) -> None:
    nib = pytest.importorskip("nibabel")
    image = nib.Nifti1Image(SCAN, np.diag([1, 1, 2.5, 1]))
    codes = nib.orientations.axcodes2ornt(orientation)
    change = nib.orientations.ornt_transform(nib.io_orientation(image.affine), codes)
    image.as_reoriented(change).to_filename(tmp_path / f"x{ending}")
    source = open_source(tmp_path)
    assert (len(source), source.key(7)) == (12, f"x{ending}#07")
    assert probe(source.read(0)) == (30, 20, 1, "float32")
    for number, found in enumerate(images(source, 1)):
        np.testing.assert_array_equal(found[0], seen(SCAN, number))


def test_neighbours_are_the_other_channels(tmp_path: Path) -> None:
    source = open_source(nifti(tmp_path / "x.nii", SCAN))
    for number, found in enumerate(images(source, 5)):
        near = [seen(SCAN, min(max(number + step, 0), 11)) for step in range(-2, 3)]
        np.testing.assert_array_equal(found, np.stack(near))
    with pytest.raises(DecodeError, match="has 1 channel where the run expects 4"):
        decode(source.read(0), 4)


def test_values_have_their_unit_and_gaps_the_mean_of_the_rest(tmp_path: Path) -> None:
    scaled = nifti(tmp_path / "x.nii", SCAN, slope=0.5, inter=-10)
    np.testing.assert_allclose(
        images(open_source(scaled), 1)[3][0], 0.5 * seen(SCAN, 3) - 10, atol=1e-3
    )
    floats = SCAN.astype(np.float32)
    floats[4, 5, 3] = np.nan
    floats[..., 7] = np.nan
    found = images(open_source(nifti(tmp_path / "y.nii", floats)), 1)
    assert float(found[3][0, 30 - 1 - 5, 20 - 1 - 4]) == pytest.approx(
        np.nanmean(floats[..., 3]), rel=1e-5
    )
    assert not found[7].any()
    bytes_ = nifti(tmp_path / "z.nii", (SCAN // 16).astype(np.uint8))
    assert probe(open_source(bytes_).read(0))[3] == "uint8"


def test_times_and_colours_and_flat_pictures(tmp_path: Path) -> None:
    series = np.stack([SCAN, SCAN + 1], 3)
    found = images(open_source(nifti(tmp_path / "x.nii", series)), 1)
    assert len(found) == 24
    np.testing.assert_array_equal(found[12 + 4][0], seen(SCAN, 4) + 1)
    colours = np.zeros(SCAN.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = SCAN % 256
    source = open_source(nifti(tmp_path / "y.nii", colours))
    assert probe(source.read(2)) == (30, 20, 3, "uint8")
    np.testing.assert_array_equal(decode(source.read(2), 3)[1], seen(SCAN, 2) % 256)
    flat = nifti(tmp_path / "z.nii", SCAN[..., 3])
    np.testing.assert_array_equal(decode(flat.read_bytes(), 1)[0], seen(SCAN, 3))


def test_a_volume_needs_the_room_that_its_header_says(tmp_path: Path) -> None:
    whole = nifti(tmp_path / "x.nii", SCAN).read_bytes()
    bomb = whole[:42] + np.array([20_000, 20_000], "<i2").tobytes() + whole[46:]
    for name, data in {"cut.nii": whole[:-50], "bomb.nii.gz": gzip.compress(bomb)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="this is a truncated or damaged NIfTI file"):
            open_source(tmp_path / name)
        with pytest.raises(DecodeError, match="is a truncated or damaged NIfTI file"):
            decode(data, 1)
    source = open_source(tmp_path / "x.nii")
    with pytest.raises(DecodeError, match="more than max_pixels=100 allows"):
        decode(source.read(0), 1, 100)
    (tmp_path / "other.nii.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match="is no NIfTI file in one piece"):
        open_source(tmp_path / "other.nii.gz")


# FITS


def fits_file(file: Path, *parts: Any) -> Path:
    fits = pytest.importorskip("astropy.io.fits")
    fits.HDUList([fits.PrimaryHDU(), *parts]).writeto(file)
    return file


def test_planes_of_fits_have_the_last_row_at_the_top(tmp_path: Path) -> None:
    fits = pytest.importorskip("astropy.io.fits")
    planes = PLANES.copy()
    planes[1, 3, 4] = np.nan
    table = fits.BinTableHDU.from_columns([fits.Column("x", "E", array=np.arange(4.0))])
    fits_file(tmp_path / "a.fits", table, fits.ImageHDU(planes))
    packed = fits_file(tmp_path / "b.fz", fits.CompImageHDU(SCAN.transpose(2, 1, 0)))
    fits_file(tmp_path / "t.fits", table)
    source = open_source(tmp_path)
    assert len(source) == 5 + 12
    assert source.passed_over["file with no image inside"] == (1, "t.fits")
    found = images(source, 1)
    np.testing.assert_array_equal(found[2][0], PLANES[2, ::-1])
    assert float(found[1][0, 20 - 1 - 3, 4]) == pytest.approx(np.nanmean(planes[1]), rel=1e-5)
    np.testing.assert_array_equal(found[5 + 3][0], SCAN[:, ::-1, 3].T)
    assert len(open_source(packed)) == 12


def test_blank_and_scaled_values_of_fits(tmp_path: Path) -> None:
    fits = pytest.importorskip("astropy.io.fits")
    part = fits.ImageHDU(SCAN[..., 0])
    part.header["BLANK"], part.header["BSCALE"] = int(SCAN[0, 0, 0]), 2.0
    file = fits_file(tmp_path / "x.fits", part)
    expected = np.where(SCAN[..., 0] == SCAN[0, 0, 0], np.nan, 2.0 * SCAN[..., 0])
    expected = np.where(np.isnan(expected), np.nanmean(expected), expected)
    np.testing.assert_allclose(decode(file.read_bytes(), 1)[0], expected[::-1], rtol=1e-5)
    small = fits_file(tmp_path / "y.fits", fits.ImageHDU(IMAGES[0, ..., 0]))
    assert probe(small.read_bytes()) == (16, 18, 1, "uint8")
    np.testing.assert_array_equal(decode(small.read_bytes(), 1)[0], IMAGES[0, ::-1, :, 0])


# Arrays


def hdf5(file: Path, **arrays: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as content:
        for name, array in arrays.items():
            content[name] = array
    return file


def zarr_folder(folder: Path, array: np.ndarray, **options: Any) -> Path:
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(folder, shape=array.shape, dtype=array.dtype, **options)
    stored[:] = array
    return folder


def test_images_along_the_first_axis_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    hdf5(tmp_path / "a/colour.h5", x=IMAGES, y=np.zeros((10, 1, 1, 1)))
    hdf5(tmp_path / "b/planes.h5", scan=IMAGES.transpose(0, 3, 1, 2))
    zarr_folder(tmp_path / "b/deep.zarr", IMAGES[..., 0].astype(np.uint16) * 257)
    zarr_folder(tmp_path / "b/old.zarr", IMAGES, zarr_format=2)
    source = open_source(tmp_path)
    names = [source.key(index) for index in (0, 10, 20, 30)]
    assert names == ["a/colour.h5#0", "b/deep.zarr#0", "b/old.zarr#0", "b/planes.h5#0"]
    labels = source.labels()
    assert labels is not None
    assert labels.ids.tolist() == [0] * 10 + [1] * 30
    grey = decode(source.read(13), 1)
    np.testing.assert_allclose(grey[0], IMAGES[3, ..., 0] / 255, atol=1e-6)
    for index in (3, 23, 33):
        assert probe(source.read(index)) == (16, 18, 3, "uint8")
        np.testing.assert_array_equal(decode(source.read(index), 3).permute(1, 2, 0), IMAGES[3])
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\nb/deep.zarr,x\na/colour.h5,y\n")
    assert len(open_source(listed)) == 20
    assert len(open_source(tmp_path / "b/deep.zarr")) == 10


def test_of_several_arrays_one_must_be_meant(tmp_path: Path) -> None:
    both = hdf5(tmp_path / "x.h5", first=IMAGES, second=IMAGES)
    with pytest.raises(UserError, match=r"this holds 2 arrays .*\(first, second\): call one of"):
        open_source(both)
    assert len(open_source(hdf5(tmp_path / "y.h5", images=IMAGES[:4], second=IMAGES))) == 4
    none = hdf5(tmp_path / "z.h5", labels=np.arange(10), boxes=np.zeros((10, 2, 2)))
    with pytest.raises(UserError, match="there is no image in it"):
        open_source(none)


def test_no_code_is_run_and_no_other_file_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(hdf5(tmp_path / "secret.h5", images=IMAGES), "r+") as content:
        layout = h5py.VirtualLayout((10, 16, 18, 3), np.uint8)
        layout[:] = h5py.VirtualSource(content["images"])
        with h5py.File(tmp_path / "x.h5", "w") as linking:
            linking.create_virtual_dataset("virtual", layout)
            linking["linked"] = h5py.ExternalLink("secret.h5", "/images")
            linking.create_dataset("objects", (4, 5, 5), h5py.special_dtype(vlen=bytes))
    with pytest.raises(UserError, match="there is no image in it"):
        open_source(tmp_path / "x.h5")

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    folder = tmp_path / "x.zarr"
    folder.mkdir()
    packed = {"id": "pickle", "protocol": 5}
    facts = {"shape": [2, 8, 8], "chunks": [1, 8, 8], "fill_value": 0, "order": "C"}
    (folder / "0.0.0").write_bytes(pickle.dumps(Evil()))
    for dtype, where in (("|u1", "filters"), ("|O", "filters"), ("|u1", "compressor")):
        codecs = {"filters": None, "compressor": None}
        codecs[where] = [packed] if where == "filters" else packed  # type: ignore[assignment]
        (folder / ".zarray").write_text(
            json.dumps({"zarr_format": 2, "dtype": dtype, **facts, **codecs})
        )
        with pytest.raises(DecodeError):
            decode(Part(str(folder), 0), 1)
    assert not (tmp_path / "evil").exists()


def fits_of_doubles(file: Path, values: np.ndarray) -> Path:
    fits = pytest.importorskip("astropy.io.fits")
    return fits_file(file, fits.ImageHDU(values[:, ::-1]))


def fits_of_integers(file: Path, values: np.ndarray) -> Path:
    """NaN is stored as BLANK, all else in tenths."""
    fits = pytest.importorskip("astropy.io.fits")
    stored = np.nan_to_num(values * 10, nan=-32768).round().astype(np.int16)
    part = fits.ImageHDU(stored[:, ::-1])
    part.header["BLANK"], part.header["BSCALE"] = -32768, 0.1
    return fits_file(file, part)


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        (".fits", fits_of_doubles),
        (".fits", fits_of_integers),
        (".h5", lambda file, values: hdf5(file, images=values)),
        (".zarr", zarr_folder),
        (".nii", lambda file, values: nifti(file, values[:, ::-1, ::-1].transpose(2, 1, 0))),
    ],
    ids=["NaN in FITS", "BLANK in FITS", "HDF5", "zarr", "NIfTI"],
)
def test_values_that_are_not_there_are_known_as_missing(
    tmp_path: Path, ending: str, write: Any
) -> None:
    values = np.round(RNG.normal(50, 20, (3, 20, 30)), 1)
    values[1, 2:9, 4] = np.nan
    values[2] = np.nan
    source = open_source(write(tmp_path / f"x{ending}", values))
    found = [decode_known(source.read(index), 1) for index in range(3)]
    assert found[0][1] is None
    for (image, known), wanted in zip(found[1:], values[1:], strict=True):
        assert known is not None
        np.testing.assert_array_equal(known[0], np.isfinite(wanted))
        np.testing.assert_allclose(image[known], wanted[np.isfinite(wanted)], rtol=1e-5)
    assert float(found[1][0][0, 5, 4]) == pytest.approx(np.nanmean(values[1]), rel=1e-5)


def test_chunks_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    shape = (4096, 512, 512)
    zarr.create_array(tmp_path / "x.zarr", shape=shape, dtype="u1", chunks=shape)
    with pytest.raises(DecodeError, match="MB to decode"):
        decode(open_source(tmp_path / "x.zarr").read(0), 1)


def test_workers_read_arrays(tmp_path: Path) -> None:
    hdf5(tmp_path / "x.h5", x=IMAGES)
    zarr_folder(tmp_path / "y.zarr", IMAGES)
    source = open_source(tmp_path)
    decode(source.read(10), 3)  # before the fork
    loader = DataLoader(
        _Decoded(source), batch_size=5, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), torch.stack(images(source, 3)))


class _Decoded(Dataset[Tensor]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.source.read(index), 3)


# Damage


@pytest.mark.parametrize(
    ("ending", "package", "extra"),
    [(".nii", "nibabel", "nifti"), (".fits", "astropy", "fits"), (".h5", "h5py", "hdf5")],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, package: str, extra: str
) -> None:
    (tmp_path / f"x{ending}").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"read once {package} is there .*patchmine\[{extra}\]"):
        open_source(tmp_path)
    with pytest.raises(DecodeError) as told:
        decode(Part(str(tmp_path / f"x{ending}"), 0), 1)
    assert install_command(str(told.value)) == f"pip install 'patchmine[{extra}]'"


def made(kind: str, folder: Path) -> bytes:
    if kind.startswith(".nii"):
        return nifti(folder / f"x{kind}", SCAN[..., :1]).read_bytes()
    if kind == ".h5":
        return hdf5(folder / "x.h5", x=IMAGES[:1]).read_bytes()
    fits = pytest.importorskip("astropy.io.fits")
    part = fits.ImageHDU(PLANES[0]) if kind == ".fits" else fits.CompImageHDU(SCAN[..., 0])
    return fits_file(folder / "x.fits", part).read_bytes()


@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".fits", ".fz", ".h5"])
def test_mutants_give_an_image_or_a_decode_error(kind: str, tmp_path: Path) -> None:
    rng, data, readable = np.random.default_rng(1), made(kind, tmp_path), 0
    height, width, channels, _ = probe(data)
    assert tuple(decode(data, channels).shape) == (channels, height, width)
    for _ in range(25):
        mutant = spoiled(data, rng)
        with contextlib.suppress(DecodeError):
            height, width, channels, _ = probe(mutant)
            image = decode(mutant, channels, max_pixels=1 << 22)
            assert tuple(image.shape) == (channels, height, width)
            readable += 1
    assert readable < 25
    with pytest.raises(DecodeError):
        decode(data[: len(data) // 2], channels)
