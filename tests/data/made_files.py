"""Folders and archives as people have them, for the tests of what counts."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

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
