"""DICOM, by pydicom: the values of a frame become what a viewer shows of them.

Grey values go through the rescale slope and intercept (or modality LUT) and then through the first
window (or VOI LUT) to bytes.  Where there is no window nothing is lost: rescaled values stay as
they are, in their unit, and others of more than 8 bits fill 16.  MONOCHROME1 is turned round,
colours become RGB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from patchmine.data.decoding import headers
from patchmine.data.decoding.bounds import DecodeError, check_pixels, decoding, missing, without_log
from patchmine.data.decoding.reading import Contents, Facts, Reader, open_stored, stored_size

SUFFIXES, MAGIC = (".dcm", ".dicom", ".ima"), ((128, b"DICM"),)
_DAMAGED = "is a truncated or damaged DICOM file"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_JPEG_2000, _JPEG_LS = b"\xff\x4f\xff\x51", b"\xff\xf7"
_LONGEST_META = 4096  # bytes within which a file says how it is stored
_LEAST_ENCODED = 16  # bytes of a compressed frame
_ELEMENT = 12  # bytes before its contents: tag, type and length
_WORK = 16  # bytes for each sample beside the stored ones: floats, and what is made of them


def count(file: Contents) -> int:
    """How many frames a file holds; 0 of one without pixels.  DecodeError for damage."""
    with _opened(file) as handle:
        header = _header(handle)
        return _frames(header, stored_size(handle)) if _has_size(header) else 0


def probe(file: Contents, number: int) -> Facts:
    """(height, width, channels, dtype name) of a frame; DecodeError."""
    with _opened(file) as handle:
        header = _header(handle)
        return _facts(header, _meaning(header, number))


def read(file: Contents, number: int, _: int, max_pixels: int) -> np.ndarray:
    """(C, H, W) uint8, uint16 or float32 of a frame; DecodeError."""
    with _opened(file) as handle:
        header = _header(handle)
        place = handle.tell()
        meaning = _meaning(header, number)
        height, width, samples, dtype = _facts(header, meaning)
        stored = stored_size(handle)
        size = header.BitsAllocated // 8 + 1
        check_pixels(height, width, max_pixels, stored=stored, work=samples * (size + _WORK))
        _refuse_encoding(header)
        array = _pixels(handle, header, place, number)
        if array.shape[:2] != (height, width):
            raise DecodeError(f"{_DAMAGED} (its pixels have shape {array.shape})")
        image = _shown(array, header, meaning)
    if image.dtype.name != dtype or image.size != height * width * samples:
        raise DecodeError(f"{_DAMAGED} (its pixels are not what its header says)")
    return image[None] if image.ndim == 2 else np.moveaxis(image, 2, 0)


@contextmanager
def _opened(file: Contents) -> Iterator[BinaryIO]:
    """A file, of which whatever goes wrong in reading it is a DecodeError."""
    quiet = without_log("pydicom", "pylibjpeg", "openjpeg")
    with open_stored(file) as handle, decoding(_DAMAGED), quiet:
        yield handle


def _header(handle: BinaryIO) -> Any:
    """All that stands before the pixels, where the file then is."""
    import pydicom

    start = handle.read(_LONGEST_META)
    handle.seek(0)
    if not start.startswith(b"DICM", 128):
        raise DecodeError("is no DICOM file with a head (DICM at byte 128): write one with dcmconv")
    if _DEFLATED in start:
        raise DecodeError("is a deflated DICOM file: unpack it with dcmconv +te")
    header = pydicom.dcmread(handle, stop_before_pixels=True)
    header.file_meta.TransferSyntaxUID  # noqa: B018, AttributeError where there is none
    return header


def _has_size(header: Any) -> bool:
    return bool(header.get("Rows")) and bool(header.get("Columns"))


def _frames(header: Any, stored: int) -> int:
    """Frames that a file says it has, as far as it has room for them."""
    frames = max(1, int(header.get("NumberOfFrames") or 1))
    pixels = header.Rows * header.Columns * header.get("SamplesPerPixel", 1)
    least = pixels * header.BitsAllocated // 8
    if header.file_meta.TransferSyntaxUID.is_compressed:
        least = _LEAST_ENCODED
    if frames > 1 and frames * least > stored:
        raise DecodeError(f"{_DAMAGED} ({frames} frames are more than it has room for)")
    return frames


def _meaning(header: Any, number: int) -> Any:
    """What a file says of the values of a frame: in the frame's own group, the shared one, or at
    large.
    """
    if not _has_size(header):
        kind = getattr(header.get("SOPClassUID"), "name", "")
        raise DecodeError("is a DICOM file without pixels" + (f" ({kind})" if kind else ""))
    found = header.group_dataset(0x0028)
    groups = [*(header.get("SharedFunctionalGroupsSequence") or [])[:1]]
    groups += (header.get("PerFrameFunctionalGroupsSequence") or [])[number : number + 1]
    for group in groups:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in (group.get(name) or [])[:1]:
                found.update(item)
    return found


def _facts(header: Any, meaning: Any) -> Facts:
    kind, samples = str(meaning.PhotometricInterpretation), int(meaning.SamplesPerPixel)
    bits, size = int(meaning.get("BitsStored", 0)), (int(header.Rows), int(header.Columns))
    allocated = int(meaning.BitsAllocated)
    palette = kind == "PALETTE COLOR"
    depth = int(meaning.RedPaletteColorLookupTableDescriptor[2]) if palette else bits
    if samples not in (1, 3) or (samples == 3 and not kind.startswith(("RGB", "YBR"))):
        what = f"{kind[:20]}, {samples} samples"
        raise DecodeError(f"is a DICOM file of a kind of colour ({what}) that is not read")
    if palette or samples == 3:
        return *size, 3, "uint8" if depth <= 8 else "uint16"
    if _has_window(meaning) or (allocated <= 8 and not _is_rescaled(meaning)):
        return *size, 1, "uint8"
    deep = allocated > 16 or _is_rescaled(meaning)
    return *size, 1, "float32" if deep else "uint16"


def _has_window(meaning: Any) -> bool:
    return bool(meaning.get("VOILUTSequence")) or _window(meaning) is not None


def _window(meaning: Any) -> tuple[float, float] | None:
    """Centre and width of the first window, where there is one."""

    centre, width = (_first(meaning.get(name)) for name in ("WindowCenter", "WindowWidth"))
    return None if centre is None or width is None or width <= 0 else (centre, width)


def _first(value: Any) -> float | None:
    """Of one value or several; None of none."""
    if value is None or isinstance(value, str):
        return float(value) if value else None
    values = list(value) if hasattr(value, "__iter__") else [value]
    return float(values[0]) if values and values[0] is not None else None


def _is_rescaled(meaning: Any) -> bool:
    if meaning.get("ModalityLUTSequence"):
        return True
    slope, intercept = meaning.get("RescaleSlope"), meaning.get("RescaleIntercept")
    return (float(slope or 1), float(intercept or 0)) != (1, 0)


def _refuse_encoding(header: Any) -> None:
    """DecodeError for a compression that nothing here reads."""
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        what = f"is a DICOM file of a kind ({syntax.name}) that is not read"
        raise DecodeError(f"{what}: export its frames as images or a video") from error
    if not decoder.is_available:
        is_2000 = "JPEG 2000" in syntax.name
        package = "pylibjpeg-openjpeg" if is_2000 else "pylibjpeg-libjpeg"
        command = f"pip install pylibjpeg {package}"
        raise missing(f"a DICOM file compressed as {syntax.name}", package, command)


def _pixels(handle: BinaryIO, header: Any, place: int, number: int) -> np.ndarray:
    """(H, W) or (H, W, 3) of a frame as stored, but in RGB; no more than the frame is read."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array

    if header.file_meta.TransferSyntaxUID.is_compressed:
        handle.seek(place + _ELEMENT)
        frames = int(header.get("NumberOfFrames") or 1)
        _check_encoded(get_frame(handle, number, number_of_frames=frames), header)
    handle.seek(0)
    # pylibjpeg-rle panics at some damaged files, which nothing can catch
    is_rle = "RLE" in header.file_meta.TransferSyntaxUID.name
    plugin = "pydicom" if is_rle else ""
    return np.asarray(pixel_array(handle, index=number, decoding_plugin=plugin))


def _check_encoded(frame: bytes, header: Any) -> None:
    """DecodeError where a compressed frame says that it is larger than the file does."""
    size = header.Rows, header.Columns
    if (start := frame.find(_JPEG_2000, 0, 512)) >= 0:
        right, bottom, left, top = np.frombuffer(frame, ">u4", 4, start + 8).tolist()
        found = bottom - top, right - left
    elif (start := frame.find(_JPEG_LS, 0, 512)) >= 0:
        rows, columns = np.frombuffer(frame, ">u2", 2, start + 5).tolist()
        found = rows, columns
    elif frame.startswith(headers.JPEG):
        found = headers.read_jpeg_header(frame)[:2]
    else:
        return
    if found != size:
        raise DecodeError(f"{_DAMAGED} (a frame of {found} where its header says {size})")


def _shown(array: np.ndarray, header: Any, meaning: Any) -> np.ndarray:
    """(H, W) or (H, W, 3): what the values mean."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    kind, bits = str(meaning.PhotometricInterpretation), int(meaning.get("BitsStored", 0))
    if kind == "PALETTE COLOR":
        depth = int(meaning.RedPaletteColorLookupTableDescriptor[2])
        return apply_color_lut(array, header).astype(np.uint8 if depth <= 8 else np.uint16)
    if array.ndim == 3:
        return _filled(array, bits)
    turned = kind == "MONOCHROME1"
    if meaning.get("VOILUTSequence"):
        shown = _looked_up(apply_modality_lut(array, meaning), meaning.VOILUTSequence[0])
        return 255 - shown if turned else shown
    window = _window(meaning)
    if window is not None:
        values = apply_modality_lut(array, meaning).astype(np.float32)
        shares = _windowed(values, *window, str(meaning.get("VOILUTFunction", "LINEAR")))
        shown = np.rint(shares * 255).astype(np.uint8)
        return 255 - shown if turned else shown
    if array.dtype.kind == "f" or array.dtype.itemsize > 2:
        return apply_modality_lut(array, meaning).astype(np.float32)
    if turned:  # within the range of the stored bits, before they get a unit
        low, high = _range(array, bits)
        array = (low + high - array.astype(np.int64)).clip(low, high).astype(array.dtype)
    if _is_rescaled(meaning):
        return apply_modality_lut(array, meaning).astype(np.float32)
    return _filled(array, bits)


def _looked_up(values: np.ndarray, table: Any) -> np.ndarray:
    """Bytes that a VOI LUT gives."""
    entries, first, depth = map(int, table.LUTDescriptor)
    found = table.LUTData
    found = np.frombuffer(found, "<u2") if isinstance(found, bytes) else np.array(found, np.uint16)
    last = min(entries or 65536, len(found)) - 1
    places = (np.rint(values).astype(np.int64) - first).clip(0, last)
    return np.minimum(found[places] >> max(0, depth - 8), 255).astype(np.uint8)


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Shares of the window in [0, 1], by the formulas of PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT" or width < 1:
        return ((values - centre) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float32)
    return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def _range(array: np.ndarray, bits: int) -> tuple[int, int]:
    """The smallest and the largest value of so many bits."""
    bits = min(bits or 64, 8 * array.dtype.itemsize)
    if array.dtype.kind == "i":
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def _filled(array: np.ndarray, bits: int) -> np.ndarray:
    """Values of ``bits`` bits that fill 8 or 16, as samples of few bits do in a TIFF."""
    low, high = _range(array, bits)
    top = 255 if array.dtype.itemsize == 1 else 65535
    dtype = np.uint8 if top == 255 else np.uint16
    if (low, high) == (0, top):
        return array.astype(dtype, copy=False)
    return ((array.astype(np.int64) - low).clip(0, high - low) * top // (high - low)).astype(dtype)


READER = Reader(count, probe, read)
