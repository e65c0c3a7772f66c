"""Decoded images kept in a file, so that nothing is decoded twice: shared by processes and runs.

One file holds the images of one data set: a head, a slot of 64 bytes for every item, then pixels,
which are only ever appended.  A slot is written when its pixels are, and says of which state of
which item they are; it and they have checksums.  So a process that is killed leaves at most some
bytes that nobody reads, and no lock is needed.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import default_cache_dir
from patchmine.errors import UserError, shown_name
from patchmine.system.disk import leaves_room, remedy
from patchmine.train.settings import MachineSettings

VERSION = b"patchmine pixels 1\n"
"""The first bytes of a file.  Raised whenever pixels kept before would be read wrongly."""
SUFFIX = ".pixels"

_SLOT = 64
_HEAD = struct.Struct("<32s16sQ")  # version, digest of what is kept, number of items
# Digest of the item's state, place and checksum of the pixels, height, width, channels; then the
# slot's own checksum.
_ENTRY, _SUM = struct.Struct("<16sQIIII"), struct.Struct("<I")
_LOT = 1 << 24  # bytes that a process may keep before it looks again whether there is room


@dataclass
class PixelCache:
    """The decoded images of ``source``, as bytes of ``channels``.

    ``whole_only``: none is given to it that misses pixels, so none is taken from where it may be.
    Picklable; every process opens the file for itself, when it first asks.  Whatever fails (a full
    disk, a folder that may not be written) ends the keeping and not the run: ``trouble`` says what
    it was, once.
    """

    folder: Path
    limit: int
    source: Source
    channels: int
    max_pixels: int
    whole_only: bool = False
    trouble: str | None = None
    _file: _PixelFile | None = None
    _closed: bool = False

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}

    def read(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, C) of an item, C = 1 where grey stands for more; None: it is not kept.

        The memory is the file's: it must not be written to.
        """
        file = self._opened()
        if file is None:
            return None
        pixels = file.pixels(index, self.max_pixels)
        if pixels is None:
            state = self.source.identity(index)
            if state is not None and file.holds(index, _digest(state)):
                pixels = file.pixels(index, self.max_pixels)
        return pixels

    def keep(self, index: int, state: bytes, image: Tensor) -> None:
        """Keep an item's image, decoded when its file was in ``state``, if it is one of bytes."""
        file = self._opened()
        if file is None or file.full or image.dtype != torch.uint8:
            return
        if image.stride(0) == 0:  # grey that was spread over the channels
            image = image[:1]
        try:
            if file.room < image.numel():
                lot = image.numel() + min(_LOT, self.limit // 64)
                file.room = lot if self._has_room(lot) else -1
            if file.room >= 0:
                file.append(index, _digest(state), image)
                return
            reason = "is full; raise cache_gb or make room on its disk, to keep more"
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); {remedy(error)}"
        file.full = True
        name = shown_name(self.folder)
        self.trouble = f"the cache {name} {reason}: what it does not hold is decoded"

    def told(self) -> str | None:
        """What went wrong since it was last asked, in a sentence."""
        trouble, self.trouble = self.trouble, None
        return trouble

    def _opened(self) -> _PixelFile | None:
        if self._file is None and not self._closed:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = _PixelFile(self._path(), self._contents(), len(self.source))
            except OSError as error:
                self._closed = True
                self.trouble = (
                    f"cache={shown_name(self.folder)} cannot be used ({error.strerror}); "
                    f"{remedy(error)}: images are decoded as without it"
                )
        return self._file

    def _contents(self) -> bytes:
        """Digest of what is kept, and of what made it: the decoders may change with a version."""
        first = os.path.abspath(self.source.path(0))  # noqa: PTH100, names in archives too
        made_by = [torchvision.__version__, PIL.__version__, str(self.channels)]
        made_by += ["missing nothing"] * self.whole_only
        return _digest("\0".join([first, self.source.fingerprint, *made_by]).encode(*_NAMES))

    def _path(self) -> Path:
        return self.folder / (self._contents().hex() + SUFFIX)

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes fit, after the file that was not used for longest is removed."""
        if not leaves_room(self.folder, size):
            return False
        own, others, total = self._path(), list[tuple[float, Path]](), size
        for entry in os.scandir(self.folder):
            if entry.name.endswith(SUFFIX):
                info = entry.stat()
                total += info.st_blocks * 512
                others.append((info.st_mtime, Path(entry.path)))
        if total <= self.limit:
            return True
        oldest = min((each for each in others if each[1] != own), default=None)
        if oldest is None:
            return False
        oldest[1].unlink(missing_ok=True)  # a process that reads it keeps it until it ends
        return self._has_room(size)


def cache_of(
    source: Source, settings: InputSettings, machine: MachineSettings
) -> PixelCache | None:
    """The cache that the settings ask for; None where they ask for none, or there is no file to be
    decoded: arrays and a data set of the user's have nothing that tells one state from another.

    Raises:
        UserError: for ``cache=auto`` of a user without a home.
    """
    if machine.cache is None or not (source.encoded and source.repeatable):
        return None
    folder: Path | None = Path(machine.cache)
    if machine.cache == "auto":
        user = default_cache_dir()
        folder = None if user is None else user / "pixels"
    if folder is None:
        raise UserError("cache=auto: this user has no home folder; name a folder, as in cache=kept")
    limit, known = int(machine.cache_gb * 1e9), settings.wants_known
    return PixelCache(folder, limit, source, settings.channels, settings.max_pixels, known)


_NAMES = "utf-8", "surrogateescape"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class _PixelFile:
    """One file, open in one process.

    Slots are copied when they and their pixels are found whole, and of the state that the item had
    when this process first asked for it.  ``room``: bytes that may be kept before it is asked again
    whether there is any.  ``full``: nothing more is to be kept.
    """

    def __init__(self, path: Path, contents: bytes, count: int) -> None:
        head = _HEAD.pack(VERSION, contents, count)
        self._start = _SLOT * (count + 1)
        self._handle = self._appending = -1
        try:
            self._handle = _open_or_make(path, head, self._start)
            self._appending = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.utime(path)  # used last
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS) or not path.is_file():
                raise
            self._handle = os.open(path, os.O_RDONLY)  # somebody else's, or on a read-only disk
            if os.pread(self._handle, len(head), 0) != head:
                raise
        self._flat = self._mapped()
        self._slots = bytearray(_ENTRY.size * count)
        self.room, self.full = 0, self._appending < 0

    def __del__(self) -> None:
        for handle in (self._handle, self._appending):
            if handle >= 0:
                os.close(handle)

    def holds(self, index: int, state: bytes) -> bool:
        """Whether an item is kept whole and in this state; if so, `pixels` gives it from now on."""
        try:
            slot = os.pread(self._handle, _ENTRY.size + _SUM.size, _SLOT * (index + 1))
        except OSError:  # of the disk; the image may still be read
            return False
        entry, checksum = slot[: _ENTRY.size], slot[_ENTRY.size :]
        if entry[:16] != state or checksum != _SUM.pack(zlib.crc32(entry)):
            return False
        _, start, checksum_of_data, height, width, channels = _ENTRY.unpack(entry)
        data = self._bytes(start, height * width * channels)
        if data is None or zlib.crc32(data.data) != checksum_of_data:
            return False
        self._slots[_ENTRY.size * index : _ENTRY.size * (index + 1)] = entry
        return True

    def pixels(self, index: int, max_pixels: int) -> NDArray[np.uint8] | None:
        """(H, W, C) of an item that `holds` has found."""
        entry = _ENTRY.unpack_from(self._slots, _ENTRY.size * index)
        _, start, _, height, width, channels = entry
        if not 0 < height * width <= max_pixels:
            return None
        flat = self._flat[start : start + height * width * channels]
        return flat.reshape(height, width, channels)

    def append(self, index: int, state: bytes, image: Tensor) -> None:
        """Write pixels behind all others, then the slot that says where they are."""
        data = image.permute(1, 2, 0).contiguous().numpy().data.cast("B")
        written = os.write(self._appending, data)
        if written < len(data):  # no more than that had room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        start = os.lseek(self._appending, 0, os.SEEK_CUR) - len(data)
        channels, height, width = image.shape
        slot = _ENTRY.pack(state, start, zlib.crc32(data), height, width, channels)
        slot += _SUM.pack(zlib.crc32(slot))
        os.pwrite(self._handle, slot, _SLOT * (index + 1))
        self.room -= len(data)

    def _bytes(self, start: int, size: int) -> NDArray[np.uint8] | None:
        """A part of the file, which may have grown; None where it ends before."""
        end = start + size
        if len(self._flat) < end <= os.fstat(self._handle).st_size:
            self._flat = self._mapped()
        return self._flat[start:end] if self._start <= start and end <= len(self._flat) else None

    def _mapped(self) -> NDArray[np.uint8]:
        """All of the file as it is now, in memory of which a change would stay here."""
        return np.frombuffer(mmap.mmap(self._handle, 0, access=mmap.ACCESS_COPY), np.uint8)


def _open_or_make(path: Path, head: bytes, size: int) -> int:
    """An open file that begins with ``head``; a new one of ``size`` bytes where there is none."""
    with suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDWR)
        if os.pread(handle, len(head), 0) == head and os.fstat(handle).st_size >= size:
            return handle
        os.close(handle)
        path.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.new")
    try:
        with temporary.open("wb") as new:
            new.write(head)
            new.truncate(size)
        with suppress(FileExistsError):  # where another process was first
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR)
