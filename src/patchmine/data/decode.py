"""Raw items (file contents, arrays, tensors, PIL images) become image tensors with the channels that a run asks for.

JPEG goes through torchvision, which is the fast path, or through PIL where torchvision has no decoder (0.29 announces
its end).  Everything else goes through PIL, save deep or many-channelled TIFF (tifffile, optional) and npy (numpy).
PNG does not go through torchvision, whose decoder ends the whole process on some damaged files.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torchvision  # noqa: F401  registers torch.ops.image
from PIL import Image, ImageOps
from torch import Tensor

Raw = bytes | bytearray | memoryview | np.ndarray | Tensor | Image.Image


class DecodeError(ValueError):
    """An item that is no image, a damaged one, or one whose channels do not fit the run."""


# What Pillow and tifffile raise on damaged files; both let errors of their parsers through.
_FILE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError),
    *(RuntimeError, ArithmeticError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)
_JPEG, _PNG, _NPY, _TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_GREY, _COLOUR = 1, 3  # torchvision's ImageReadMode
_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_SAMPLES, _TIFF_FORMAT = 256, 257, 258, 277, 339
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


def decode(raw: Raw, channels: int) -> Tensor:
    """(C, H, W) uint8 for 8-bit data, else float32: 16-bit scaled to [0, 1], floats and wider integers as stored.

    ``raw``: the bytes of a JPEG, PNG, WebP, TIFF, BMP, GIF or npy file, a numpy array (H, W), (H, W, C) or (C, H, W),
    a tensor (H, W) or (C, H, W), or a PIL image.  EXIF orientation is applied, CMYK and palettes become RGB, of several
    frames the first counts.  ``channels=3`` expands grey and drops alpha, ``channels=1`` takes the luma of colour; any
    other difference is an error.  Raises DecodeError.
    """
    image, has_alpha = _read(raw, channels)
    if 0 in image.shape:
        raise DecodeError(f"holds no pixels (shape {tuple(image.shape)})")
    return fit_channels(image, channels, has_alpha)


def probe(raw: Raw) -> tuple[int, int, int, str]:
    """(height, width, channels, dtype name) as stored, but upright; reads no more than needed; raises DecodeError."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        data = bytes(raw)
        if data.startswith(_NPY):
            return probe(_load_npy(data))
        return _probe_tiff(data) if data.startswith(_TIFF) else _probe_pil(_open(data), data)
    if isinstance(raw, Image.Image):
        return _probe_pil(raw, b"")
    if isinstance(raw, Tensor):
        image = raw[None] if raw.ndim == 2 else raw
        return image.shape[-2], image.shape[-1], image.shape[0], str(raw.dtype).removeprefix("torch.")
    image_array = _channels_first(raw, channels=0)
    return image_array.shape[1], image_array.shape[2], image_array.shape[0], raw.dtype.name


def _read(raw: Raw, channels: int) -> tuple[Tensor, bool]:
    """The image with its natural channels (a JPEG may be asked for grey at once), and whether the last one is alpha."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        data = bytes(raw)
        if data.startswith(_JPEG):
            return _decode_jpeg(data, channels), False
        if data.startswith(_NPY):
            return _from_array(_load_npy(data), channels)
        if data.startswith(_TIFF):
            return _decode_tiff(data, channels)
        return _decode_other(data)
    if isinstance(raw, Image.Image):
        return _from_pil(raw)
    if isinstance(raw, Tensor):
        return _from_tensor(raw)
    if isinstance(raw, np.ndarray):
        return _from_array(raw, channels)
    raise DecodeError(f"is a {type(raw).__name__}; an image is bytes, an array, a tensor or a PIL image")


def _decode_jpeg(data: bytes, channels: int) -> Tensor:
    operator = _torchvision_jpeg()
    if operator is not None:
        try:
            return operator(_buffer(data), _GREY if channels == 1 else _COLOUR, True)
        except RuntimeError as error:
            raise DecodeError("is a truncated or damaged JPEG") from error
    # PIL hands out a missing part as grey where zeros pad the file: after the last scan there must be an end marker.
    end = data.rfind(_JPEG_END)
    if end < 0 or data.find(_JPEG_SCAN, end) >= 0:
        raise DecodeError("is a truncated JPEG")
    return _from_pil(_open(data))[0]


def _decode_other(data: bytes) -> tuple[Tensor, bool]:
    if _is_deep_png(data):
        array = _deep_png(data)
        return _scale(array.transpose(2, 0, 1)), array.shape[2] in {2, 4}
    return _from_pil(_open(data))


def _deep_png(data: bytes) -> np.ndarray:
    """(H, W, C) uint16 of a 16-bit PNG in colour or with alpha, of which PIL by itself keeps the upper bytes."""
    if data[25:26] == b"\x04":  # grey and alpha are four bytes per pixel: read as if they were RGBA of 8 bits
        header = b"IHDR" + data[16:24] + b"\x08\x06" + data[26:29]
        relabelled = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
        return _pil_array(_open(relabelled))[0].astype(np.uint8).view(">u2").astype(np.uint16)
    upper, lower = _open(data), _open(data)
    # Said to be little-endian, the other byte of each pair is the one that PIL keeps.
    tiles = cast(Any, lower).tile
    cast(Any, lower).tile = [(*tile[:3], str(tile[3]).replace(";16B", ";16L")) for tile in tiles]
    return _pil_array(upper)[0].astype(np.uint16) << 8 | _pil_array(lower)[0]


def _is_deep_png(data: bytes) -> bool:
    """16 bits in colour or with alpha, as the first chunk says; PIL reads 16-bit grey by itself."""
    return data.startswith(_PNG) and data[24:25] == b"\x10" and data[25:26] != b"\0"


def _torchvision_jpeg() -> Callable[..., Tensor] | None:
    """The operator behind torchvision.io.decode_jpeg (which warns at every call), if this version has it."""
    return cast("Callable[..., Tensor] | None", getattr(torch.ops.image, "decode_jpeg", None))


def _buffer(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch warns about memory that it may not write to


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PIL's warnings about odd files, which do not name the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes) -> Image.Image:
    try:
        with _quiet():
            return Image.open(io.BytesIO(data))
    except _FILE_ERRORS as error:
        raise DecodeError(f"is no readable image ({_short(error)})") from error


def _from_pil(image: Image.Image) -> tuple[Tensor, bool]:
    file_format = image.format  # forgotten once it is turned
    array, mode = _pil_array(image)
    if mode == "I" and file_format in {"PNG", "PPM"}:  # 16 bits, which some versions of PIL hold in 32
        array = array.astype(np.uint16)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return _scale(array), mode in {"LA", "RGBA"}


def _pil_array(image: Image.Image) -> tuple[np.ndarray, str]:
    """(H, W) or (H, W, C), upright, and the mode that it is in."""
    try:
        with _quiet():
            image.load()
            if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            mode = _pil_mode(image)[0]
            return np.array(image if image.mode == mode else image.convert(mode)), mode
    except _FILE_ERRORS as error:
        raise DecodeError(f"is a truncated or damaged image ({_short(error)})") from error


def _pil_mode(image: Image.Image) -> tuple[str, int, str]:
    if image.mode == "P" and "transparency" in image.info:
        return _MODES["PA"]
    return _MODES.get(image.mode, _MODES["RGB"])  # CMYK, YCbCr, LAB, HSV


def _decode_tiff(data: bytes, channels: int) -> tuple[Tensor, bool]:
    image, stacked = _tiff_in_pil(data, channels)
    if image is not None:
        return _from_pil(image)
    array, orientation = _read_tifffile(data, stacked)
    return _scale(_upright(array, orientation)), array.shape[0] == 4


def _tiff_in_pil(data: bytes, channels: int) -> tuple[Image.Image | None, bool]:
    """The opened TIFF if PIL keeps all of it, and whether its channels are stored as pages."""
    try:
        image = _open(data)
        with _quiet():
            grey = cast(Any, image).tag_v2.get(_TIFF_SAMPLES, 1) == 1
            stacked = grey and channels > 1 and getattr(image, "n_frames", 1) == channels
            return (image if _pil_reads_tiff(image) and not stacked else None), stacked
    except _FILE_ERRORS:  # PIL knows few of TIFF's layouts
        return None, False


def _pil_reads_tiff(image: Image.Image) -> bool:
    """Whether PIL keeps all bits and channels of this TIFF."""
    tags = cast(Any, image).tag_v2
    bits, formats = np.atleast_1d(tags.get(_TIFF_BITS, 1)), np.atleast_1d(tags.get(_TIFF_FORMAT, 1))
    samples = tags.get(_TIFF_SAMPLES, 1)
    if samples == 1:
        return bool(max(bits) <= 8 or image.mode == "F" or (image.mode.startswith("I;16") and max(formats) == 1))
    return bool(max(bits) <= 8 and max(formats) == 1 and samples <= 4)


def _read_tifffile(data: bytes, stacked: bool) -> tuple[np.ndarray, int]:
    """The first page (or all pages as channels) as (C, H, W), and its EXIF orientation."""
    try:
        import tifffile
    except ImportError as error:
        raise DecodeError("is a TIFF of a kind that needs the package tifffile: pip install tifffile") from error
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = cast(Any, file.pages[0])
            tag = page.tags.get(_EXIF_ORIENTATION)
            part = file.series[0] if stacked else page
            array, axes = np.asarray(part.asarray()), part.axes
    except (*_FILE_ERRORS, tifffile.TiffFileError) as error:
        raise DecodeError(f"is a TIFF that cannot be read ({_short(error)})") from error
    if "Y" not in axes or "X" not in axes or array.ndim != len(axes) or array.ndim > 3:
        raise DecodeError(
            f"is a TIFF with axes {axes} and shape {array.shape}; one image of rows and columns is needed"
        )
    if array.ndim == 2:
        array = array[None]
    else:
        channel_axis = next(axis for axis, name in enumerate(axes) if name not in "YX")
        array = np.moveaxis(array, channel_axis, 0)
    return array, int(tag.value) if tag is not None else 1


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(C, H, W) turned as EXIF says; orientations 1 to 8 are a transpose, then mirrorings."""
    if orientation in _TURNED:
        array = array.swapaxes(1, 2)
    if orientation in {2, 3, 6, 7}:
        array = array[:, :, ::-1]
    if orientation in {3, 4, 7, 8}:
        array = array[:, ::-1]
    return array


def _load_npy(data: bytes) -> np.ndarray:
    try:
        return cast(np.ndarray, np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError) as error:
        raise DecodeError(f"is a truncated or damaged npy file ({_short(error)})") from error


def _from_array(array: np.ndarray, channels: int) -> tuple[Tensor, bool]:
    image = _channels_first(array, channels)
    return _scale(image), image.shape[0] == 4


def _from_tensor(image: Tensor) -> tuple[Tensor, bool]:
    image = image.detach()
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3:
        raise DecodeError(
            f"has shape {tuple(image.shape)}; a tensor must be (height, width) or (channels, height, width)"
        )
    if image.is_floating_point():
        image = image.float()
        return _require_finite(image), image.shape[0] == 4
    return (image if image.dtype == torch.uint8 else _scale(image.numpy())), image.shape[0] == 4


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
    """uint8 stays, 1 bit becomes 0 and 255, other integers of up to 16 bits fill [0, 1], the rest is float32 as is."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "buif":
        raise DecodeError(f"holds values of type {array.dtype}, which is no image")
    if kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return torch.from_numpy(array if array.flags.writeable and min(array.strides) >= 0 else array.copy())
    values = np.array(array, dtype=np.float32, order="C")
    if kind in "ui" and size <= 2:
        limits = np.iinfo(array.dtype)
        values = (values - np.float32(limits.min)) / np.float32(limits.max - limits.min)
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


def _probe_pil(image: Image.Image, data: bytes) -> tuple[int, int, int, str]:
    _, channels, dtype = _pil_mode(image)
    if _is_deep_png(data):
        channels, dtype = {4: 2, 2: 3, 6: 4}.get(data[25], channels), "uint16"
    try:
        with _quiet():
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNED
    except _FILE_ERRORS as error:
        raise DecodeError(f"has a damaged header ({_short(error)})") from error
    width, height = image.size
    return (width, height, channels, dtype) if turned else (height, width, channels, dtype)


def _probe_tiff(data: bytes) -> tuple[int, int, int, str]:
    image, _ = _tiff_in_pil(data, channels=0)
    if image is not None:
        _, channels, dtype = _pil_mode(image)
        tags = cast(Any, image).tag_v2  # the size that PIL reports is upright in some of its versions
        height, width = tags[_TIFF_HEIGHT], tags[_TIFF_WIDTH]
        turned = tags.get(_EXIF_ORIENTATION, 1) in _TURNED
        return (width, height, channels, dtype) if turned else (height, width, channels, dtype)
    array, orientation = _read_tifffile(data, stacked=False)
    channels, height, width = _upright(array, orientation).shape
    return height, width, channels, array.dtype.name


def _short(error: BaseException) -> str:
    """One line, without the memory addresses that PIL puts into it."""
    text = " ".join(str(error).split()).split(" <_io.BytesIO")[0]
    return text[:120] or type(error).__name__
