"""TIFF: which of a file's pages make up the image, one rule for asking and for reading.

The image is the first page that is neither a reduced copy nor a mask.  If that page has a single
grey sample, all such pages of its size and type are the image's channels, unless the file states
what its pages are (ImageJ, OME, tifffile): then they are the channels of the first plane and time.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
from PIL import Image

from patchmine.data.decoding.arrays import with_gaps
from patchmine.data.decoding.bounds import (
    PLAIN_WORK,
    DecodeError,
    decoding,
    missing,
    pixels_of,
    without_log,
)
from patchmine.data.decoding.orientation import TURNED, upright
from patchmine.data.decoding.tiff_pages import Page, TiffFile

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # photometric interpretations
_GREY = (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
_AS_STORED = (*_GREY, _RGB, 32803, 34892)  # colours that tifffile's arrays are: the last a sensor's
# What PIL keeps all of: (photometric interpretation, samples) of bytes and what they become; types
# of grey values.
_BYTES_BY_PIL = {(0, 1): 1, (1, 1): 1, (1, 2): 2, (2, 3): 3, (2, 4): 4}
_BYTES_BY_PIL |= {(3, 1): 3, (5, 4): 3, (6, 3): 3, (8, 3): 3}
_GREY_BY_PIL = {"u12": "uint16", "u16": "uint16", "f32": "float32"}
_ALPHA = (1, 2)  # kinds of extra samples
# LERC, LZMA, Zstandard, WebP: libtiff, behind PIL, is often built without these, and then writes to
# the terminal and fails.
_RARE_CODECS = (34887, 34925, 50000, 50001)
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Layout:
    """What the image is: its pages, and what comes of them.  ``height`` and ``width`` upright.

    ``by_pil``: PIL keeps all bits and samples of such a page.  ``has_alpha``: the last channel is
    no colour.
    """

    pages: tuple[Page, ...]
    height: int
    width: int
    channels: int
    dtype: str
    by_pil: bool
    has_alpha: bool


def read_layout(file: TiffFile) -> Layout:
    """The image in a file.  DecodeError for damage, and for kinds of pixels that are none here."""
    chain = file.pages()
    first = next(chain)
    planes = _stated_planes(first)
    pages = [first, *(chain if planes is None else islice(chain, max(planes)))]
    if planes is not None and len(pages) > max(planes):
        pages = [pages[number] for number in planes]
    main = next((page for page in pages if page.is_full), pages[0])
    chosen: tuple[Page, ...] = (main,)
    if main.samples == 1 and main.photometric in _GREY:
        same = [page for page in pages if page.is_full and page.kind == main.kind]
        chosen = tuple(same) or chosen
    samples, dtype, by_pil = _kind_of(main)
    channels, turned = len(chosen) * samples, main.orientation in TURNED
    # Of four samples in colour the last one is taken for alpha whatever it is called; four grey
    # ones are four bands.
    may_be_alpha = main.photometric not in _GREY or any(kind in _ALPHA for kind in main.extra)
    has_fourth = channels == 4 or (channels == 2 and bool(main.extra))
    return Layout(
        pages=chosen,
        height=main.width if turned else main.height,
        width=main.height if turned else main.width,
        channels=channels,
        dtype=dtype,
        by_pil=by_pil,
        has_alpha=len(chosen) == 1 and has_fourth and may_be_alpha,
    )


def read_tiff(file: TiffFile, layout: Layout, max_pixels: int) -> np.ndarray:
    """(C, H, W) of the image, upright, masked where it has no data.  Raises DecodeError."""
    size, is_bytes = np.dtype(layout.dtype).itemsize, layout.dtype == "uint8"
    # Of one page what PIL holds, or tifffile's array and parts; then the array of all; floats of it
    # unless it is bytes.
    work: float = PLAIN_WORK if layout.by_pil else 2 * size * layout.channels / len(layout.pages)
    if not (layout.by_pil and is_bytes and len(layout.pages) == 1):
        work += layout.channels * (size if is_bytes else size + 4)
    for page in layout.pages:
        file.check(page, max_pixels, work)
    planes = [plane for page in layout.pages for plane in _read_page(file, page, layout)]
    array = planes[0][None] if len(planes) == 1 else np.stack(planes)
    if array.shape[0] != layout.channels or array.dtype.name != layout.dtype:
        found = f"{array.shape[0]} channels of {array.dtype.name}"
        stated = f"{layout.channels} of {layout.dtype}"
        raise DecodeError(f"is a damaged TIFF ({found} where its header says {stated})")
    return upright(_with_nodata(array, layout.pages[0]), layout.pages[0].orientation)


def _with_nodata(array: np.ndarray, page: Page) -> np.ndarray:
    """(C, H, W), masked where no channel knows anything, as the file says (GDAL's nodata)."""
    try:
        nodata = float(page.nodata)
    except ValueError:
        return array
    # Values that were made to fill their type are no longer those that the file speaks of.
    if page.photometric == _WHITE_IS_ZERO or page.bits[0] != 8 * array.dtype.itemsize:
        return array
    if array.dtype.kind == "f":
        nodata = float(np.float64(nodata).astype(array.dtype))
    gaps = np.broadcast_to((array == nodata).all(0), array.shape)
    if array.dtype.kind == "f":
        gaps = gaps | np.isnan(array)
    return with_gaps(array, gaps)


def _kind_of(page: Page) -> tuple[int, str, bool]:
    """(channels, dtype name, whether PIL reads it) of one page."""
    bits, number = page.bits[0], f"{page.number_kind}{page.bits[0]}"
    if len(set(page.bits)) > 1 or not page.number_kind:
        raise DecodeError(
            f"is a TIFF with samples of {', '.join(map(str, page.bits[:5]))} bits and of different "
            "or complex types"
        )
    channels = _BYTES_BY_PIL.get((page.photometric, page.samples))
    few_bits = page.samples == 1 and number in {"u1", "u2", "u4"}
    if channels is not None and (number == "u8" or few_bits):
        return channels, "uint8", True
    if page.samples == 1 and page.photometric in _GREY and number in _GREY_BY_PIL:
        return 1, _GREY_BY_PIL[number], True
    if page.photometric not in _AS_STORED:
        kind = f"number {page.photometric}, {bits} bits"
        raise DecodeError(f"is a TIFF of a kind of colour ({kind}) that has to be RGB")
    wide = next((wide for wide in (8, 16, 32, 64) if bits <= wide), 0)
    name = {"u": "uint", "i": "int", "f": "float"}[page.number_kind]
    if not wide or (name == "float" and bits not in (16, 32, 64)):
        raise DecodeError(f"is a TIFF with samples of {bits} bits, which are no pixels")
    return page.samples, f"{name}{wide}", False


def _read_page(file: TiffFile, page: Page, layout: Layout) -> Iterator[np.ndarray]:
    """The channels of one page, each (H, W) as stored."""
    alone, array = file.alone(page), None
    is_rare = page.compression in _RARE_CODECS and page.photometric in (*_GREY, _RGB)
    if layout.by_pil and not (is_rare and _has_imagecodecs()):
        array = _by_pil(alone, layout)
    by_pil = array is not None
    if array is None:
        if page.photometric not in _AS_STORED:
            kind = f"compression (number {page.compression})"
            raise DecodeError(f"is a TIFF whose {kind} PIL cannot read in this colour")
        array = _by_tifffile(alone, page.compression)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[:2] != (page.height, page.width):
        raise DecodeError(f"is a damaged TIFF (its pixels have shape {array.shape[:2]})")
    # Unsigned values of fewer bits than their type, and those in which white is zero, are made what
    # PIL makes of bytes.
    filled = by_pil and array.dtype == np.uint8
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2 and not filled:
        top, highest = np.iinfo(array.dtype).max, (1 << page.bits[0]) - 1
        if highest < top:
            array = (array.astype(np.uint32) * top // highest).astype(array.dtype)
        array = top - array if page.photometric == _WHITE_IS_ZERO else array
    yield from np.moveaxis(array, 2, 0)


def _by_pil(data: bytes, layout: Layout) -> np.ndarray | None:
    """(H, W[, C]); None where PIL does not know the layout or the compression."""
    try:
        with decoding("is not known to PIL"):
            image: Image.Image = Image.open(io.BytesIO(data), formats=["TIFF"])
    except DecodeError:
        return None
    channels = layout.channels if len(layout.pages) == 1 else 1
    with decoding("is a truncated or damaged TIFF"):
        if layout.dtype == "uint8":
            image.load()
            return pixels_of(image, _MODES[channels])
        if image.mode != "F" and not image.mode.startswith("I;16"):
            return None
        return np.array(image).astype(layout.dtype, copy=False)


def _by_tifffile(data: bytes, compression: int) -> np.ndarray:
    """(H, W) or (H, W, C)."""
    try:
        import tifffile
    except ImportError as error:
        raise missing("a TIFF of a kind", "tifffile", "pip install tifffile") from error
    try:
        with (
            decoding("is a TIFF that cannot be read"),
            without_log("tifffile"),
            tifffile.TiffFile(io.BytesIO(data)) as file,
        ):
            page = cast(Any, file.pages[0])
            array, axes = np.asarray(page.asarray(maxworkers=1)), page.axes
    except DecodeError as error:
        wants = "imagecodecs" in str(error) or isinstance(error.__cause__, ImportError)
        if wants and not _has_imagecodecs():
            kind = f"a TIFF of a kind (compression {compression})"
            raise missing(kind, "imagecodecs", "pip install 'patchmine[tiff]'") from error
        raise
    if "Y" not in axes or "X" not in axes or array.ndim != len(axes) or array.ndim > 3:
        raise DecodeError(
            f"is a TIFF with axes {axes} and shape {array.shape}; rows and columns are needed"
        )
    if array.ndim == 2:
        return array
    channel = next(number for number, name in enumerate(axes) if name not in "YX")
    return np.moveaxis(array, channel, 2)


def _has_imagecodecs() -> bool:
    return importlib.util.find_spec("imagecodecs") is not None


# What a file states about its pages


def _stated_planes(first: Page) -> list[int] | None:
    """Pages that are the channels of the first plane and time; None where the file does not say."""
    text = first.description
    if text.startswith("ImageJ="):
        stated = re.findall(r"^(channels|slices|frames)=(\d{1,9})\s*$", text, re.MULTILINE)
        sizes = {name: int(size) for name, size in stated}
        return list(range(_at_most(sizes.get("channels", 1)))) if sizes else None
    if "<Pixels" in text or ":Pixels" in text:
        return _ome_planes(text)
    if text.startswith('{"shape":'):
        return _tifffile_planes(text)
    return None


def _at_most(pages: int) -> int:
    """A stated number of channels, which a description can give any value."""
    return max(1, min(pages, 1 << 16))


def _tifffile_planes(text: str) -> list[int] | None:
    """``axes`` names the axes of ``shape``: C the channels, Q and I unknown ones."""
    try:
        stated = json.loads(text)
        axes, shape = str(stated["axes"]).upper(), [int(side) for side in stated["shape"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    leading = axes[: min(axes.find("Y"), axes.find("X"))] if "Y" in axes and "X" in axes else ""
    if len(axes) != len(shape) or not leading or set(leading) & set("QI"):
        return None
    if "C" not in leading:
        return [0]
    place = leading.index("C")
    step = math.prod(shape[place + 1 : len(leading)])
    return [number * step for number in range(_at_most(shape[place]))]


def _ome_planes(text: str) -> list[int] | None:
    """By the order of the axes and their sizes, or where they are listed the pages of planes."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]{0,4000}>", text)
    if pixels is None:
        return None
    order = re.search(r'DimensionOrder="XY([CZT]{3})"', pixels[0])
    sizes = {axis: int(size) for axis, size in re.findall(r'Size([CZT])="(\d{1,9})"', pixels[0])}
    if order is None or len(sizes) < 3:
        return None
    listed: dict[int, int] = {}
    for block in re.findall(r"<(?:\w+:)?TiffData\b([^>]{0,1000})>", text[pixels.end() :]):
        numbers = re.findall(r'(IFD|First[CZT]|PlaneCount)="(\d{1,9})"', block)
        at = {name: int(number) for name, number in numbers}
        is_first = not at.get("FirstZ") and not at.get("FirstT")
        if "IFD" in at and is_first and at.get("PlaneCount", 1) == 1:
            listed.setdefault(at.get("FirstC", 0), at["IFD"])
    channels = _at_most(sizes["C"])
    if len(listed) == channels:
        return [listed[channel] for channel in sorted(listed)]
    step = math.prod(sizes[axis] for axis in order[1][: order[1].index("C")])
    return [channel * step for channel in range(channels)]
