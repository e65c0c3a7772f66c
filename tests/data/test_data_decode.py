"""Every odd kind of image comes out as what it shows, and damaged ones are errors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from patchmine.data.decoding.decode import DecodeError, decode, probe
from patchmine.data.decoding.unnamed import unnamed_warnings


def smooth_image(height: int = 40, width: int = 56) -> Image.Image:
    """Colour gradients: kind to JPEG, different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        255 * x / (width - 1),
        255 * y / (height - 1),
        255 * (x + y) / (height + width - 2) * 0.5,
    ]
    return Image.fromarray(np.stack(planes, -1).round().astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def as_pil(image: torch.Tensor) -> NDArray[np.uint8]:
    """(H, W, C) of a decoded image."""
    return image.permute(1, 2, 0).numpy()


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


IMAGE = smooth_image()
PIXELS = np.asarray(IMAGE)
TRANSPARENT = IMAGE.quantize(32)
TRANSPARENT.info["transparency"] = 0


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000"]
)
def test_formats_agree_with_pil(file_format: str) -> None:
    image = IMAGE.quantize(64) if file_format == "GIF" else IMAGE
    data = encoded(image, file_format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(as_pil(decode(data, 3)), expected)
    assert np.abs(expected.astype(int) - PIXELS).mean() < 8
    assert probe(data)[:3] == (40, 56, 3)


@pytest.mark.parametrize(
    ("image", "stored"),
    [
        (IMAGE.convert("1"), 1),
        (IMAGE.convert("L"), 1),
        (IMAGE.convert("LA"), 2),
        (IMAGE, 3),
        (IMAGE.convert("RGBA"), 4),
        (IMAGE.quantize(32), 3),
        (TRANSPARENT, 4),
    ],
    ids=[
        "1-bit",
        "grey",
        "grey+alpha",
        "colour",
        "colour+alpha",
        "palette",
        "palette with transparency",
    ],
)
@pytest.mark.parametrize("wrapped", [True, False], ids=["png", "pil"])
def test_modes_become_colour_or_grey(image: Image.Image, stored: int, wrapped: bool) -> None:
    raw = encoded(image, "PNG") if wrapped else image
    assert probe(raw) == (40, 56, stored, "uint8")
    colour, grey, natural = decode(raw, 3), decode(raw, 1), decode(raw, stored)
    assert np.array_equal(as_pil(colour), np.asarray(image.convert("RGB")))
    assert (
        np.abs(
            grey[0].int().numpy() - np.asarray(image.convert("RGB").convert("L")).astype(int)
        ).max()
        <= 1
    )
    assert natural.shape == (stored, 40, 56)
    with pytest.raises(
        DecodeError,
        match=rf"has {stored} channels? where the run expects 13; set channels={stored}$",
    ):
        decode(raw, 13)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(IMAGE, file_format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(as_pil(decode(data, 3)), upright)
    assert probe(data) == (*upright.shape, "uint8")


def test_cmyk_jpeg_shows_the_right_colours() -> None:
    data = encoded(IMAGE.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # and so its values are inverted, as Photoshop's are
    assert np.abs(as_pil(decode(data, 3)).astype(int) - PIXELS).mean() < 3
    twice_coded = bytearray(data)
    twice_coded[data.index(b"Adobe") + 11] = 2  # says that the four channels are YCCK
    expected = np.asarray(Image.open(io.BytesIO(bytes(twice_coded))).convert("RGB"))
    assert np.array_equal(as_pil(decode(bytes(twice_coded), 3)), expected)
    assert probe(data) == (40, 56, 3, "uint8")


def test_cmyk_tiff_is_not_inverted() -> None:
    data = encoded(IMAGE.convert("CMYK"), "TIFF")
    assert np.array_equal(as_pil(decode(data, 3)), PIXELS)


def deep(channels: int) -> NDArray[np.uint16]:
    """(H, W, C) 16-bit values that 8 bits cannot hold."""
    return np.random.default_rng(0).integers(0, 65536, (20, 24, channels)).astype(np.uint16)


def deep_colour_png(channels: int) -> bytes:
    """A 16-bit PNG of 3 or 4 channels, chunk by chunk, as PIL cannot write one."""
    import struct
    import zlib

    values = deep(channels)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 24, 20, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_png_keeps_its_depth(channels: int) -> None:
    data = deep_colour_png(channels)
    expected = deep(channels).transpose(2, 0, 1) / 65535
    assert probe(data) == (20, 24, channels, "uint16")
    assert np.allclose(decode(data, channels), expected, atol=1e-7)
    assert np.allclose(decode(data, 3), expected[:1] if channels == 2 else expected[:3], atol=1e-7)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_depth(file_format: str) -> None:
    values = deep(1)[..., 0]
    data = encoded(Image.fromarray(values), file_format)
    assert np.allclose(decode(data, 1)[0], values / 65535, atol=1e-7)
    assert decode(data, 3).shape == (3, 20, 24)
    assert probe(data)[:3] == (20, 24, 1)


def test_float_tiff_is_taken_as_stored() -> None:
    values = np.linspace(-2, 5, 480, dtype=np.float32).reshape(20, 24)
    data = encoded(Image.fromarray(values), "TIFF")
    assert np.array_equal(decode(data, 1)[0], values)
    assert probe(data) == (20, 24, 1, "float32")
    values[3, 3] = np.nan
    with pytest.raises(DecodeError, match="not finite"):
        decode(encoded(Image.fromarray(values), "TIFF"), 1)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_many_channelled_tiff(planar: str, dtype: type) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = (np.random.default_rng(1).random((20, 24, 13)) * 200).astype(dtype)
    file = io.BytesIO()
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    tifffile.imwrite(file, stored, planarconfig=planar, photometric="minisblack")
    image = decode(file.getvalue(), 13)
    expected = decode(values, 13)
    assert image.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    assert torch.equal(image, expected)
    assert probe(file.getvalue()) == (20, 24, 13, np.dtype(dtype).name)
    with pytest.raises(
        DecodeError, match="has 13 channels where the run expects 3; set channels=13"
    ):
        decode(file.getvalue(), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_colour_tiff_keeps_depth_and_orientation(orientation: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tag = (0x0112, "H", 1, orientation, True)
    tifffile.imwrite(file, deep(3), photometric="rgb", extratags=[tag])
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = io.BytesIO(encoded(Image.fromarray((deep(3) >> 8).astype(np.uint8)), "PNG", exif=exif))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(small)))  # the same in 8 bits
    image = decode(file.getvalue(), 3)
    assert np.array_equal((image * 65535).round().int().numpy() >> 8, upright.transpose(2, 0, 1))
    assert probe(file.getvalue()) == (*upright.shape, "uint16")


def test_without_tifffile_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, deep(3), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DecodeError, match="pip install tifffile"):
        decode(file.getvalue(), 3)
    assert decode(encoded(IMAGE, "TIFF"), 3).shape == (3, 40, 56)


@pytest.mark.parametrize("wrap", [npy, lambda array: array], ids=["npy", "array"])
def test_arrays_find_their_channel_axis(wrap: Any) -> None:
    values = np.random.default_rng(3).integers(0, 255, (20, 24, 13), dtype=np.uint8)
    expected = torch.from_numpy(values.transpose(2, 0, 1).copy())
    assert torch.equal(decode(wrap(values), 13), expected)
    assert torch.equal(decode(wrap(values.transpose(2, 0, 1)), 13), expected)
    assert torch.equal(decode(wrap(values[..., :3]), 3), expected[:3])
    assert torch.equal(decode(wrap(values[..., 0]), 1), expected[:1])
    assert torch.equal(decode(wrap(values[..., :4]), 3), expected[:3])  # the fourth counts as alpha
    assert probe(wrap(values)) == probe(wrap(values.transpose(2, 0, 1))) == (20, 24, 13, "uint8")
    with pytest.raises(
        DecodeError, match="set channels=2"
    ):  # two channels of an array are no grey and alpha
        decode(wrap(values[..., :2]), 3)


def test_number_types_of_arrays() -> None:
    grey = np.arange(480).reshape(20, 24)
    assert decode(grey % 2 == 0, 1).unique().tolist() == [0, 255]
    assert decode(grey.astype(np.uint16), 1).max() == pytest.approx(479 / 65535)
    assert decode((grey - 32768).astype(np.int16), 1).max() == pytest.approx(479 / 65535)
    assert decode(grey.astype(">u2"), 1).max() == pytest.approx(479 / 65535)
    assert decode(grey, 1).max() == 479  # wide integers have no range of their own
    assert decode(grey.astype(np.float64), 1).dtype == torch.float32
    with pytest.raises(DecodeError, match="type complex128"):
        decode(grey.astype(complex), 1)
    with pytest.raises(DecodeError, match="no pixels"):
        decode(np.zeros((0, 5), np.uint8), 1)
    with pytest.raises(DecodeError, match="shape"):
        decode(np.zeros((2, 2, 2, 2), np.uint8), 1)
    with pytest.raises(DecodeError, match="values of type object, which is no image"):
        decode(npy(np.array([{}], dtype=object)), 1)  # would have to be unpickled


def test_tensors_pass_through() -> None:
    image = torch.randint(0, 256, (3, 8, 9), dtype=torch.uint8)
    assert torch.equal(decode(image, 3), image)
    assert torch.equal(decode(image[0], 3), image[:1].expand(3, -1, -1))
    assert decode(image.half() / 255, 3).dtype == torch.float32
    assert decode(image.to(torch.int16), 3).dtype == torch.float32
    assert probe(image) == (8, 9, 3, "uint8")
    with pytest.raises(DecodeError, match="is a str"):
        decode("a.jpg", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_cut_short_is_an_error(file_format: str, share: float) -> None:
    data = encoded(IMAGE.quantize(64) if file_format == "GIF" else IMAGE, file_format)
    with pytest.raises(DecodeError, match=r"is (no|a truncated|a TIFF)"):
        decode(data[: int(len(data) * share)], 3)


@pytest.fixture(params=[True, False], ids=["torchvision", "without torchvision"])
def either_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr("patchmine.data.decoding.decode._torchvision_jpeg", lambda: None)


@pytest.mark.usefixtures("either_decoder")
def test_both_jpeg_decoders_give_the_same() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (IMAGE, IMAGE.convert("L"), IMAGE.convert("CMYK")):
        data = encoded(image, "JPEG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert np.array_equal(as_pil(decode(data, 3)), np.asarray(expected))
        # Torchvision takes the luma that the file holds, PIL works it out from rounded colours.
        assert (
            np.abs(
                decode(data, 1)[0].int().numpy() - np.asarray(expected.convert("L")).astype(int)
            ).max()
            <= 3
        )
        assert decode(data + b"something behind the picture", 3).shape == (3, 56, 40)


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_truncated_jpeg_is_never_half_grey(options: dict[str, bool]) -> None:
    data = encoded(smooth_image(200, 300), "JPEG", quality=95, **options)
    for length in range(2, len(data) - 1, 97):
        for padding in (
            b"",
            b"\0" * len(data),
        ):  # zeros: an interrupted copy into a preallocated file
            with pytest.raises(DecodeError):
                decode(data[:length] + padding, 3)


@pytest.mark.parametrize(
    "data", [b"", b"no image at all", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\x93NUMPY"]
)
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    for function in (lambda: decode(data, 3), lambda: probe(data)):
        with pytest.raises(DecodeError):
            function()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    spoiled = bytearray(data)
    for place in rng.integers(2, len(data), rng.integers(1, 5)):
        spoiled[place] = rng.integers(0, 256)
    return bytes(spoiled)


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "deep PNG", "WEBP", "TIFF", "deep TIFF", "BMP", "GIF", "npy"]
)
def test_damage_gives_an_image_or_a_decode_error(file_format: str) -> None:
    """Nothing else: neither another exception, nor the end of the process, which torchvision's PNG
    decoder brings.
    """
    rng = np.random.default_rng(0)
    if file_format == "deep PNG":
        data = deep_colour_png(3)
    elif file_format == "deep TIFF":
        file = io.BytesIO()
        pytest.importorskip("tifffile").imwrite(file, deep(3), photometric="rgb")
        data = file.getvalue()
    elif file_format == "npy":
        data = npy(PIXELS)
    else:
        data = encoded(IMAGE.quantize(64) if file_format == "GIF" else IMAGE, file_format)
    readable = 0
    for _ in range(150):
        spoiled = damaged(data, rng)
        try:
            image = decode(spoiled, 3)
            assert image.shape[0] == 3
            readable += 1
        except DecodeError:
            pass
        with contextlib.suppress(DecodeError):
            probe(spoiled)
    assert readable < 150


def test_photographs_decode_as_pil_reads_them(shared: Path) -> None:
    archive = shared / "data" / "photos.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is missing")
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile()][::10]
        contents = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    for data in contents:
        image = Image.open(io.BytesIO(data))
        assert np.array_equal(
            as_pil(decode(data, 3)), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        )


def test_what_our_own_readers_of_headers_stumble_over_is_a_damaged_image() -> None:
    cut = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08\x00"  # a frame whose description ends with the file
    far = (
        b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(8)
    )  # a BigTIFF whose first directory lies at 2**64 - 1
    for data in (cut, far):
        for read in (probe, lambda raw: decode(raw, 3)):
            with pytest.raises(DecodeError, match="damaged"):
                read(data)


def test_every_format_that_counts_by_its_ending_is_opened() -> None:
    assert np.array_equal(as_pil(decode(encoded(IMAGE, "TGA"), 3)), PIXELS)
    with pytest.raises(DecodeError, match=r"^is no readable image \(cannot identify image file\)$"):
        decode(b"some text", 3)


def test_the_reason_of_a_damaged_jpeg_names_no_place_in_a_library() -> None:
    data = encoded(IMAGE, "JPEG")
    with pytest.raises(DecodeError, match=r"^is a truncated or damaged JPEG") as caught:
        decode(data[:-200], 3)
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize(
    "item", [None, "1.jpg", {"image": 1}, np.float32(1), torch.tensor(1), torch.ones(3)]
)
def test_what_is_no_image_is_said_by_probe_and_decode_alike(item: Any) -> None:
    with pytest.raises(DecodeError) as decoded:
        decode(item, 3)
    with pytest.raises(DecodeError) as probed:
        probe(item)
    assert str(decoded.value) == str(probed.value)


def test_only_the_words_of_decoders_are_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    def another_thread() -> None:
        os.write(2, b"a user's own words\n")
        with unnamed_warnings():  # two at once leave standard error as it was
            os.write(2, b"half a line")

    def leave_by_an_error() -> None:
        with unnamed_warnings():
            os.write(2, b"Corrupt JPEG data: bad Huffman code\n")
            thread = threading.Thread(target=another_thread)
            thread.start()
            thread.join()
            os.write(2, b"\nTIFFReadDirectory: Warning, Unknown field.\n")
            raise KeyError

    with pytest.raises(KeyError):
        leave_by_an_error()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "a user's own words\nhalf a line\nafter\n"
