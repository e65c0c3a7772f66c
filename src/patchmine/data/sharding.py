"""``patchmine data shard``: any source written as tar shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from patchmine.data.decoding.arrays import filled, with_nan
from patchmine.data.decoding.decode import DecodeError, decode, decode_known, probe
from patchmine.data.decoding.reading import Piece
from patchmine.data.settings import MAX_PIXELS
from patchmine.data.sources.contract import IMAGE_SUFFIXES, Source
from patchmine.data.sources.members import HEAD, ending_told_by, is_hidden
from patchmine.errors import Say, UserError, foreign_parser, reason_of, shown_name, silent
from patchmine.system.disk import remedy, replacing

JPEG_QUALITY = 95
"""Of images that are made smaller; with all colour samples kept (4:4:4)."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass
class Written:
    """What was written: ``too_large`` items should have been shrunk and could not."""

    shards: int = 0
    items: int = 0
    bytes: int = 0
    shrunk: int = 0
    too_large: int = 0
    skipped: int = 0


def write_shards(
    source: Source,
    out: Path,
    *,
    max_side: int | None = None,
    shard_size: int = 256 * 2**20,
    keep_missing: bool = False,
    say: Say = silent,
) -> Written:
    """Write every image, in the source's order, into ``out/shard-000000.tar`` and so on.

    An image keeps its bytes unless it is shrunk: then a JPEG becomes a JPEG of quality 95 with full
    colour, else a PNG.  Its path and class stand in a ``.json`` member beside it.  The folder
    appears once it is complete.

    Args:
        source: opened images (`open_source`).
        out: the new folder.
        max_side: longest side in pixels above which an image is shrunk to it (Lanczos).
        shard_size: bytes of a shard, about.
        keep_missing: pixels without data stay known as such, for ``missing=mask``.
        say: hears about the progress.

    Returns:
        What was written.

    Raises:
        UserError: ``out`` holds something already, or cannot be written.
    """
    if max_side is not None and max_side < 1:
        raise UserError(f"max_side={max_side}: give the longest side in pixels, at least 1")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        what = "there is something already; give a new folder, or delete this one"
        raise UserError(f"out={shown_name(out)}: {what}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as room:
            room.mkdir()
            done = _write_all(source, room, max_side, shard_size, keep_missing, say)
    except OSError as error:
        what = f"the shards cannot be written ({reason_of(error)}); {remedy(error)}"
        raise UserError(f"out={shown_name(out)}: {what}") from error
    for line in _summary(done, out, max_side):
        say(line)
    return done


def _write_all(
    source: Source, room: Path, max_side: int | None, shard_size: int, keep_missing: bool, say: Say
) -> Written:
    labels, done, keys = source.labels(), Written(), set[int]()
    shard: _Shard | None = None
    try:
        for index in range(len(source)):
            try:
                with foreign_parser(_UnreadableError):
                    path = source.key(index)
                    data, suffix = _encoded(source.read(index), path, max_side, keep_missing, done)
            except _UnreadableError as error:
                say(f"{shown_name(source.path(index))} is left out: it cannot be read ({error})")
                done.skipped += 1
                continue
            if shard is None or shard.size > shard_size:
                if shard is not None:
                    shard.close()
                shard = _Shard(room / f"shard-{done.shards:06d}.tar", keys)
                done.shards += 1
            label = {"label": labels.names[labels.ids[index]]} if labels else {}
            shard.add(index, data, suffix, {"path": path, **label})
            done.items += 1
            done.bytes += len(data)
    finally:
        if shard is not None:
            shard.close()
    return done


class _UnreadableError(Exception):
    """An item of the source that cannot be read, or not be written as an image."""


class _Shard:
    """One archive that is being written; ``keys``: hashes of those in it and in earlier ones."""

    def __init__(self, file: Path, keys: set[int]) -> None:
        self._handle = file.open("wb")
        self._archive = tarfile.TarFile(fileobj=self._handle, mode="w", format=tarfile.PAX_FORMAT)
        self._keys = keys

    @property
    def size(self) -> int:
        return self._archive.offset

    def add(self, index: int, data: bytes, suffix: str, note: dict[str, str]) -> None:
        """An image and its note under a key of their own: equal ones would be one sample."""
        key = _key(note["path"])
        if hash(key) in self._keys:
            key = f"{key}_{index}"
        while hash(key) in self._keys:
            key += "_"
        self._keys.add(hash(key))
        for name, content in ((key + suffix, data), (f"{key}.json", json.dumps(note).encode())):
            header = tarfile.TarInfo(name)  # no time, no owner: the same images, the same bytes
            header.size = len(content)
            self._archive.addfile(header, io.BytesIO(content))

    def close(self) -> None:
        """The end mark, and everything on the disk."""
        with self._handle:
            self._archive.close()
            self._handle.flush()
            os.fsync(self._handle.fileno())


def _key(path: str) -> str:
    """A path as a member's name: below the root, without dots (where keys end), nowhere hidden."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")] or ["item"]
    parts[-1] = (PurePosixPath(parts[-1]).stem or parts[-1]).replace(".", "_")
    return "/".join(f"_{part}" if is_hidden(part) else part for part in parts).replace("\0", "_")


def _encoded(
    raw: Any, path: str, max_side: int | None, keep_missing: bool, done: Written
) -> tuple[bytes, str]:
    """File contents and suffix of an item as it goes into a shard, where nothing else is lost."""
    if max_side is not None and _longest_side(raw) > max_side:
        smaller = _shrunk(raw, max_side, keep_missing)
        if smaller is not None:
            done.shrunk += 1
            return smaller
        done.too_large += 1
    if isinstance(raw, bytes):
        suffix = PurePosixPath(path).suffix.lower()
        return raw, suffix if suffix in IMAGE_SUFFIXES else ending_told_by(raw[:HEAD]) or ".jpg"
    if isinstance(raw, Piece):
        raw, _ = raw.read(probe(raw)[2], MAX_PIXELS)  # (C, H, W), with all its bits
        raw = (with_nan if keep_missing else filled)(raw)
    out = io.BytesIO()
    if isinstance(raw, Image.Image):
        if raw.mode in _PNG_MODES:
            raw.save(out, "PNG")
            return out.getvalue(), ".png"
        raw = decode(raw, probe(raw)[2])  # (C, H, W), as training sees it
    if isinstance(raw, torch.Tensor):
        raw = (raw.float() if raw.dtype == torch.bfloat16 else raw).numpy(force=True)
    np.save(out, np.asarray(raw), allow_pickle=False)
    return out.getvalue(), ".npy"


def _longest_side(raw: Any) -> int:
    """0 for what is no image; it goes into the shard as it is, and training will say so."""
    try:
        return max(probe(raw)[:2])
    except DecodeError:
        return 0


def _shrunk(raw: Any, max_side: int, keep_missing: bool) -> tuple[bytes, str] | None:
    """The smaller image, or None of one that is damaged, is neither grey nor RGB of 8 bits, or
    misses pixels that are to be kept known.
    """
    try:
        channels = probe(raw)[2]
        pixels, known = (
            decode_known(raw, channels) if keep_missing else (decode(raw, channels), None)
        )
    except DecodeError:
        return None
    if known is not None or pixels.dtype != torch.uint8 or channels not in (1, 3):
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if isinstance(raw, bytes) and raw.startswith(b"\xff\xd8"):
        image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return out.getvalue(), ".jpg"
    image.save(out, "PNG")
    return out.getvalue(), ".png"


def _summary(done: Written, out: Path, max_side: int | None) -> Iterator[str]:
    shards = f"{done.shards:,} shard{'s' * (done.shards != 1)}: {shown_name(out)}"
    yield f"{done.items:,} images ({done.bytes / 2**20:,.1f} MiB) in {shards}"
    if max_side is not None:
        how = f"(JPEG as JPEG of quality {JPEG_QUALITY}, others as PNG)"
        yield f"{done.shrunk:,} were shrunk to {max_side} pixels {how}, the rest kept every byte"
    if done.too_large:
        why = "damaged, or not 8-bit grey or RGB"
        yield f"{done.too_large:,} larger ones stay as they are: {why}"
    if done.skipped:
        yield f"{done.skipped:,} could not be read and are left out"
