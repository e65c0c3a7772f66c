"""From an address after ``data=`` (``s3://bucket/shards-{000..031}.tar``) to a source."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchmine.data.sources import index as indices
from patchmine.data.sources.archive import PACKED_SUFFIXES
from patchmine.data.sources.blocks import Blocks
from patchmine.data.sources.contract import IMAGES, Kind, Source, data_error
from patchmine.data.sources.members import is_hidden
from patchmine.data.sources.parquet import SUFFIX as PARQUET
from patchmine.data.sources.parquet import parquet_source
from patchmine.data.sources.patterns import endings_of, spellings, split
from patchmine.data.sources.remote import RemoteFile, attempted, remote_files
from patchmine.data.sources.shards import index_shards, shard_source
from patchmine.errors import shown_name

log = logging.getLogger(__name__)

FORMS = "tar shards or Parquet files: one, a pattern as shard-{000..099}.tar, or their folder"

_AT_ONCE = 8  # files that are fetched side by side
_LARGE = 1 << 30  # bytes from which it is told that they are fetched


def is_address(name: str) -> bool:
    """Whether a name stands for something that fsspec opens."""
    return "://" in name.partition("::")[0]


def open_address(name: str, kind: Kind, cache_dir: Path | None, limit: int) -> Source:
    """The images of tar shards or Parquet files behind an address.

    Args:
        name: what the user typed: an address, with a pattern or without, of files or their folder.
        kind: what the source is of.
        cache_dir: keeps the index and what is fetched; None: nothing is kept.
        limit: bytes of what is fetched that are kept, in all.

    Raises:
        UserError: nothing is there, nothing that can be read, or it cannot be reached.
    """
    address, words = split(name)
    kept = Blocks(None if cache_dir is None else cache_dir / "remote", limit)
    files = remote_files(_found(address, name), kept)
    source = _opened(files, words, name, kind, cache_dir, limit)
    size = sum(file.size for file in files)
    if size > limit:
        room = f"{size / 1e9:,.1f} GB lie there, and remote_gb={limit / 1e9:g} has room for less"
        note = f"data={shown_name(name)}: {room}: the rest is fetched in every epoch"
        source.notes = (*source.notes, note)
    return source


def _opened(
    files: Sequence[RemoteFile],
    words: Sequence[str],
    name: str,
    kind: Kind,
    cache_dir: Path | None,
    limit: int,
) -> Source:
    """The images of files of one kind, by an index that is kept."""
    marks, places = indices.Marks(), [file.name for file in files]
    marks.marks = {file.name: [file.size, file.state] for file in files}

    def holds(index: indices.Index) -> bool:
        return bool(index.stamp["marks"] == marks.marks)

    if _suffix(places[0]) == PARQUET:
        if kind.name != IMAGES.name:
            raise data_error(name, f"Parquet files hold images here, no {kind.name}s")
        return parquet_source(files, marks, places, name, cache_dir, words, holds)
    chosen = endings_of(words, name, kind)
    if chosen:
        kind = replace(kind, suffixes=chosen, chosen=True)

    def make() -> indices.Index:
        _fetch(files, name, limit)
        return index_shards(files, marks, name, kind)

    index = indices.kept_index(cache_dir, "remote", kind, places, make, holds)
    return shard_source(files, index, name)


def _found(address: str, name: str) -> list[str]:
    """The addresses of the files that are meant, in order; UserError where there are none."""
    found = list[str]()
    for each in spellings(address, name):
        found += _matching(each) if "*" in each or "[" in each else [each]
    if not found:
        raise data_error(name, f"nothing there has such a name; give {FORMS}")
    if found == [address] and _suffix(address) not in (".tar", PARQUET):
        found = _inside(address, name)
    strangers = [each for each in found if _suffix(each) != _suffix(found[0])]
    other = next((each for each in found if _suffix(each) not in (".tar", PARQUET)), None)
    if other is not None or strangers:
        what = f"{shown_name(other or strangers[0])} is not of the kind that is meant"
        raise data_error(name, f"{what}; give {FORMS}")
    return found


def _matching(pattern: str) -> list[str]:
    """The addresses that a pattern with ``*`` stands for."""
    return attempted(
        pattern, lambda files, path: sorted(map(files.unstrip_protocol, files.glob(path)))
    )


def _inside(folder: str, name: str) -> list[str]:
    """The tar shards below a folder, to any depth, or else its Parquet files."""
    if _suffix(folder) in PACKED_SUFFIXES:
        raise data_error(name, f"a packed file can only be read as a whole; give {FORMS}")
    root, paths, is_file = attempted(folder, _listed)
    below = [path for path in paths if not is_hidden(posixpath.relpath(path, root))]
    for suffix in () if is_file else (".tar", PARQUET):
        found = [path for path in below if _suffix(path) == suffix]
        if found:
            return found
    what = "this is a file of another kind" if is_file else "there are none of them in this folder"
    if not paths:
        what = "there is nothing at this address"
    raise data_error(name, f"{what}; give {FORMS}")


def _listed(files: Any, path: str) -> tuple[str, list[str], bool]:
    """A folder's address, those of all files below it in order, and whether it is a file itself."""
    try:
        paths = sorted(map(files.unstrip_protocol, files.find(path)))
    except FileNotFoundError:
        paths = []
    return files.unstrip_protocol(path), paths, files.isfile(path)


def _suffix(address: str) -> str:
    """The ending of an address in lower case, before what HTTP calls its query."""
    return posixpath.splitext(address.partition("?")[0])[1].lower()


def _fetch(files: Sequence[RemoteFile], name: str, limit: int) -> None:
    """Fetch shards side by side, where all fit into the room: an index needs their headers."""
    size = sum(file.size for file in files)
    if size > _LARGE:
        log.warning(
            "data=%s: %.1f GB are read once, to find where every image lies",
            shown_name(name),
            size / 1e9,
        )
    if size <= limit:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(RemoteFile.fetch, files))
