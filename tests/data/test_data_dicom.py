"""DICOM: what a viewer would show of a frame, every frame an item, and damage told in a sentence."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_dicom import dicom
from made_files import spoiled

from patchmine.data.badfiles import BadFiles
from patchmine.data.decoding.bounds import DecodeError, install_command
from patchmine.data.decoding.decode import decode, probe
from patchmine.data.decoding.domains import Part
from patchmine.data.inspect import inspect, render
from patchmine.data.sharding import write_shards
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError

pydicom = pytest.importorskip("pydicom")

RNG = np.random.default_rng(0)
TWELVE = RNG.integers(0, 4096, (36, 48)).astype(np.uint16)
HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1024}
COLOUR = RNG.integers(0, 256, (36, 48, 3)).astype(np.uint8)


def grey(data: bytes) -> np.ndarray:
    """(H, W), checked against what the header says."""
    height, width, channels, dtype = probe(data)
    image = decode(data, 1)
    assert (1, height, width) == tuple(image.shape)
    assert channels == 1
    assert (image.dtype == torch.uint8) == (dtype == "uint8")
    return image[0].numpy()


# What values become


def test_values_without_a_window_keep_their_bits() -> None:
    shares = grey(dicom(TWELVE, BitsStored=12))
    np.testing.assert_allclose(shares, TWELVE / 4095, atol=1 / 65535)
    assert len(np.unique(shares)) == len(np.unique(TWELVE))
    signed = TWELVE.astype(np.int16) - 2048
    np.testing.assert_array_equal(grey(dicom(signed, BitsStored=12)), shares)
    small = (TWELVE // 16).astype(np.uint8)
    np.testing.assert_array_equal(grey(dicom(small)), small)


def test_rescaled_values_keep_their_unit() -> None:
    data = dicom(TWELVE, BitsStored=12, RescaleSlope=2, RescaleIntercept=-1024)
    np.testing.assert_array_equal(grey(data), 2.0 * TWELVE - 1024)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_first_window_is_what_is_seen(function: str) -> None:
    windows = {"WindowCenter": [40, 300], "WindowWidth": [400, 2000], "VOILUTFunction": function}
    shown = grey(dicom(TWELVE, BitsStored=12, **HOUNSFIELD, **windows))
    values = TWELVE.astype(float) - 1024
    slow = {
        "LINEAR": ((values - 39.5) / 399 + 0.5).clip(0, 1),
        "LINEAR_EXACT": ((values - 40) / 400 + 0.5).clip(0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (values - 40) / 400)),
    }
    np.testing.assert_allclose(shown, 255 * slow[function], atol=0.51)


def test_windows_agree_with_pydicoms_own() -> None:
    data = dicom(TWELVE, BitsStored=12, WindowCenter=1000, WindowWidth=700)
    import io

    file = pydicom.dcmread(io.BytesIO(data))
    theirs = pydicom.pixels.apply_windowing(file.pixel_array, file)
    np.testing.assert_allclose(grey(data), theirs / 4095 * 255, atol=0.51)


def test_a_window_of_no_width_is_none() -> None:
    data = dicom(TWELVE, BitsStored=12, WindowCenter=40, WindowWidth=0)
    np.testing.assert_array_equal(grey(data), grey(dicom(TWELVE, BitsStored=12)))


def test_a_table_of_values_goes_before_the_window() -> None:
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 16], [16 * (4095 - i) for i in range(4096)]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    voi = pydicom.Sequence([item])
    data = dicom(TWELVE, BitsStored=12, VOILUTSequence=voi, WindowCenter=1, WindowWidth=2)
    np.testing.assert_array_equal(grey(data), (4095 - TWELVE) // 16)


@pytest.mark.parametrize(
    "more", [{}, HOUNSFIELD, {"WindowCenter": 2000, "WindowWidth": 1500}], ids=str
)
def test_monochrome1_is_turned_round(more: dict[str, Any]) -> None:
    turned = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12}
    usual = grey(dicom(4095 - TWELVE, BitsStored=12, **more))
    # A window lies where it is said to in the stored values, whichever way these are shown.
    if "WindowCenter" in more:
        usual = 255 - grey(dicom(TWELVE, BitsStored=12, **more))
    np.testing.assert_array_equal(grey(dicom(TWELVE, **turned, **more)), usual)


def test_colours_become_rgb() -> None:
    assert probe(dicom(COLOUR)) == (36, 48, 3, "uint8")
    np.testing.assert_array_equal(decode(dicom(COLOUR), 3).permute(1, 2, 0), COLOUR)
    ybr = np.dstack([np.full((36, 48), 90), np.full((36, 48), 128), np.full((36, 48), 200)])
    data = dicom(ybr.astype(np.uint8), PhotometricInterpretation="YBR_FULL")
    red, green, blue = decode(data, 3)[:, 0, 0].tolist()
    assert (red, blue) == (191, 90)
    assert green < 90
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    for number, name in enumerate(("Red", "Green", "Blue")):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        palette[f"{name}PaletteColorLookupTableData"] = bytes(
            (number + 1) * i % 256 for i in range(256)
        )
    image = decode(dicom(COLOUR[..., 0].copy(), **palette), 3)
    np.testing.assert_array_equal(image[1], COLOUR[..., 0] * np.uint8(2))


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless"])
def test_compressed_files_are_read(syntax: str) -> None:
    if syntax == "JPEG2000Lossless":
        pytest.importorskip("openjpeg", reason="pylibjpeg-openjpeg is not installed")
    plain = grey(dicom(TWELVE, BitsStored=12))
    np.testing.assert_array_equal(grey(dicom(TWELVE, BitsStored=12, syntax=syntax)), plain)


# Files and folders


def write(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


FRAMES = np.stack([TWELVE, TWELVE // 2, TWELVE // 4])


@pytest.mark.parametrize("syntax", ["", "RLELossless"])
def test_every_frame_is_an_item_of_its_files_class(tmp_path: Path, syntax: str) -> None:
    many = dicom(FRAMES, frames=3, BitsStored=12, syntax=syntax)
    write(tmp_path, **{"a/cine.dcm": many, "b/one.dcm": dicom(TWELVE, BitsStored=12)})
    source = open_source(tmp_path)
    names = [source.key(index) for index in range(len(source))]
    assert names == ["a/cine.dcm#0", "a/cine.dcm#1", "a/cine.dcm#2", "b/one.dcm"]
    labels = source.labels()
    assert labels is not None
    assert (labels.ids.tolist(), labels.names) == ([0, 0, 0, 1], ["a", "b"])
    for index, frame in enumerate(FRAMES):
        image = decode(source.read(index), 1)[0].numpy()
        np.testing.assert_allclose(image, frame / 4095, atol=1 / 65535)
    assert isinstance(source.read(3), bytes)
    with pytest.raises(DecodeError, match="is a DICOM file of 3 images where one is needed"):
        decode(many, 1)
    assert len(open_source(tmp_path / "a/cine.dcm")) == 3  # such a file is a source by itself
    with pytest.raises(UserError, match="this is a single image"):
        open_source(tmp_path / "b/one.dcm")


def test_frames_have_windows_of_their_own(tmp_path: Path) -> None:
    groups = []
    for centre in (500, 1000, 3000):
        window, group = pydicom.Dataset(), pydicom.Dataset()
        window.WindowCenter, window.WindowWidth = centre, 200
        group.FrameVOILUTSequence = pydicom.Sequence([window])
        groups.append(group)
    data = dicom(
        np.stack([TWELVE] * 3),
        frames=3,
        BitsStored=12,
        PerFrameFunctionalGroupsSequence=pydicom.Sequence(groups),
    )
    write(tmp_path, **{"x.dcm": data})
    for number, centre in enumerate((500, 1000, 3000)):
        expected = grey(dicom(TWELVE, BitsStored=12, WindowCenter=centre, WindowWidth=200))
        image = decode(Part(str(tmp_path / "x.dcm"), number), 1)[0].numpy()
        np.testing.assert_array_equal(image, expected)


def test_files_without_an_ending_count_and_others_without_pixels_do_not(tmp_path: Path) -> None:
    report = dicom(TWELVE)
    without = pydicom.dcmread(__import__("io").BytesIO(report))
    for name in ("PixelData", "Rows", "Columns"):
        delattr(without, name)
    write(tmp_path, IM0001=report, **{"1.2.840.10008.7": report, "DICOMDIR": report})
    without.save_as(tmp_path / "report.dcm")
    cache = tmp_path.with_name("cache")
    for _ in range(2):
        source = open_source(tmp_path, cache_dir=cache)
        assert [source.key(index) for index in range(2)] == ["1.2.840.10008.7", "IM0001"]
        assert source.passed_over["file with no image inside"] == (1, "report.dcm")
        assert source.passed_over["hidden or of the system"] == (1, "DICOMDIR")
    with pytest.raises(DecodeError, match=r"is a DICOM file without pixels \(CT Image Storage\)"):
        decode((tmp_path / "report.dcm").read_bytes(), 1)


def test_a_kept_listing_is_made_anew_for_more_frames(tmp_path: Path) -> None:
    folder, cache = tmp_path / "in", tmp_path / "cache"
    write(folder, **{"x.dcm": dicom(FRAMES, frames=3)})
    first = open_source(folder, cache_dir=cache)
    write(folder, **{"x.dcm": dicom(FRAMES[:2], frames=2)})
    second = open_source(folder, cache_dir=cache)
    assert (len(first), len(second)) == (3, 2)
    assert first.fingerprint != second.fingerprint
    with pytest.raises(DecodeError):
        decode(first.read(2), 1)


def test_shards_keep_all_bits_of_frames(tmp_path: Path) -> None:
    write(tmp_path / "in", **{"x.dcm": dicom(FRAMES, frames=3)})
    source = open_source(tmp_path / "in")
    write_shards(source, tmp_path / "out")
    shards = open_source(tmp_path / "out")
    assert len(shards) == 3
    for index in range(3):
        assert torch.equal(decode(shards.read(index), 1), decode(source.read(index), 1))


def test_inspect_tells_sizes_types_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, **{"x.dcm": dicom(FRAMES, frames=3), "y.dcm": dicom(COLOUR), "z.dcm": b"no"})
    text = render(inspect(open_source(tmp_path)))
    assert "types of values differ (uint16 (3), uint8 (1))" in text
    assert "broken         1 of 5" in text
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"read once pydicom is there \(pip install 'patchmine"):
        open_source(tmp_path)
    with pytest.raises(DecodeError, match="needs the package pydicom") as told:
        decode(dicom_made_before, 1)
    assert install_command(str(told.value)) == "pip install 'patchmine[dicom]'"


dicom_made_before = dicom(TWELVE)


# Damage


def test_sizes_are_bounded_before_anything_is_decoded() -> None:
    with pytest.raises(DecodeError, match=r"48x36 pixels, more than max_pixels=1000"):
        decode(dicom(TWELVE), 1, max_pixels=1000)
    large = dicom(TWELVE, syntax="RLELossless", Rows=36)
    at = large.index(b"\x28\x00\x10\x00US\x02\x00") + 8
    with pytest.raises(DecodeError):
        decode(large[:at] + b"\xff\xff" + large[at + 2 :], 1)


def test_a_frame_larger_than_its_header_is_refused() -> None:
    pytest.importorskip("openjpeg", reason="pylibjpeg-openjpeg is not installed")
    data = dicom(TWELVE, syntax="JPEG2000Lossless")
    at = data.index(b"\x28\x00\x10\x00US\x02\x00") + 8
    with pytest.raises(
        DecodeError, match=r"a frame of \(36, 48\) where its header says \(20, 48\)"
    ):
        decode(data[:at] + b"\x14\x00" + data[at + 2 :], 1)


def test_more_frames_than_a_file_has_room_for_are_damage(tmp_path: Path) -> None:
    write(tmp_path, **{"x.dcm": dicom(TWELVE, NumberOfFrames=1_000_000)})
    with pytest.raises(UserError, match=r"this is a truncated .* \(1000000 frames are more than"):
        open_source(tmp_path / "x.dcm")
    with pytest.raises(DecodeError, match="1000000 frames are more than it has room for"):
        decode((tmp_path / "x.dcm").read_bytes(), 1)


def test_kinds_that_are_not_read_say_so() -> None:
    data = dicom(TWELVE)
    deflated = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0"[:20])
    assert deflated != data
    with pytest.raises(DecodeError):
        decode(deflated, 1)
    with pytest.raises(DecodeError, match="kind of colour"):
        decode(dicom(COLOUR, PhotometricInterpretation="HSV"), 3)


def test_broken_files_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "in", **{"x.dcm": dicom(TWELVE)[:-100], "y.dcm": dicom(TWELVE)})
    source = open_source(tmp_path / "in")
    with pytest.raises(DecodeError) as told:
        decode(source.read(0), 1)
    assert "truncated or damaged DICOM" in str(told.value)
    bad = BadFiles(tmp_path / "bad.txt", max_share=1)
    bad.note(source, 2, [(0, str(told.value))])
    assert (tmp_path / "bad.txt").read_text().startswith(str(tmp_path / "in/x.dcm"))


@pytest.mark.parametrize("syntax", ["", "RLELossless", "JPEG2000Lossless"])
def test_mutants_give_an_image_or_a_decode_error(syntax: str) -> None:
    if syntax == "JPEG2000Lossless":
        pytest.importorskip("openjpeg", reason="pylibjpeg-openjpeg is not installed")
    rng, readable = np.random.default_rng(1), 0
    data = dicom(TWELVE, BitsStored=12, WindowCenter=40, WindowWidth=400, syntax=syntax)
    for _ in range(60):
        mutant = data[:128] + spoiled(data[128:], rng)
        with contextlib.suppress(DecodeError):
            height, width, channels, _ = probe(mutant)
            image = decode(mutant, channels, max_pixels=1 << 22)
            assert tuple(image.shape) == (channels, height, width)
            readable += 1
    assert 0 < readable < 60
