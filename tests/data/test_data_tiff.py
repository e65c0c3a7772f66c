"""Which pages of a TIFF are the image: `probe` and `decode` answer alike, by the table in
docs/data.md.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from patchmine.data.decoding.decode import DecodeError, decode, probe

tifffile = pytest.importorskip("tifffile")
HEIGHT, WIDTH = 20, 24


def values(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    """Noise (*shape, 20, 24)."""
    top = 2 if dtype is bool else 250
    return np.random.default_rng(0).integers(0, top, (*shape, HEIGHT, WIDTH)).astype(dtype)


def written(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **({"photometric": "minisblack"} | options))
    return file.getvalue()


def paged(*pages: tuple[NDArray[Any], dict[str, Any]]) -> bytes:
    """Pages that say nothing of each other, each with its own options."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for array, options in pages:
            writer.write(array, **({"photometric": "minisblack", "metadata": None} | options))
    return file.getvalue()


def holds(data: bytes, expected: NDArray[Any]) -> bool:
    """Whether both ways of asking say that the image is ``expected`` (C, H, W)."""
    channels, height, width = expected.shape
    image = decode(data, channels)
    assert probe(data)[:3] == (height, width, channels) == (*image.shape[1:], image.shape[0])
    wrong = channels + 5
    with pytest.raises(
        DecodeError, match=f"has {channels} channels? where .* {wrong}; set channels={channels}$"
    ):
        decode(data, wrong)
    return bool(np.array_equal(image, decode(np.ascontiguousarray(expected), channels)))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.int16, np.int8, np.float32, np.float64, bool]
)
@pytest.mark.parametrize("pages", [2, 3, 5])
def test_grey_pages_are_channels(pages: int, dtype: Any, compression: str | None) -> None:
    stack = values(pages, dtype=dtype)
    stack = stack * 200.5 if dtype in (np.float32, np.float64) else stack
    data = written(stack, compression=compression)
    assert holds(data, stack)
    assert probe(data)[3] == ("uint8" if dtype is bool else np.dtype(dtype).name)


def test_a_stack_is_refused_as_interleaved_channels_are() -> None:
    data = written(values(5))
    for wrong in (1, 3):
        with pytest.raises(
            DecodeError, match=f"has 5 channels where the run expects {wrong}; set channels=5$"
        ):
            decode(data, wrong)
    with pytest.raises(DecodeError, match="set channels=4"):
        decode(written(values(4)), 3)  # the fourth of four pages is no alpha


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "group4"])
def test_pages_that_pil_writes(compression: str | None) -> None:
    stack = values(4, dtype=bool)
    first, *rest = (Image.fromarray(page) for page in stack)
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=rest, compression=compression)
    assert holds(file.getvalue(), stack)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_byte_orders_and_large_files(order: str, big: bool) -> None:
    stack = values(3, dtype=np.uint16)
    assert holds(written(stack, byteorder=order, bigtiff=big, metadata=None), stack)


def test_pages_of_several_samples_are_pictures_by_themselves() -> None:
    colour, palette = values(5, 3).transpose(0, 2, 3, 1), values(3)
    assert holds(written(colour, photometric="rgb"), colour[0].transpose(2, 0, 1))
    planes = values(3, dtype=np.uint16)
    assert holds(written(planes, photometric="rgb", planarconfig="separate"), planes)
    first, *rest = (Image.fromarray(page).quantize(16) for page in palette)
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=rest)
    assert holds(file.getvalue(), np.asarray(first.convert("RGB")).transpose(2, 0, 1))
    with_alpha = Image.fromarray(palette[0]).convert("LA")
    file = io.BytesIO()
    with_alpha.save(
        file, "TIFF", save_all=True, append_images=[Image.fromarray(page) for page in palette]
    )
    assert probe(file.getvalue())[2] == 2
    assert np.array_equal(decode(file.getvalue(), 1)[0], palette[0])


def test_a_fourth_sample_of_unknown_meaning_is_kept() -> None:
    image = values(4).transpose(1, 2, 0)  # red, green, blue and infrared, say
    data = written(image, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(decode(data, 4), image.transpose(2, 0, 1))
    assert np.array_equal(decode(data, 3), image.transpose(2, 0, 1)[:3])
    two = values(2).transpose(1, 2, 0)
    assert holds(written(two, planarconfig="contig"), two.transpose(2, 0, 1))
    with pytest.raises(DecodeError, match="set channels=2"):
        decode(written(two, planarconfig="contig"), 1)


def test_reduced_pages_and_pages_of_other_sizes_are_no_channels() -> None:
    full, other, small = values(), values() // 2, values()[::2, ::2]
    reduced = {"subfiletype": 1}
    for pages in (
        [(full, {}), (small, reduced)],
        [(small, reduced), (full, {})],
        [(full, {}), (small, {})],
        [(full, {}), (full, reduced)],
        [(full, {}), (full.astype(np.uint16), {})],
        [(full, {"tile": (16, 16), "subifds": 1}), (small, reduced | {"tile": (16, 16)})],
    ):
        assert holds(paged(*pages), full[None])
    assert holds(
        paged((full, {}), (small, reduced), (other, {}), (small // 2, reduced)),
        np.stack([full, other]),
    )


@pytest.mark.parametrize("axes", ["ZCYX", "TCYX", "TZCYX", "CYX", "ZYX", "TYX"])
def test_imagej_says_which_pages_are_channels(axes: str) -> None:
    sizes = {"T": 3, "Z": 4, "C": 2}
    stack = values(*(sizes[axis] for axis in axes[:-2]))
    first = stack[(0,) * (len(axes) - 3)] if "C" in axes else stack[0][None]
    assert holds(written(stack, imagej=True, metadata={"axes": axes}), first)


@pytest.mark.parametrize("ome", [True, False])
@pytest.mark.parametrize("axes", ["ZCYX", "CZYX", "TCZYX", "ZYX", "TYX"])
def test_ome_and_tifffile_say_so_too(axes: str, ome: bool) -> None:
    sizes = {"T": 2, "Z": 4, "C": 3}
    stack = values(*(sizes[axis] for axis in axes[:-2]))
    place = tuple(slice(None) if axis == "C" else 0 for axis in axes[:-2])
    first = stack[place] if "C" in axes else stack[0][None]
    assert holds(written(stack, ome=ome, metadata={"axes": axes}), first)


@pytest.mark.parametrize(
    "description",
    [
        "ImageJ=1.54\nimages=3\nchannels=999999999\n",
        '{"shape": [3, 20, 24], "axes": "CYX" ' + "[" * 2000,
        '{"shape": {}, "axes": 3}',
        '<OME><Image><Pixels SizeC="700" SizeZ="9" SizeT="9" DimensionOrder="XYZTC"/>',
        "<OME><Image><Pixels ",
    ],
)
def test_a_description_that_lies_leaves_the_pages(description: str) -> None:
    stack = values(3)
    pages = [
        (page, {"description": description if not number else None})
        for number, page in enumerate(stack)
    ]
    assert holds(paged(*pages), stack)


def test_white_that_is_zero_and_few_bits_fill_the_range() -> None:
    grey = values(dtype=np.uint16)
    assert np.allclose(
        decode(written(grey, photometric="miniswhite"), 1)[0], 1 - grey / 65535, atol=1e-6
    )
    few = values(dtype=np.uint16) * 16
    pytest.importorskip("imagecodecs")
    assert np.allclose(decode(written(few, bitspersample=12), 1)[0], few / 4095, atol=1e-4)


@pytest.mark.parametrize("compression", [5, 50000, 34712], ids=["LZW", "Zstandard", "JPEG 2000"])
def test_a_missing_codec_is_a_sentence(compression: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = patched(
        written(values(3, dtype=np.uint16).transpose(1, 2, 0), photometric="rgb"), 259, compression
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "tifffile"]:
        monkeypatch.delitem(sys.modules, name)  # so that it is imported anew, without
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(DecodeError, match=r"imagecodecs: pip install 'patchmine\[tiff\]'$"):
        decode(data, 3)


def patched(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian classic TIFF with another value of one of its tags, in every directory."""
    place = int.from_bytes(data[4:8], "little")
    changed = bytearray(data)
    while place:
        count = int.from_bytes(data[place : place + 2], "little")
        for at in range(place + 2, place + 2 + 12 * count, 12):
            number, kind = struct.unpack_from("<HH", data, at)
            if number == tag:
                changed[at + 8 : at + 12] = struct.pack(
                    "<I" if kind == 4 else "<HH", *([value] if kind == 4 else [value, 0])
                )
        place = int.from_bytes(data[place + 2 + 12 * count : place + 6 + 12 * count], "little")
    return bytes(changed)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("tag", "value"), [(257, 1 << 31), (257, 100_000), (256, 1 << 20), (278, 1), (273, 1 << 30)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_sizes_that_the_file_cannot_hold_are_refused_at_once(
    tag: int, value: int, dtype: Any, compression: str | None
) -> None:
    image = values(3, dtype=dtype).transpose(1, 2, 0)
    data = patched(
        written(image, photometric="rgb", compression=compression, rowsperstrip=20), tag, value
    )
    with pytest.raises(DecodeError, match=r"max_pixels|truncated|damaged|cannot be read"):
        decode(data, 3)


def test_chains_that_go_in_a_circle_or_on_for_ever_end() -> None:
    stack = values(3)
    data = bytearray(paged(*((page, {}) for page in stack)))
    first = int.from_bytes(data[4:8], "little")
    places = [first]
    for _ in range(2):
        end = places[-1] + 2 + 12 * int.from_bytes(data[places[-1] : places[-1] + 2], "little")
        places.append(int.from_bytes(data[end : end + 4], "little"))
    end = places[-1] + 2 + 12 * int.from_bytes(data[places[-1] : places[-1] + 2], "little")
    data[end : end + 4] = struct.pack("<I", first)
    assert holds(bytes(data), stack)
    empty = b"".join(b"\0\0" + struct.pack("<I", 14 + 6 * number) for number in range(5000))
    with pytest.raises(DecodeError, match="more than 4096 pages"):
        probe(b"II*\0" + struct.pack("<I", 8) + empty)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pages", [1, 3])
def test_stacks_are_turned_too(pages: int, orientation: int) -> None:
    stack = values(pages)
    options: dict[str, Any] = {"extratags": [(274, "H", 1, orientation, True)]}
    data = paged(*((page, options) for page in stack))
    single: Sequence[bytes] = [paged((page, options)) for page in stack]
    expected = np.concatenate([decode(one, 1).numpy() for one in single])
    assert np.array_equal(decode(data, pages), expected)
    assert probe(data)[:2] == expected.shape[1:]


def test_four_grey_samples_are_bands_and_no_alpha() -> None:
    bands = values(4).transpose(1, 2, 0)  # as GDAL writes blue, green, red and infrared
    data = written(bands, photometric="minisblack", planarconfig="contig")
    assert holds(data, bands.transpose(2, 0, 1))
    with pytest.raises(DecodeError, match="set channels=4"):
        decode(data, 3)
    data = written(bands, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(decode(data, 3), bands.transpose(2, 0, 1)[:3])


@pytest.mark.parametrize("compression", ["webp", "zstd", "lzma"])
def test_codecs_that_pil_may_lack_are_read_by_tifffile(
    compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("imagecodecs")
    image = values(3).transpose(1, 2, 0)
    options = {"level": 101} if compression == "webp" else {}  # lossless
    data = written(image, photometric="rgb", compression=compression, compressionargs=options)
    assert np.array_equal(decode(data, 3), image.transpose(2, 0, 1))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("nodata", "dtype"), [("-9999", "float32"), ("nan", "float32"), ("0", "uint16")]
)
def test_pixels_without_data_get_the_mean_of_the_others(nodata: str, dtype: str) -> None:
    bands = np.random.default_rng(0).integers(1, 1000, (4, 20, 30)).astype(dtype)
    bands[:, 5:9, 7] = float(nodata)
    bands[1, 0, 0] = 0  # in one band alone, which is a value
    file = io.BytesIO()
    tags = [(42113, "s", 0, nodata, True)]
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(file, bands, photometric="minisblack", planarconfig="separate", extratags=tags)
    found = decode(file.getvalue(), 4).numpy()
    known = np.ones((20, 30), bool)
    known[5:9, 7] = False
    scale = 65535 if dtype == "uint16" else 1
    np.testing.assert_allclose(found[:, known] * scale, bands[:, known], rtol=1e-5)
    means = bands[:, known].mean(1, dtype=float)
    np.testing.assert_allclose(found[:, 6, 7] * scale, means, atol=0.51 if scale > 1 else 1e-2)
