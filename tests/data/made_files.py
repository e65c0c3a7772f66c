"""Folders and archives as people have them, for the tests of what counts."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

JPEG = b"\xff\xd8\xff\xe0 jpeg "
PNG = b"\x89PNG\r\n\x1a\n png "


def write_files(root: Path, *names: str, data: bytes = JPEG) -> Path:
    """Files of these names, whose contents end in the name."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data + name.encode("utf-8", "surrogateescape"))
    return root


def write_tar(file: Path, *names: str, data: bytes = JPEG, **settings: object) -> Path:
    """An archive of members with these names, in this order, whose contents end in the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **settings) as archive:  # type: ignore[call-overload]
        for name in names:
            add(archive, name, data + name.encode("utf-8", "surrogateescape"))
    return file


def add(
    archive: tarfile.TarFile,
    name: str,
    data: bytes = b"",
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
) -> None:
    """One member."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    archive.addfile(info, io.BytesIO(data))


def spoiled(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, most of them near the beginning where headers are; cut out, doubled, or cut
    off.
    """
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        reach = len(changed) if rng.random() < 0.3 else min(len(changed), 200)
        place = int(rng.integers(4, max(5, reach)))
        kind = rng.random()
        if kind < 0.6:
            changed[place : place + 1] = rng.choice(
                [b"\0", b"\xff", b"\x7f", b"\x80", bytes([int(rng.integers(256))])]
            )
        elif kind < 0.75:
            changed[place : place + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1"]
            )
        elif kind < 0.85:
            del changed[place : place + int(rng.integers(1, 20))]
        elif kind < 0.95:
            changed[place:place] = changed[place : place + int(rng.integers(1, 20))]
        else:
            del changed[place:]
    return bytes(changed)
