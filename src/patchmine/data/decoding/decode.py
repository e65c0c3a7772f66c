"""Raw items (file contents, arrays, tensors, PIL images) become image tensors with the channels
that a run asks for.

JPEG goes through torchvision, which is the fast path, or through PIL where torchvision has no
decoder (0.29 announces its end).  TIFF, npy and HEIF have files of their own beside this one,
everything else goes through PIL.  PNG does not go through torchvision, whose decoder ends the whole
process on some damaged files.

Size and orientation are read from the header before anything is decoded; what else a file carries
beside its pixels is kept away from the decoders, so that it can neither fill the memory nor make
them fail.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
import torchvision  # noqa: F401  registers torch.ops.image
from PIL import Image
from torch import Tensor

from patchmine.data.decoding import npy
from patchmine.data.decoding.bounds import (
    PLAIN_WORK,
    DecodeError,
    check_pixels,
    damage,
    decoding,
    pixels_of,
)
from patchmine.data.decoding.headers import (
    JPEG,
    PNG,
    PngHeader,
    is_webp,
    plain_jpeg,
    read_jpeg_header,
    read_png_header,
    webp_size,
)
from patchmine.data.decoding.heif import is_heif, probe_heif, read_heif
from patchmine.data.decoding.orientation import (
    TAG,
    TURNED,
    exif_orientation,
    upright,
    upright_tensor,
)
from patchmine.data.decoding.tiff import read_layout, read_tiff
from patchmine.data.decoding.tiff_pages import MAGIC as TIFF
from patchmine.data.decoding.tiff_pages import TiffFile
from patchmine.data.settings import MAX_PIXELS
from patchmine.errors import foreign_parser

__all__ = ["DecodeError", "Raw", "decode", "fit_channels", "no_image", "probe"]

Raw = bytes | bytearray | memoryview | np.ndarray | Tensor | Image.Image

# What PIL may take a file for: pictures, and no formats for which it starts other programs.
_FORMATS = [
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "PPM",
    "JPEG2000",
    "AVIF",
    "JPEG",
    "TGA",
    "PCX",
    "SGI",
    "QOI",
]
# Bytes for each pixel that decoding holds at its peak, where these are more than PIL's usual ones.
_WORK = {"WEBP": 20, "AVIF": 16, "JPEG2000": 24}
_JPEG_WORK, _PROGRESSIVE_WORK, _DEEP_PNG_WORK = 6, 9, 8  # the last for each channel
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_GREY, _COLOUR = 1, 3  # torchvision's ImageReadMode
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type
# PIL mode -> the mode it is read as, channels, dtype.
_MODES = {
    "1": ("L", 1, "uint8"),
    "L": ("L", 1, "uint8"),
    "LA": ("LA", 2, "uint8"),
    "La": ("LA", 2, "uint8"),
    "P": ("RGB", 3, "uint8"),
    "PA": ("RGBA", 4, "uint8"),
    "RGB": ("RGB", 3, "uint8"),
    "RGBA": ("RGBA", 4, "uint8"),
    "RGBa": ("RGBA", 4, "uint8"),
    "I;16": ("I;16", 1, "uint16"),
    "I;16L": ("I;16L", 1, "uint16"),
    "I;16B": ("I;16B", 1, "uint16"),
    "I;16N": ("I;16N", 1, "uint16"),
    "I": ("I", 1, "int32"),
    "F": ("F", 1, "float32"),
}


def _damaged(reason: str) -> DecodeError:
    return DecodeError(f"is a truncated or damaged image ({reason})")


@foreign_parser(_damaged, DecodeError)
def decode(raw: Raw, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The pixels of a raw item, upright, with the channels that a run asks for.

    Args:
        raw: the bytes of a JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, AVIF, HEIC or npy file, a
            numpy array (H, W), (H, W, C) or (C, H, W), a tensor (H, W) or (C, H, W), or a PIL
            image.  EXIF orientation is applied, CMYK and palettes become RGB, of several frames the
            first counts; pages of a TIFF are as docs/data.md says.
        channels: 3 expands grey and drops alpha, 1 takes the luma of colour; any other difference
        is an error.
        max_pixels: a file whose header says that it has more is not decoded.

    Returns:
        (C, H, W) uint8 for 8-bit data, else float32: 16-bit scaled to [0, 1], floats and wider
        integers as stored.

    Raises:
        DecodeError: for an item that is no image, a damaged or too large one, or other channels.
    """
    image, has_alpha = _read(raw, channels, max_pixels)
    if 0 in image.shape:
        raise DecodeError(f"holds no pixels (shape {tuple(image.shape)})")
    return fit_channels(image, channels, has_alpha)


@foreign_parser(_damaged, DecodeError)
def probe(raw: Raw) -> tuple[int, int, int, str]:
    """(height, width, channels, dtype name) as stored, but upright; reads no more than needed;
    raises DecodeError.
    """
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return _probe_bytes(bytes(raw))
    if isinstance(raw, Image.Image):
        return _probe_pil(raw, _orientation_of(raw))
    if isinstance(raw, Tensor):
        channels, height, width = _tensor_channels_first(raw).shape
        return height, width, channels, str(raw.dtype).removeprefix("torch.")
    if not isinstance(raw, np.ndarray):
        raise no_image(raw)
    array = _channels_first(raw, channels=0)
    return array.shape[1], array.shape[2], array.shape[0], raw.dtype.name


def _probe_bytes(data: bytes) -> tuple[int, int, int, str]:
    if data.startswith(JPEG):
        jpeg = read_jpeg_header(data)
        size = (
            (jpeg.width, jpeg.height) if jpeg.orientation in TURNED else (jpeg.height, jpeg.width)
        )
        return *size, 1 if jpeg.components == 1 else 3, "uint8"
    if data.startswith(npy.MAGIC):
        return probe(npy.read_npy(data, npy.read_npy_header(data)))
    if data.startswith(TIFF):
        layout = read_layout(TiffFile(data))
        return layout.height, layout.width, layout.channels, layout.dtype
    if is_heif(data):
        return probe_heif(data)
    if data.startswith(PNG):
        png = read_png_header(data)
        height, width, channels, dtype = _probe_pil(_open(png.plain), png.orientation)
        return (
            (height, width, _PNG_CHANNELS.get(png.colour, channels), "uint16")
            if png.bits == 16
            else (height, width, channels, dtype)
        )
    image = _open(data)
    return _probe_pil(image, exif_orientation(image.info.get("exif") or b""))


def _probe_pil(image: Image.Image, orientation: int) -> tuple[int, int, int, str]:
    _, channels, dtype = _pil_mode(image)
    width, height = image.size
    return (
        (width, height, channels, dtype)
        if orientation in TURNED
        else (height, width, channels, dtype)
    )


def _read(raw: Raw, channels: int, max_pixels: int) -> tuple[Tensor, bool]:
    """The image with its natural channels (a JPEG may be asked for grey at once), and whether the
    last one is alpha.
    """
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return _read_bytes(bytes(raw), channels, max_pixels)
    if isinstance(raw, Image.Image):
        return _from_pil(raw, _orientation_of(raw))
    if isinstance(raw, Tensor):
        return _from_tensor(raw)
    if isinstance(raw, np.ndarray):
        return _from_array(raw, channels)
    raise no_image(raw)


def no_image(raw: object) -> DecodeError:
    """The error for an item of a type that images do not have."""
    return DecodeError(
        f"is a {type(raw).__name__}; an image is bytes, an array, a tensor or a PIL image"
    )


def _read_bytes(data: bytes, channels: int, max_pixels: int) -> tuple[Tensor, bool]:
    if data.startswith(JPEG):
        return _decode_jpeg(data, channels, max_pixels), False
    if data.startswith(PNG):
        return _decode_png(data, max_pixels)
    if data.startswith(npy.MAGIC):
        return _from_array(_bounded_npy(data, max_pixels), channels)
    if data.startswith(TIFF):
        file = TiffFile(data)
        layout = read_layout(file)
        return _scale(read_tiff(file, layout, max_pixels)), layout.has_alpha
    if is_heif(data):
        array = read_heif(data, max_pixels)
        return _scale(array.transpose(2, 0, 1)), array.shape[2] in {2, 4}
    return _decode_other(data, max_pixels)


def _decode_jpeg(data: bytes, channels: int, max_pixels: int) -> Tensor:
    header = read_jpeg_header(data)
    work = _PROGRESSIVE_WORK if header.progressive else _JPEG_WORK
    check_pixels(
        header.height,
        header.width,
        max_pixels,
        stored=len(data),
        work=work + header.components // 4 * 4,
    )
    operator = _torchvision_jpeg()
    if operator is not None:
        with damage("is a truncated or damaged JPEG"):
            image = operator(_buffer(data), _GREY if channels == 1 else _COLOUR, False)
        return upright_tensor(image, header.orientation)
    # PIL hands out a missing part as grey where zeros pad the file: after the last scan there must
    # be an end marker.
    end = data.rfind(_JPEG_END)
    if end < 0 or data.find(_JPEG_SCAN, end) >= 0:
        raise DecodeError("is a truncated JPEG")
    return _from_pil(_open(plain_jpeg(data)), header.orientation)[0]


def _decode_png(data: bytes, max_pixels: int) -> tuple[Tensor, bool]:
    header = read_png_header(data)
    work = _DEEP_PNG_WORK * _PNG_CHANNELS.get(header.colour, 4) if header.bits == 16 else PLAIN_WORK
    check_pixels(header.height, header.width, max_pixels, stored=len(data), work=work)
    if not header.is_deep:
        return _from_pil(_open(header.plain), header.orientation, is_short=header.bits == 16)
    array = _deep_png(header)
    return _scale(upright(array.transpose(2, 0, 1), header.orientation)), array.shape[2] in {2, 4}


def _deep_png(header: PngHeader) -> np.ndarray:
    """(H, W, C) uint16 of a 16-bit PNG in colour or with alpha, of which PIL by itself keeps the
    upper bytes.
    """
    data = header.plain
    if (
        header.colour == 4
    ):  # grey and alpha are four bytes per pixel: read as if they were RGBA of 8 bits
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


def _decode_other(data: bytes, max_pixels: int) -> tuple[Tensor, bool]:
    if is_webp(data):
        check_pixels(*webp_size(data), max_pixels, stored=len(data), work=_WORK["WEBP"])
    image = _open(data)
    width, height = image.size
    check_pixels(
        height, width, max_pixels, stored=len(data), work=_WORK.get(image.format or "", PLAIN_WORK)
    )
    return _from_pil(
        image, exif_orientation(image.info.get("exif") or b""), is_short=image.format == "PPM"
    )


def _bounded_npy(data: bytes, max_pixels: int) -> np.ndarray:
    header = npy.read_npy_header(data)
    array = npy.read_npy(data, header)
    if array.size and array.ndim in (2, 3):
        height, width = _channels_first(array, channels=0).shape[1:]
        check_pixels(height, width, max_pixels, stored=len(data))
    return array


def _torchvision_jpeg() -> Callable[..., Tensor] | None:
    """The operator behind torchvision.io.decode_jpeg (which warns at every call), if this version
    has it.
    """
    return cast("Callable[..., Tensor] | None", getattr(torch.ops.image, "decode_jpeg", None))


def _buffer(data: bytes) -> Tensor:
    return torch.frombuffer(
        bytearray(data), dtype=torch.uint8
    )  # torch warns about memory that it may not write to


def _open(data: bytes) -> Image.Image:
    with decoding("is no readable image"):
        return Image.open(io.BytesIO(data), formats=_FORMATS)


def _orientation_of(image: Image.Image) -> int:
    """Of an image that a data set of the user's hands out, in whatever way PIL finds it."""
    orientation: Any = 1
    with suppress(DecodeError), decoding("has damaged EXIF"):
        orientation = image.getexif().get(TAG, 1)
    return orientation if orientation in range(1, 9) else 1


def _from_pil(
    image: Image.Image, orientation: int, *, is_short: bool = False
) -> tuple[Tensor, bool]:
    """``is_short``: mode I holds 16 bits, for which some versions of PIL have no mode of their own."""
    array, mode = _pil_array(image)
    del image  # so that not both are kept, where no one else has it
    if mode == "I" and is_short:
        array = array.astype(np.uint16)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return _scale(upright(array, orientation)), mode in {"LA", "RGBA"}


def _pil_array(image: Image.Image) -> tuple[np.ndarray, str]:
    """(H, W) or (H, W, C), and the mode that it is in."""
    with decoding("is a truncated or damaged image"):
        image.load()
        mode = _pil_mode(image)[0]
        return pixels_of(image, mode), mode


def _pil_mode(image: Image.Image) -> tuple[str, int, str]:
    if image.mode == "P" and "transparency" in image.info:
        return _MODES["PA"]
    return _MODES.get(image.mode, _MODES["RGB"])  # CMYK, YCbCr, LAB, HSV


def _from_array(array: np.ndarray, channels: int) -> tuple[Tensor, bool]:
    image = _channels_first(array, channels)
    return _scale(image), image.shape[0] == 4


def _from_tensor(image: Tensor) -> tuple[Tensor, bool]:
    image = _tensor_channels_first(image.detach())
    if image.is_floating_point():
        return _require_finite(image.float()), image.shape[0] == 4
    return (image if image.dtype == torch.uint8 else _scale(image.numpy())), image.shape[0] == 4


def _tensor_channels_first(image: Tensor) -> Tensor:
    """(C, H, W) of (H, W) or (C, H, W)."""
    if image.ndim not in (2, 3):
        raise DecodeError(
            f"has shape {tuple(image.shape)}; a tensor must be (height, width) or (channels, height, width)"
        )
    return image[None] if image.ndim == 2 else image


def _channels_first(array: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) of (H, W), (H, W, C) or (C, H, W).

    The channel axis is the one that has ``channels`` values, else the shorter of first and last.
    """
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise DecodeError(
            f"has shape {array.shape}; an array must be (height, width[, channels]) or (channels, height, width)"
        )
    first, last = array.shape[0], array.shape[2]
    channels_last = last == channels or (first != channels and last <= first)
    return array.transpose(2, 0, 1) if channels_last else array


def _scale(array: np.ndarray) -> Tensor:
    """uint8 stays, 1 bit becomes 0 and 255, other integers of up to 16 bits fill [0, 1], the rest
    is float32 as is.
    """
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "buif":
        raise DecodeError(f"holds values of type {array.dtype}, which is no image")
    if kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return torch.from_numpy(
            array if array.flags.writeable and min(array.strides) >= 0 else array.copy()
        )
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is told below
        values = np.array(array, dtype=np.float32, order="C")
    if kind in "ui" and size <= 2:
        limits = np.iinfo(array.dtype)
        values -= np.float32(limits.min)
        values /= np.float32(limits.max - limits.min)
        return torch.from_numpy(values)
    return _require_finite(torch.from_numpy(values))


def _require_finite(image: Tensor) -> Tensor:
    if not bool(torch.isfinite(image).all()):
        raise DecodeError("holds values that are not finite (NaN or infinite)")
    return image


def fit_channels(image: Tensor, channels: int, has_alpha: bool) -> Tensor:
    """(C, H, W) with the channels asked for, where `decode`'s rules allow it; raises DecodeError."""
    stored = image.shape[0]
    if stored == channels:
        return image
    if has_alpha:
        image = image[:-1]
    if channels == 3 and image.shape[0] == 1:
        return image.expand(3, -1, -1)
    if channels == 1 and image.shape[0] == 3:
        return _luma(image)
    if channels in {1, 3} and image.shape[0] == channels:
        return image
    raise DecodeError(
        f"has {stored} channel{'s' * (stored != 1)} where the run expects {channels}; set channels={stored}"
    )


def _luma(image: Tensor) -> Tensor:
    """ITU-R 601-2 luma, for bytes in the same fixed-point arithmetic as PIL."""
    if image.dtype == torch.uint8:
        red, green, blue = image.int()
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[None]
    red, green, blue = image
    return (0.299 * red + 0.587 * green + 0.114 * blue)[None]
