"""How a video's frames are to be turned or mirrored before they are shown, one of the eight
orientations of EXIF.

FFmpeg's decoders tell an angle, and an angle cannot say that a picture is mirrored.  So the display
matrix itself is
read: by PyAV from the decoded frame, and for torchcodec, which hands out turned frames, from the
boxes of MP4 and MOV.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from patchmine.data.decoding.orientation import of_matrix
from patchmine.data.sources.contract import open_regular

MIRRORED = (2, 4, 5, 7)

# FFmpeg's angle makes 3 of 2, 1 of 4, 6 of 5 and 8 of 7: what is then missing to the right one.
_REMAINDER = {2: 4, 4: 4, 5: 2, 7: 2}
_MOST_BOXES = 10_000
_HEAD = 1 << 16  # bytes of a Matroska file among which its tracks are described
_PROJECTION = b"\x76\x70"  # Matroska's element that can turn and mirror


def remainder(orientation: int) -> int:
    """The orientation still to be applied to frames that were turned by the angle of
    ``orientation`` alone.
    """
    return _REMAINDER.get(orientation, 1)


def of_frame(frame: Any) -> int:
    """Of one of PyAV's frames, whatever the format."""
    for part in frame.side_data:
        if part.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(part), np.int32)[:5].tolist()
            return of_matrix(a, b, c, d)
    return 1


def of_file(source: str | bytes) -> int | None:
    """Of an MP4 or MOV file or its contents, 1 of most other formats; None where PyAV has to say.

    Raises:
        OSError: for a file that cannot be read.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        head = file.read(12)
        if head[:4] == b"\x1aE\xdf\xa3":  # Matroska, WebM
            return None if _PROJECTION in file.read(_HEAD) else 1
        if head[4:8] not in {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}:
            return 1
        return _of_boxes(file, file.seek(0, io.SEEK_END))


def _of_boxes(file: BinaryIO, length: int) -> int:
    """The first picture track's matrix times that of the film, as FFmpeg combines them."""
    for kind, start, end in _boxes(file, 0, length):
        if kind != b"moov":
            continue
        film = np.eye(2)
        for inner, first, last in _boxes(file, start, end):
            if inner == b"mvhd":
                film = _matrix(file, first, last, 36, 48)
            elif inner == b"trak" and (track := _track(file, first, last)) is not None:
                (a, b), (c, d) = (track @ film).tolist()
                return of_matrix(a, b, c, d)
    return 1


def _track(file: BinaryIO, start: int, end: int) -> np.ndarray | None:
    """The (2, 2) matrix of a track of pictures; None of another track."""
    matrix, is_picture = np.eye(2), False
    for kind, first, last in _boxes(file, start, end):
        if kind == b"tkhd":
            matrix = _matrix(file, first, last, 40, 52)
        elif kind == b"mdia":
            for inner, at, _ in _boxes(file, first, last):
                if inner == b"hdlr":
                    file.seek(at + 8)
                    is_picture = file.read(4) == b"vide"
    return matrix if is_picture else None


def _matrix(file: BinaryIO, start: int, end: int, *places: int) -> np.ndarray:
    """(2, 2) of a header box, in which the matrix stands at the place of the box's version, 0 or 1."""
    file.seek(start)
    content = file.read(min(end - start, 128))
    place = places[content[0] if content[:1] in {b"\0", b"\1"} else 0]
    if len(content) < place + 36:
        return np.eye(2)
    a, b, _, c, d = struct.unpack_from(">5i", content, place)
    return np.array([[a, b], [c, d]], float) if (a, b, c, d) != (0, 0, 0, 0) else np.eye(2)


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its contents begin, where they end) of the boxes between two places."""
    for _ in range(_MOST_BOXES):
        file.seek(start)
        head = file.read(16)
        if start + 8 > end or len(head) < 8:
            return
        size, inside = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, inside = int.from_bytes(head[8:16], "big"), 16
        last = end if size == 0 else min(start + size, end)
        if last < start + inside:
            return
        yield head[4:8], start + inside, last
        start = last
