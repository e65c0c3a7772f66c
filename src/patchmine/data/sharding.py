"""``patchmine data shard``: any source written as tar shards."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from patchmine.data.contract import IMAGE_SUFFIXES, Source, key_of
from patchmine.data.decode import DecodeError, decode, probe
from patchmine.errors import UserError

JPEG_QUALITY = 95
"""Of images that are made smaller; with all colour samples kept (4:4:4)."""


@dataclass
class Written:
    """What ``write_shards`` did.

    ``shrunk`` of the ``items`` were made smaller; ``too_large`` should have been and could not; ``skipped`` could not
    be read.
    """

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
    say: Callable[[str], None] = lambda _: None,
) -> Written:
    """Writes every image, in the source's order, into ``out/shard-000000.tar`` and so on.

    A shard has about ``shard_size`` bytes.  An image keeps its bytes, unless its longer side is above ``max_side``
    pixels: then it is shrunk to that (Lanczos) and becomes a JPEG of quality 95 with full colour if it was a JPEG,
    else a PNG.  Its path and its class's name stand in a ``.json`` member beside it.  The folder appears once it is
    complete.  UserError when ``out`` holds something already, or cannot be written.
    """
    if max_side is not None and max_side < 1:
        raise UserError(f"max_side={max_side}: give the longest side in pixels, at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: there is something already; give a new folder, or delete this one")
    room = out.with_name(out.name + ".partial")
    shutil.rmtree(room, ignore_errors=True)
    try:
        room.mkdir(parents=True)
        done = _write_all(source, room, max_side, shard_size, say)
        room.replace(out)
    except OSError as error:
        raise UserError(
            f"out={out}: the shards cannot be written ({error}); give a folder with space enough"
        ) from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
    for line in _summary(done, out, max_side):
        say(line)
    return done


def _write_all(
    source: Source, room: Path, max_side: int | None, shard_size: int, say: Callable[[str], None]
) -> Written:
    done, labels = Written(), source.labels()
    shard: _Shard | None = None
    try:
        for index in range(len(source)):
            try:
                raw = source.read(index)
            except OSError as error:
                say(f"{source.path(index)} is left out: it cannot be read ({error})")
                done.skipped += 1
                continue
            path = key_of(source, index)
            data, suffix = _encoded(raw, path, max_side, done)
            if shard is None or shard.size > shard_size:
                if shard is not None:
                    shard.close()
                shard = _Shard(room / f"shard-{done.shards:06d}.tar")
                done.shards += 1
            shard.add(path, index, data, suffix, labels.names[labels.ids[index]] if labels else None)
            done.items += 1
            done.bytes += len(data)
    finally:
        if shard is not None:
            shard.close()
    return done


class _Shard:
    """One archive that is being written."""

    def __init__(self, file: Path) -> None:
        self._handle = file.open("wb")
        self._archive = tarfile.open(fileobj=self._handle, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._key = ""

    @property
    def size(self) -> int:
        return self._archive.offset

    def add(self, path: str, index: int, data: bytes, suffix: str, label: str | None) -> None:
        """An image and its note, under a key of their own: neighbours of one key would be taken for one sample."""
        inside = PurePosixPath(path.lstrip("/"))
        key = str(inside.with_name(inside.stem.replace(".", "_")))
        if key == self._key:
            key = f"{key}_{index}"
        self._key = key
        note = {"path": path} if label is None else {"path": path, "label": label}
        self._put(key + suffix, data)
        self._put(f"{key}.json", json.dumps(note).encode())

    def _put(self, name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)  # no time, no owner: the same images make the same bytes
        header.size = len(data)
        self._archive.addfile(header, io.BytesIO(data))

    def close(self) -> None:
        """The end mark, and everything on the disk."""
        with self._handle:
            self._archive.close()
            self._handle.flush()
            os.fsync(self._handle.fileno())


def _encoded(raw: Any, path: str, max_side: int | None, done: Written) -> tuple[bytes, str]:
    """File contents and suffix of an item as it goes into a shard."""
    suffix = PurePosixPath(path).suffix.lower()
    if max_side is not None and _longest_side(raw) > max_side:
        smaller = _shrink(raw, max_side, is_jpeg=isinstance(raw, bytes) and raw.startswith(b"\xff\xd8"))
        done.shrunk += smaller is not None
        done.too_large += smaller is None
        if smaller is not None:
            return smaller
    if isinstance(raw, bytes):
        return raw, suffix if suffix in IMAGE_SUFFIXES else ".jpg"  # what it really is, its first bytes tell
    return _encode_pixels(raw)


def _longest_side(raw: Any) -> int:
    """0 for what is no image; it goes into the shard as it is, and training will say so."""
    try:
        return max(probe(raw)[:2])
    except DecodeError:
        return 0


def _shrink(raw: Any, max_side: int, is_jpeg: bool) -> tuple[bytes, str] | None:
    """The smaller image, or None of one that is damaged, or is neither grey nor RGB of 8 bits."""
    try:
        channels = probe(raw)[2]
        pixels = decode(raw, channels)
    except DecodeError:
        return None
    if pixels.dtype != torch.uint8 or channels not in (1, 3):
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if is_jpeg:
        image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(out, "PNG")
    return out.getvalue(), ".jpg" if is_jpeg else ".png"


def _encode_pixels(raw: Any) -> tuple[bytes, str]:
    """PNG of a PIL image, npy of an array or tensor: nothing is lost."""
    out = io.BytesIO()
    if isinstance(raw, Image.Image):
        raw.save(out, "PNG")
        return out.getvalue(), ".png"
    np.save(out, raw.numpy(force=True) if isinstance(raw, torch.Tensor) else np.asarray(raw), allow_pickle=False)
    return out.getvalue(), ".npy"


def _summary(done: Written, out: Path, max_side: int | None) -> list[str]:
    size = f"{done.bytes / 2**20:,.1f} MiB"
    lines = [f"{done.items:,} images ({size}) in {done.shards:,} shard{'s' * (done.shards != 1)}: {out}"]
    if max_side is not None:
        lines.append(
            f"{done.shrunk:,} were shrunk to {max_side} pixels (JPEG as JPEG of quality {JPEG_QUALITY}, others as "
            f"PNG), the rest kept every byte"
        )
    if done.too_large:
        lines.append(f"{done.too_large:,} larger ones stay as they are: damaged, or not 8-bit grey or RGB")
    if done.skipped:
        lines.append(f"{done.skipped:,} could not be read and are left out")
    return lines
