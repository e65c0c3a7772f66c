"""Raw items (file contents, arrays, tensors, PIL images) become image tensors of a run's channels.

Each kind of file is told by its first bytes and has one reader, which looks at size and orientation
in the header before anything is decoded.  What else a file carries is kept away from the decoders,
so that it can neither fill the memory nor make them fail.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torchvision  # noqa: F401  registers torch.ops.image
from PIL import Image
from torch import Tensor

from patchmine.data.decoding import headers, heif, jpeg2000, npy, tiff
from patchmine.data.decoding.arrays import channels_first, tensor_channels_first
from patchmine.data.decoding.bounds import (
    PLAIN_WORK,
    DecodeError,
    check_pixels,
    damage,
    decoding,
    pixels_of,
)
from patchmine.data.decoding.domains import DOMAINS, Domain, probe_only, read_only
from patchmine.data.decoding.orientation import (
    TAG,
    TURNED,
    exif_orientation,
    upright,
    upright_tensor,
)
from patchmine.data.decoding.pixels import Pixels, of_array, of_stored, of_tensor
from patchmine.data.decoding.reading import Facts, Piece
from patchmine.data.decoding.tiff_pages import MAGIC, TiffFile
from patchmine.data.decoding.unnamed import unnamed_warnings
from patchmine.data.settings import MAX_PIXELS
from patchmine.errors import foreign_parser

__all__ = ["DecodeError", "Raw", "decode", "decode_known", "no_image", "probe"]

Raw = bytes | bytearray | memoryview | Piece | np.ndarray | Tensor | Image.Image
# What PIL may take a file for: pictures, and no formats for which it starts other programs.
_FORMATS = [
    *("PNG", "WEBP", "GIF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "JPEG", "TGA", "PCX", "SGI"),
    "QOI",
]
# Bytes for each pixel that decoding holds at its peak, where these are more than PIL's usual ones.
_WORK = {"WEBP": 20, "AVIF": 16, "JPEG2000": 24}
_JPEG_WORK, _PROGRESSIVE_WORK, _DEEP_PNG_WORK = 6, 9, 8  # the last for each channel
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_GREY, _COLOUR = 1, 3  # torchvision's ImageReadMode
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type
# PIL mode -> the mode it is read as, channels, dtype; others (CMYK, YCbCr, LAB, HSV) as RGB.
_MODES = {
    **dict.fromkeys(("1", "L"), ("L", 1, "uint8")),
    **dict.fromkeys(("LA", "La"), ("LA", 2, "uint8")),
    **dict.fromkeys(("P", "RGB"), ("RGB", 3, "uint8")),
    **dict.fromkeys(("PA", "RGBA", "RGBa"), ("RGBA", 4, "uint8")),
    **{mode: (mode, 1, "uint16") for mode in ("I;16", "I;16L", "I;16B", "I;16N")},
    "I": ("I", 1, "int32"),
    "F": ("F", 1, "float32"),
}


def _damaged(reason: str) -> DecodeError:
    return DecodeError(f"is a truncated or damaged image ({reason})")


@foreign_parser(_damaged, DecodeError)
def decode(raw: Raw, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The pixels of a raw item, upright, with the channels that a run asks for.

    Args:
        raw: the bytes of a JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, AVIF, HEIC or npy file or
            of a format of `domains`, a `Piece` of a file, a numpy array (H, W), (H, W, C) or
            (C, H, W), a tensor (H, W) or (C, H, W), or a PIL image.  EXIF orientation is applied,
            CMYK and palettes become RGB, of several frames the first counts; pages of a TIFF are as
            docs/data.md says.
        channels: 3 expands grey and drops alpha, 1 takes the luma of colour; any other difference
            is an error.
        max_pixels: a file whose header says that it has more is not decoded.

    Returns:
        (C, H, W) uint8 for 8-bit data, else float32: 16-bit scaled to [0, 1], floats and wider
        integers as stored.

    Raises:
        DecodeError: for an item that is no image, a damaged or too large one, or other channels.
    """
    return _read(raw, channels, max_pixels).fitted(channels)


@foreign_parser(_damaged, DecodeError)
def decode_known(
    raw: Raw, channels: int, max_pixels: int = MAX_PIXELS
) -> tuple[Tensor, Tensor | None]:
    """The pixels of a raw item, and of which of them there is data.

    Args and errors are those of `decode`, which refuses NaN in arrays where this takes it for
    missing.  Missing are also what the file says to be so, and what is wholly transparent.

    Returns:
        (C, H, W), the mean of its channel's other pixels where one is missing; (C, H, W) bool,
        True where there is data, None of an image that misses nothing.
    """
    return _read(raw, channels, max_pixels).known(channels)


def _read(raw: Raw, channels: int, max_pixels: int) -> Pixels:
    if isinstance(raw, (bytes, bytearray, memoryview, Piece)):
        with unnamed_warnings():
            found = _read_stored(raw, channels, max_pixels)
    elif isinstance(raw, Image.Image):
        with unnamed_warnings():
            found = _from_pil(raw, _orientation_of(raw))
    elif isinstance(raw, Tensor):
        found = of_tensor(raw)
    elif isinstance(raw, np.ndarray):
        found = of_array(raw, channels)
    else:
        raise no_image(raw)
    if 0 in found.image.shape:
        raise DecodeError(f"holds no pixels (shape {tuple(found.image.shape)})")
    return found


@foreign_parser(_damaged, DecodeError)
def probe(raw: Raw) -> Facts:
    """(height, width, channels, dtype name), upright, reading no more than needed; DecodeError."""
    if isinstance(raw, Piece):
        return raw.probe()
    if isinstance(raw, (bytes, bytearray, memoryview)):
        data = bytes(raw)
        return _kind_of(data).probe(data)
    if isinstance(raw, Image.Image):
        return _probe_pil(raw, _orientation_of(raw))
    if isinstance(raw, Tensor):
        channels, height, width = tensor_channels_first(raw).shape
        return height, width, channels, str(raw.dtype).removeprefix("torch.")
    if not isinstance(raw, np.ndarray):
        raise no_image(raw)
    channels, height, width = channels_first(raw, channels=0).shape
    return height, width, channels, raw.dtype.name


def no_image(raw: object) -> DecodeError:
    """The error for an item of a type that images do not have."""
    kind = type(raw).__name__
    return DecodeError(f"is a {kind}; an image is bytes, an array, a tensor or a PIL image")


# One reader for each kind of file (a JPEG may be asked for grey at once)


def _probe_jpeg(data: bytes) -> Facts:
    header = headers.read_jpeg_header(data)
    height, width = header.height, header.width
    size = (width, height) if header.orientation in TURNED else (height, width)
    return *size, 1 if header.components == 1 else 3, "uint8"


def _read_jpeg(data: bytes, channels: int, max_pixels: int) -> Pixels:
    header = headers.read_jpeg_header(data)
    check_jpeg(header, len(data), max_pixels)
    return Pixels(upright_tensor(jpeg_pixels(data, header, channels), header.orientation))


def check_jpeg(header: headers.JpegHeader, stored: int, max_pixels: int) -> None:
    """Raises DecodeError for a JPEG of ``stored`` bytes that has too many pixels."""
    work = _PROGRESSIVE_WORK if header.progressive else _JPEG_WORK
    work += header.components // 4 * 4
    check_pixels(header.height, header.width, max_pixels, stored=stored, work=work)


def jpeg_pixels(
    data: bytes, header: headers.JpegHeader, channels: int, rows: int | None = None
) -> Tensor:
    """(1 or 3, H, W) of a JPEG as it is stored, or of no more than its first ``rows``.

    By torchvision, the fast path, or by PIL where it has no decoder (0.29 announces its end).
    """
    operator = _torchvision_jpeg()
    if operator is None:
        return jpeg_by_pil(data, header, channels, rows)
    # A copy, since torch warns about memory that it may not write to
    shorter = headers.first_rows(data, header, header.least_rows(rows))
    buffer = torch.frombuffer(shorter, dtype=torch.uint8)
    with damage("is a truncated or damaged JPEG"):
        return operator(buffer, _GREY if channels == 1 else _COLOUR, False)


def jpeg_by_pil(
    data: bytes,
    header: headers.JpegHeader,
    channels: int,
    rows: int | None = None,
    scale: Literal[1, 2, 4, 8] = 1,
) -> Tensor:
    """The same by PIL, which also decodes at 1 / ``scale``: sides are then rounded up."""
    # PIL hands out a missing part as grey where zeros pad the file: after the last scan there must
    # be an end marker.
    end = data.rfind(_JPEG_END)
    if end < 0 or data.find(_JPEG_SCAN, end) >= 0:
        raise DecodeError("is a truncated JPEG")
    image = _open(headers.plain_jpeg(data, header.least_rows(rows)))
    if scale > 1:
        mode = "L" if channels == 1 else "RGB"
        image.draft(mode, (image.width // scale, image.height // scale))
    return _from_pil(image, 1).image


def _torchvision_jpeg() -> Callable[..., Tensor] | None:
    """The operator behind torchvision.io.decode_jpeg (which warns), if this version has it."""
    return cast("Callable[..., Tensor] | None", getattr(torch.ops.image, "decode_jpeg", None))


def _probe_png(data: bytes) -> Facts:
    header = headers.read_png_header(data)
    height, width, channels, dtype = _probe_pil(_open(header.plain), header.orientation)
    if header.bits == 16:
        return height, width, _PNG_CHANNELS.get(header.colour, channels), "uint16"
    return height, width, channels, dtype


def _read_png(data: bytes, _: int, max_pixels: int) -> Pixels:
    """By PIL: torchvision's decoder ends the whole process on some damaged files."""
    header = headers.read_png_header(data)
    channels = _PNG_CHANNELS.get(header.colour, 4)
    work = _DEEP_PNG_WORK * channels if header.bits == 16 else PLAIN_WORK
    check_pixels(header.height, header.width, max_pixels, stored=len(data), work=work)
    if not header.is_deep:
        return _from_pil(_open(header.plain), header.orientation, is_short=header.bits == 16)
    array = _deep_png(header)
    turned = upright(array.transpose(2, 0, 1), header.orientation)
    return of_stored(turned, has_alpha=array.shape[2] in {2, 4})


def _deep_png(header: headers.PngHeader) -> np.ndarray:
    """(H, W, C) uint16 of 16 bits in colour or with alpha, of which PIL keeps the upper bytes."""
    data = header.plain
    if header.colour == 4:  # grey and alpha are four bytes per pixel: read as RGBA of 8 bits
        chunk = b"IHDR" + data[16:24] + b"\x08\x06" + data[26:29]
        relabelled = data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
        return _pil_array(_open(relabelled))[0].view(">u2").astype(np.uint16)
    deep = _pil_array(_open(data))[0].astype(np.uint16)
    deep <<= 8
    lower = _open(data)
    # Said to be little-endian, the other byte of each pair is the one that PIL keeps.
    tiles = cast(Any, lower).tile
    cast(Any, lower).tile = [(*tile[:3], str(tile[3]).replace(";16B", ";16L")) for tile in tiles]
    deep |= _pil_array(lower)[0]
    return deep


def _read_npy(data: bytes, channels: int, max_pixels: int) -> Pixels:
    array = npy.read_npy(data)
    if array.size and array.ndim in (2, 3):
        height, width = channels_first(array, channels=0).shape[1:]
        check_pixels(height, width, max_pixels, stored=len(data))
    return of_array(array, channels)


def _probe_tiff(data: bytes) -> Facts:
    layout = tiff.read_layout(TiffFile(data))
    return layout.height, layout.width, layout.channels, layout.dtype


def _read_tiff(data: bytes, _: int, max_pixels: int) -> Pixels:
    file = TiffFile(data)
    layout = tiff.read_layout(file)
    return of_stored(tiff.read_tiff(file, layout, max_pixels), layout.has_alpha)


def _read_heif(data: bytes, _: int, max_pixels: int) -> Pixels:
    array = heif.read_heif(data, max_pixels)
    return of_stored(array.transpose(2, 0, 1), array.shape[2] in {2, 4})


def _read_jpeg2000(data: bytes, _: int, max_pixels: int) -> Pixels:
    return of_stored(jpeg2000.read(data, max_pixels))


def _probe_other(data: bytes) -> Facts:
    image = _open(data)
    return _probe_pil(image, exif_orientation(image.info.get("exif") or b""))


def _read_other(data: bytes, _: int, max_pixels: int) -> Pixels:
    if headers.is_webp(data):
        size = headers.webp_size(data)
        check_pixels(*size, max_pixels, stored=len(data), work=_WORK["WEBP"])
    image = _open(data)
    width, height = image.size
    work = _WORK.get(image.format or "", PLAIN_WORK)
    check_pixels(height, width, max_pixels, stored=len(data), work=work)
    orientation = exif_orientation(image.info.get("exif") or b"")
    return _from_pil(image, orientation, is_short=image.format == "PPM")


def _read_stored(
    raw: bytes | bytearray | memoryview | Piece, channels: int, max_pixels: int
) -> Pixels:
    if isinstance(raw, Piece):
        return of_stored(*raw.read(channels, max_pixels))
    data = bytes(raw)
    return _kind_of(data).read(data, channels, max_pixels)


class _Kind(NamedTuple):
    """A kind of file: ``magic``, its first bytes, or a test of them."""

    magic: bytes | tuple[bytes, ...] | Callable[[bytes], bool]
    probe: Callable[[bytes], Facts]
    read: Callable[[bytes, int, int], Pixels]


def _of_domain(domain: Domain) -> _Kind:
    def read(data: bytes, channels: int, max_pixels: int) -> Pixels:
        return of_stored(read_only(domain, data, channels, max_pixels))

    return _Kind(domain.fits, partial(probe_only, domain), read)


_KINDS = (
    _Kind(headers.JPEG, _probe_jpeg, _read_jpeg),
    _Kind(headers.PNG, _probe_png, _read_png),
    _Kind(npy.MAGIC, lambda data: probe(npy.read_npy(data)), _read_npy),
    _Kind(MAGIC, _probe_tiff, _read_tiff),
    _Kind(heif.is_heif, heif.probe_heif, _read_heif),
    _Kind(jpeg2000.is_beyond_pil, jpeg2000.probe, _read_jpeg2000),
    *map(_of_domain, DOMAINS),
    _Kind(b"", _probe_other, _read_other),
)


def _kind_of(data: bytes) -> _Kind:
    def fits(kind: _Kind) -> bool:
        return kind.magic(data) if callable(kind.magic) else data.startswith(kind.magic)

    return next(kind for kind in _KINDS if fits(kind))


# What PIL has opened


def _open(data: bytes) -> Image.Image:
    with decoding("is no readable image"):
        return Image.open(io.BytesIO(data), formats=_FORMATS)


def _orientation_of(image: Image.Image) -> int:
    """Of an image that a data set of the user's hands out, in whatever way PIL finds it."""
    orientation: Any = 1
    with suppress(DecodeError), decoding("has damaged EXIF"):
        orientation = image.getexif().get(TAG, 1)
    return orientation if orientation in range(1, 9) else 1


def _probe_pil(image: Image.Image, orientation: int) -> Facts:
    _, channels, dtype = _pil_mode(image)
    width, height = image.size
    size = (width, height) if orientation in TURNED else (height, width)
    return *size, channels, dtype


def _from_pil(image: Image.Image, orientation: int, *, is_short: bool = False) -> Pixels:
    """``is_short``: mode I holds 16 bits, for which some versions of PIL have no mode."""
    array, mode = _pil_array(image)
    del image  # so that not both are kept, where no one else has it
    if mode == "I" and is_short:
        array = array.astype(np.uint16)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return of_stored(upright(array, orientation), mode in {"LA", "RGBA"})


def _pil_array(image: Image.Image) -> tuple[np.ndarray, str]:
    """(H, W) or (H, W, C), and the mode that it is in."""
    with decoding("is a truncated or damaged image"):
        image.load()
        mode = _pil_mode(image)[0]
        return pixels_of(image, mode), mode


def _pil_mode(image: Image.Image) -> tuple[str, int, str]:
    if image.mode == "P" and "transparency" in image.info:
        return _MODES["PA"]
    return _MODES.get(image.mode, _MODES["RGB"])
