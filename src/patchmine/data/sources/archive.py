"""One pass over the headers of a tar archive: what lies where."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from patchmine.data.sources.members import NO_FILE, PassedOver
from patchmine.data.sources.stored import Stored, opened
from patchmine.errors import UserError, foreign_parser, shown_name

LOST_LINK = "link to what is not in the archive"
SPARSE = "sparse member larger than its archive"

_BLOCK = tarfile.BLOCKSIZE
_LARGEST_SPARSE = 2**26
_MOST_LINKS = 40  # from link to link, as in Linux
PACKED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip")
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}


class Member(NamedTuple):
    """A file in an archive: ``size`` bytes from ``start`` on.

    ``pieces``: of a sparse member, whose holes are not stored: place in it and size of each piece.
    """

    name: str
    start: int
    size: int
    pieces: tuple[tuple[int, int], ...] = ()


class _DamagedError(Exception):
    """A header that cannot be read."""


def members(shard: Stored, passed_over: PassedOver, trouble: list[str]) -> Iterator[Member]:
    """The whole files of one archive in order; links stand for the member that they lead to.

    Args:
        shard: the archive.
        passed_over: counts what is no file.
        trouble: is told, at the end, how the archive was cut or damaged.

    Raises:
        UserError: where this is no plain tar archive.
    """
    archive = shard.reader()
    size = archive.size
    if size < _BLOCK:
        trouble.append(f"was cut within its first header (it has {size} bytes)")
        return
    _refuse_packed(archive.read(0, _BLOCK), shard.name)
    targets: dict[str, list[tarfile.TarInfo]] | None = None
    for info in _headers(shard, trouble):
        name = _plain(info.name)
        if info.islnk() or info.issym():
            targets = _targets(shard) if targets is None else targets
            found = _resolve(info, targets)
            if found is None:
                passed_over.add(LOST_LINK, name)
            else:
                yield _member(found, name)
        elif info.isreg() and info.issparse() and info.size > max(size, _LARGEST_SPARSE):
            passed_over.add(SPARSE, name)
        elif info.isreg():
            yield _member(info, name)
        elif not info.isdir():
            passed_over.add(NO_FILE, name)


def _headers(shard: Stored, trouble: list[str]) -> Iterator[tarfile.TarInfo]:
    """Every header of a file whose data are whole, of all archives written one behind the other."""
    with opened(shard) as handle:
        place: int | None = 0
        while place is not None:
            end = yield from _part(handle, place, shard.name, trouble)
            place = None if trouble else _next_part(handle, end + -end % _BLOCK, trouble)


def _part(
    handle: BinaryIO, place: int, shard: str, trouble: list[str]
) -> Generator[tarfile.TarInfo, None, int]:
    """Headers of the archive that starts at ``place``; returns where the last one's data end."""
    size, end = handle.seek(0, io.SEEK_END), place
    handle.seek(place)
    try:
        with (
            foreign_parser(_DamagedError),
            tarfile.open(
                fileobj=handle, mode="r:", encoding="utf-8", errors="surrogateescape"
            ) as archive,
        ):
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                if info.size < 0 or archive.offset <= info.offset:  # which leads back, forever
                    trouble.append(f"was damaged at byte {info.offset:,}")
                    return end
                stored = (
                    sum(length for _, length in _pieces(info)) if info.issparse() else info.size
                )
                end = info.offset_data + (stored if info.isreg() else 0)
                if end > size:
                    name = shown_name(info.name)
                    trouble.append(f"was cut in the middle of {name} (it has {size:,} bytes)")
                    return end
                yield info
    except _DamagedError as error:
        if end == 0:
            what = f"is no plain tar archive ({error}); unpack or write it again"
            raise UserError(f"the shard {shown_name(shard)} {what}") from error
        trouble.append(f"was damaged at byte {end + -end % _BLOCK:,}")
    return end


def _next_part(handle: BinaryIO, end: int, trouble: list[str]) -> int | None:
    """Where another archive starts behind the zeros that end one; all else there is damage."""
    zeros = bytes(_BLOCK)
    handle.seek(end)
    if (block := handle.read(_BLOCK)) != zeros:
        trouble.append(f"was {'damaged' if len(block) == _BLOCK else 'cut'} at byte {end:,}")
        return None
    while block == zeros:
        end += _BLOCK
        block = handle.read(_BLOCK)
    return end if len(block) == _BLOCK else None


def _pieces(info: tarfile.TarInfo) -> tuple[tuple[int, int], ...]:
    return tuple(cast("list[tuple[int, int]]", info.sparse or []))


def _member(info: tarfile.TarInfo, name: str) -> Member:
    return Member(name, info.offset_data, info.size, _pieces(info))


def _plain(name: str) -> str:
    """A member's name below the archive's root."""
    return re.sub(r"^(\.?/)+", "", name)


def _targets(shard: Stored) -> dict[str, list[tarfile.TarInfo]]:
    """The files and links of an archive by name, those of one name in order."""
    found: dict[str, list[tarfile.TarInfo]] = {}
    for info in _headers(shard, []):
        if info.isreg() or info.issym() or info.islnk():
            found.setdefault(posixpath.normpath(_plain(info.name)), []).append(info)
    return found


def _resolve(
    info: tarfile.TarInfo, targets: dict[str, list[tarfile.TarInfo]]
) -> tarfile.TarInfo | None:
    """The file that a link leads to, perhaps by other links; None where there is none."""
    for _ in range(_MOST_LINKS):
        # A hard link counts from the root, a symbolic one from its folder and stays inside.
        folder = "" if info.islnk() else posixpath.dirname(_plain(info.name))
        inside = _plain(info.linkname) if info.islnk() else info.linkname
        named = targets.get(posixpath.normpath(posixpath.join(folder, inside)), [])
        # A file that comes again under its name is a new one: earlier hard links keep the old one.
        earlier = [other for other in named if info.issym() or other.offset < info.offset]
        found = earlier[-1] if earlier else named[0] if named else None
        if found is None or found.isreg():
            return found
        info = found
    return None


def refuse_packed(shard: Path) -> None:
    """UserError where an archive is packed, with what unpacks it."""
    with shard.open("rb") as handle:
        _refuse_packed(handle.read(6), shard)


def _refuse_packed(start: bytes, shard: str | Path) -> None:
    for magic, (what, tool) in _PACKED.items():
        if start.startswith(magic):
            raise UserError(
                f"the shard {shown_name(shard)} is packed with {what}, so no image can be reached "
                f"without reading all before it: unpack it with {tool}"
            )


def read_member(
    read: Callable[[int, int], bytes], start: int, size: int, pieces: list[list[int]] | None = None
) -> bytes:
    """The bytes of a member, by ``read(start, length)``; fewer where the archive is shorter."""
    if pieces is None:
        return read(start, size)
    data = bytearray(size)
    for place, length in pieces:
        piece = read(start, length)
        if len(piece) < length:
            return b""
        data[place : place + length] = piece
        start += length
    return bytes(data)
