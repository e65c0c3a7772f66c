"""Headers are believed only as far as the file and `max_pixels` go, and what lies beside the pixels
does not matter.
"""

from __future__ import annotations

import contextlib
import io
import resource
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from made_files import spoiled
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from patchmine.data.decoding.bounds import check_pixels, install_command
from patchmine.data.decoding.decode import DecodeError, decode, probe
from patchmine.data.decoding.orientation import TURNED, of_matrix, upright, upright_tensor
from patchmine.data.settings import MAX_PIXELS

HEIGHT, WIDTH = 40, 56


def picture() -> Image.Image:
    """Gradients, different in every corner."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(np.stack([4 * x, 6 * y, x + y], -1).astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(**options: Any) -> bytes:
    file = io.BytesIO()
    stack = np.moveaxis(np.asarray(picture()), 2, 0)
    pytest.importorskip("tifffile").imwrite(file, stack, photometric="minisblack", **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


PIXELS = np.asarray(picture()).transpose(2, 0, 1)
PNG, JPEG = encoded(picture(), "PNG"), encoded(picture(), "JPEG", quality=95)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


# Orientation
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_ways_of_turning_agree_with_the_matrix(orientation: int) -> None:
    import torch

    turned = upright(PIXELS, orientation)
    assert np.array_equal(upright_tensor(torch.from_numpy(PIXELS.copy()), orientation), turned)
    matrices = {
        1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
        5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
    }  # fmt: skip
    a, b, c, d = matrices[orientation]
    assert of_matrix(a, b, c, d) == orientation
    for row, column in ((0, 0), (3, 50), (39, 7)):
        x, y = a * column + c * row, b * column + d * row
        x, y = (
            (x if a + c > 0 else x + turned.shape[2] - 1),
            (y if b + d > 0 else y + turned.shape[1] - 1),
        )
        assert np.array_equal(turned[:, y, x], PIXELS[:, row, column])


@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_found_beside_damage(
    orientation: int, torchvision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torchvision:
        monkeypatch.setattr("patchmine.data.decoding.decode._torchvision_jpeg", lambda: None)
    block = exif(orientation)[6:]
    order = "<" if block[:2] == b"II" else ">"
    entries = [
        struct.pack(order + "HHI", 0x0112, 3, 1) + struct.pack(order + "HH", orientation, 0),
        struct.pack(order + "HHI", 0x011A, 2, 500)
        + b"\xff\xff\xff\x00",  # XResolution as text, outside of the block
        struct.pack(order + "HHII", 0x8769, 4, 1, 1 << 30),  # details that are elsewhere
    ]
    head = block[:4] + struct.pack(order + "IH", 8, len(entries))
    odd = (
        b"Exif\0\0" + head + b"".join(entries) + struct.pack(order + "I", 77777)
    )  # and a thumbnail that is nowhere
    segment = b"\xff\xe1" + struct.pack(">H", len(odd) + 2) + odd
    text = (
        b"\xff\xe1"
        + struct.pack(">H", 40)
        + b"http://ns.adobe.com/xap/1.0/\0<broken".ljust(38, b"<")
    )
    jpeg = JPEG[:2] + text + segment + JPEG[2:]
    png = PNG[:33] + chunk(b"eXIf", odd[6:], checksum=3) + PNG[33:]
    plain = decode(JPEG, 3).numpy()
    assert np.array_equal(decode(jpeg, 3), upright(plain, orientation))
    assert np.array_equal(decode(png, 3), upright(PIXELS, orientation))
    for data in (jpeg, png):
        assert probe(data)[:2] == ((WIDTH, HEIGHT) if orientation in TURNED else (HEIGHT, WIDTH))


@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("zipped", [True, False])
def test_orientation_in_imagemagicks_profile(orientation: int, zipped: bool) -> None:
    text = b"\nexif\n    %d\n%s\n" % (len(exif(orientation)), exif(orientation).hex().encode())
    name = b"Raw profile type exif\0"
    part = (
        chunk(b"zTXt", name + b"\0" + zlib.compress(text))
        if zipped
        else chunk(b"tEXt", name + text)
    )
    assert np.array_equal(decode(PNG[:33] + part + PNG[33:], 3), upright(PIXELS, orientation))


@pytest.mark.parametrize(
    "block",
    [
        b"", b"no TIFF at all", b"Exif\0\0", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01abcd",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
    ],
)  # fmt: skip
def test_exif_that_is_none_means_upright(block: bytes) -> None:
    app1 = b"Exif\0\0" + block
    jpeg = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + JPEG[2:]
    assert np.array_equal(decode(jpeg, 3), decode(JPEG, 3))
    assert np.array_equal(decode(PNG[:33] + chunk(b"eXIf", block) + PNG[33:], 3), PIXELS)
    webp = encoded(picture(), "WEBP", lossless=True, exif=block or b"x")
    assert np.array_equal(decode(webp, 3), PIXELS)


# Sound pixels beside other things
# -------------------------------------------------------------------------------------


def with_text(size: int) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("much", "a" * size, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta" + "<" * 100)
    return encoded(picture(), "PNG", pnginfo=text)


@pytest.mark.parametrize(
    "beside",
    [
        lambda: with_text(2_000_000),
        lambda: with_text(80_000_000),
        lambda: encoded(picture(), "PNG", icc_profile=bytes(2_000_000)),
        lambda: PNG[:33] + chunk(b"iCCP", b"icc\0\0" + b"no zlib") + PNG[33:],
        lambda: (
            PNG[:33]
            + chunk(b"tEXt", b"", checksum=1)
            + chunk(b"pHYs", b"\0")
            + chunk(b"acTL", b"")
            + PNG[33:]
        ),
        lambda: PNG + b"behind" * 1000,
        lambda: encoded(picture(), "WEBP", lossless=True, icc_profile=b"none", xmp=b"<" * 100),
        lambda: encoded(picture(), "TIFF", icc_profile=b"none"),
        lambda: encoded(
            picture(), "TIFF", tiffinfo={270: "a" * 2_000_000, 700: b"<" * 99, 34377: b"8BIM"}
        ),
        lambda: damaged_tags(compression=None),
        lambda: damaged_tags(compression="tiff_lzw"),
    ],
)
def test_what_lies_beside_the_pixels_does_not_matter(beside: Callable[[], bytes]) -> None:
    data = beside()
    assert probe(data) == (HEIGHT, WIDTH, 3, "uint8")
    assert np.array_equal(decode(data, 3), PIXELS)


def damaged_tags(compression: str | None) -> bytes:
    """A TIFF whose resolution is text, and whose EXIF and GPS blocks lie outside of the file."""
    tags = {282: 72.0, 283: 72.0, 34665: 8, 34853: 8}
    options: dict[str, Any] = {"tiffinfo": tags} | (
        {"compression": compression} if compression else {}
    )
    data = bytearray(encoded(picture(), "TIFF", **options))
    place = int.from_bytes(data[4:8], "little")
    for at in range(
        place + 2, place + 2 + 12 * int.from_bytes(data[place : place + 2], "little"), 12
    ):
        tag = int.from_bytes(data[at : at + 2], "little")
        if tag in (282, 283):
            data[at + 2 : at + 4] = b"\2\0"
        if tag in (34665, 34853):
            data[at + 8 : at + 12] = b"\xff\xff\xff\x7f"
    return bytes(data)


@pytest.mark.parametrize("torchvision", [True, False])
def test_jpegs_with_broken_segments(torchvision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torchvision:
        monkeypatch.setattr("patchmine.data.decoding.decode._torchvision_jpeg", lambda: None)
    expected = decode(JPEG, 3)
    for marker, content in (
        (0xE1, b"Exif"),
        (0xE2, b"ICC_PROFILE\0\x01"),
        (0xE2, b"MPF\0II*\0\xff"),
        (0xED, b"Photoshop 3.0\0x"),
    ):
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        assert np.array_equal(decode(JPEG[:2] + segment + JPEG[2:] + b"behind", 3), expected)
        assert probe(JPEG[:2] + b"\xff\xff" + segment + JPEG[2:]) == (HEIGHT, WIDTH, 3, "uint8")


# Sizes
# ----------------------------------------------------------------------------------------------------------------


def claiming(file_format: str, height: int, width: int) -> bytes:
    """A small file that claims to be larger than it is."""
    size = struct.pack(">II", width, height)
    if file_format == "PNG":
        return PNG[:8] + chunk(b"IHDR", size + PNG[24:29]) + PNG[33:]
    if file_format == "JPEG":
        place = JPEG.index(b"\xff\xc0") + 5
        return JPEG[:place] + struct.pack(">HH", height, width) + JPEG[place + 4 :]
    if file_format == "BMP":
        data = encoded(picture(), "BMP")
        return data[:18] + struct.pack("<ii", width, height) + data[26:]
    if file_format == "GIF":
        data = encoded(picture().quantize(8), "GIF")
        return data[:6] + struct.pack("<HH", width, height) + data[10:]
    if file_format == "PPM":
        return b"P6 %d %d 255\n" % (width, height) + bytes(100)
    if file_format == "WEBP":
        data = encoded(picture(), "WEBP", lossless=True)
        both = (width - 1) | (height - 1) << 14
        return data[:21] + struct.pack("<I", both | 1 << 28) + data[25:]
    if file_format == "npy":
        return npy(PIXELS[0]).replace(b"(40, 56)", f"({height}, {width})".encode())
    raise AssertionError(file_format)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "npy"])
def test_a_header_that_claims_too_much_is_refused_before_any_work(file_format: str) -> None:
    data = claiming(file_format, 16_000, 16_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        DecodeError, match="truncated" if file_format == "npy" else f"max_pixels={MAX_PIXELS}"
    ):
        decode(data, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("make", [
    lambda: PNG, lambda: JPEG, lambda: encoded(picture(), "BMP"), lambda: encoded(picture(), "WEBP"),
    lambda: encoded(picture(), "TIFF"), lambda: tiff(), lambda: npy(PIXELS), lambda: encoded(picture(), "JPEG2000"),
    lambda: encoded(picture(), "GIF"), lambda: encoded(picture(), "PPM"), lambda: encoded(picture(), "AVIF"),
])  # fmt: skip
def test_every_format_is_held_to_max_pixels(make: Callable[[], bytes]) -> None:
    data = make()
    remedy = rf"max_pixels={HEIGHT * WIDTH - 1} allows; set max_pixels={HEIGHT * WIDTH} or more"
    with pytest.raises(DecodeError, match=remedy):
        decode(data, 3, max_pixels=HEIGHT * WIDTH - 1)
    assert decode(data, 3, max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)


def test_pils_own_limit_does_not_interfere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for file_format in ("PNG", "GIF", "TIFF", "BMP"):
        assert decode(encoded(picture(), file_format), 3).shape == (3, HEIGHT, WIDTH)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_wide_pixels_count_for_more_where_a_file_is_suspiciously_small() -> None:
    check_pixels(8_000, 8_000, MAX_PIXELS, stored=1000)
    check_pixels(8_000, 8_000, MAX_PIXELS, stored=60_000_000, work=52)
    check_pixels(
        8_000, 8_000, MAX_PIXELS + 1, stored=1000, work=52
    )  # whoever raises it is believed
    with pytest.raises(
        DecodeError,
        match=r"would take 3,328 MB to decode from a file of 0.001 MB; .* max_pixels=\d+",
    ):
        check_pixels(8_000, 8_000, MAX_PIXELS, stored=1000, work=52)
    for height, width in ((0, 5), (5, 0), (-3, 4)):
        with pytest.raises(DecodeError, match="no pixels"):
            check_pixels(height, width, MAX_PIXELS, stored=1000)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 9999999999), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 5), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 5), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': 5, }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (5, 5), }",
        "{'descr': '<U3', 'fortran_order': False, 'shape': (5, 5), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (5, 5), }",
        "{'descr': ('<f4', (9999999999,)), 'fortran_order': False, 'shape': (5, 5), }",
        "{'descr': None, 'fortran_order': 3, 'shape': (5, 5), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (5, '\\d'), }",
        "(" * 3000,
        "[" * 9000,
        "\x00\x01",
        "9" * 9000,
        "(\n\t 'a",
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2, 3, 9])
def test_npy_headers_of_any_kind_are_one_error(header: str, version: int) -> None:
    text = header.encode()
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    data = b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(64)
    for function in (probe, lambda raw: decode(raw, 1)):
        with pytest.raises(DecodeError, match="npy file"):
            function(data)


def test_npy_in_either_order() -> None:
    values = np.arange(HEIGHT * WIDTH, dtype=">u2").reshape(HEIGHT, WIDTH)
    assert np.array_equal(decode(npy(np.asfortranarray(values)), 1), decode(npy(values), 1))


# HEIF
# -----------------------------------------------------------------------------------------------------------------


def heic(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    pytest.importorskip("pillow_heif").from_pillow(image).save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_read_and_turned(orientation: int) -> None:
    data = heic(picture(), quality=90, exif=exif(orientation))
    expected = upright(PIXELS, orientation)
    image = decode(data, 3)
    assert image.shape == expected.shape
    assert np.abs(image.numpy().astype(int) - expected).mean() < 3
    assert probe(data) == (*expected.shape[1:], 3, "uint8")


def test_heic_keeps_alpha_grey_and_depth() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    assert decode(heic(picture().convert("RGBA")), 4).shape == (4, HEIGHT, WIDTH)
    assert probe(heic(picture().convert("L"))) == (HEIGHT, WIDTH, 1, "uint8")
    values = (PIXELS.transpose(1, 2, 0).astype(np.uint16) << 8) + 64
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (WIDTH, HEIGHT), values.tobytes()).save(file, quality=-1)
    assert probe(file.getvalue())[3] == "uint16"
    assert (
        np.abs(decode(file.getvalue(), 3).numpy() - values.transpose(2, 0, 1) / 65535).mean() < 0.01
    )


def test_heic_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(picture())
    with pytest.raises(DecodeError, match="max_pixels=100"):
        decode(data, 3, max_pixels=100)
    with pytest.raises(DecodeError, match="HEIF"):
        decode(data[:200], 3)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for function in (probe, lambda raw: decode(raw, 3)):
        with pytest.raises(DecodeError, match=r"pillow-heif: pip install pillow-heif$") as error:
            function(data)
        assert install_command(str(error.value)) == "pip install pillow-heif"


# Mutants
# --------------------------------------------------------------------------------------------------------------


def originals() -> dict[str, Callable[[], bytes]]:
    formats = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF"]
    made: dict[str, Callable[[], bytes]] = {
        name: lambda name=name: encoded(picture(), name, exif=exif(6)) if name not in {"BMP", "GIF", "PPM"} else
        encoded(picture(), name) for name in formats
    }  # fmt: skip
    made |= {
        "npy": lambda: npy(PIXELS),
        "stack": lambda: tiff(compression="zlib"),
        "OME": lambda: tiff(ome=True, metadata={"axes": "CYX"}),
        "ImageJ": lambda: tiff(imagej=True),
        "HEIC": lambda: heic(picture()),
    }
    return made


@pytest.mark.parametrize("name", originals())
def test_mutants_give_an_image_or_a_decode_error(name: str) -> None:
    rng, data = np.random.default_rng(1), originals()[name]()
    assert decode(data, 3).shape[0] == 3
    readable = sum(_agrees(spoiled(data, rng)) for _ in range(60))
    assert readable < 60


def _agrees(mutant: bytes) -> bool:
    """Whether it can still be read, and then as `probe` says it will be."""
    said = None
    with contextlib.suppress(DecodeError):
        said = probe(mutant)
    with contextlib.suppress(DecodeError):
        image = decode(mutant, said[2] if said else 3, max_pixels=1 << 22)
        assert said is not None
        assert tuple(image.shape) == (said[2], said[0], said[1])
        return True
    return False
