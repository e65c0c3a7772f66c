"""Label maps: pictures whose pixel values are class numbers, or colours that stand for them."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchmine.data.decoding.bounds import check_pixels
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.npy import read_npy
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.sources.contract import contents
from patchmine.errors import UserError, foreign_parser, reason_of, shown_name

ClassMap = NDArray[np.int32]
_NUMBERED = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I")


@dataclass(frozen=True)
class Colours:
    """Which pixel values mean which class.

    Args:
        values: numbers, or (red, green, blue).
        classes: the class number that each of them means.
        ignored: the class number of pixels that belong to no class.
    """

    values: tuple[int | tuple[int, int, int], ...]
    classes: tuple[int, ...]
    ignored: int

    @property
    def are_rgb(self) -> bool:
        """Whether values are colours rather than numbers."""
        return isinstance(self.values[0], tuple)


class ClassMapError(UserError):
    """A label map that cannot be used; its sentence names the file."""


def read_class_map(file: str, colours: Colours | None = None) -> ClassMap:
    """(H, W) int32 class numbers of a label file.

    Args:
        file: PNG, TIFF, BMP or GIF of one channel or with a palette, whose numbers count; a colour
            picture, with ``colours``; or .npy of whole numbers.
        colours: which values mean which class.

    Raises:
        ClassMapError: it cannot be read, or its pixels are no class numbers.
    """
    name = shown_name(file)
    try:
        with foreign_parser(lambda reason: DecodeError(f"is damaged ({reason})"), DecodeError):
            pixels = _pixels(contents(file))
    except (OSError, DecodeError) as error:
        told = str(error) if isinstance(error, DecodeError) else f"({reason_of(error)})"
        raise ClassMapError(f"the label map {name} cannot be read: {told}") from error
    if colours is not None:
        return _by_colour(pixels, colours, name)
    if pixels.ndim == 3:
        raise ClassMapError(
            f"the label map {name} is a colour picture where class numbers are expected: say which "
            "colour means which class, as in palette={road: [128,64,128], car: [0,0,142]}"
        )
    if pixels.min() < 0 or pixels.max() >= 2**31:
        raise ClassMapError(
            f"the label map {name} has values from {pixels.min()} to {pixels.max()}"
        )
    return pixels.astype(np.int32)


def _pixels(data: bytes) -> NDArray[Any]:
    """(H, W) whole numbers, or (H, W, 3) uint8."""
    if data[:6] == b"\x93NUMPY":
        array = np.asarray(read_npy(data))
        array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
        if array.ndim != 2 or array.dtype.kind not in "uib":
            kind = f"{array.dtype} of shape {array.shape}"
            raise DecodeError(f"it holds {kind}, where (height, width) of whole numbers belong")
        return array.astype(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Image.open(io.BytesIO(data), formats=["PNG", "TIFF", "BMP", "GIF", "JPEG"])
        if picture.format == "JPEG":
            raise DecodeError(
                "it is a JPEG, whose compression changes class numbers: save label maps as PNG"
            )
        check_pixels(picture.height, picture.width, MAX_PIXELS, stored=len(data))
        if picture.mode in _NUMBERED:
            return np.asarray(picture).astype(np.int64)
        if picture.mode in ("LA", "PA"):
            return np.asarray(picture.getchannel(0)).astype(np.int64)
        pixels = np.asarray(picture.convert("RGB"))
    grey = (pixels[..., :1] == pixels).all()  # class numbers that were saved in three channels
    return pixels[..., 0].astype(np.int64) if grey else pixels


def _by_colour(pixels: NDArray[Any], colours: Colours, name: str) -> ClassMap:
    if colours.are_rgb:
        planes = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        keys = planes.astype(np.int64) @ np.array([65536, 256, 1])
        values = [65536 * r + 256 * g + b for r, g, b in colours.values]  # type: ignore[misc]
    else:
        if pixels.ndim == 3:
            raise ClassMapError(
                f"the label map {name} is a colour picture, but palette gives numbers: give the "
                "colour of each class, as in palette={road: [128,64,128]}"
            )
        keys, values = pixels, [int(value) for value in colours.values]  # type: ignore[arg-type]
    order = np.argsort(values)
    ordered = np.asarray(values)[order]
    places = np.searchsorted(ordered, keys).clip(max=len(values) - 1)
    found = np.asarray(colours.classes)[order[places]]
    unknown = ordered[places] != keys
    if not colours.are_rgb:  # what is ignored may be written as such
        implied = unknown & (keys == colours.ignored)
        found, unknown = np.where(implied, colours.ignored, found), unknown & ~implied
    if unknown.any():
        value = int(keys[unknown][0])
        shown = list(value.to_bytes(3, "big")) if colours.are_rgb else value
        raise ClassMapError(
            f"the label map {name} has {int(unknown.sum()):,} pixels of {shown}, which palette "
            f"does not name: add it as a class, or as in palette.ignore={shown}"
        )
    return found.astype(np.int32)
