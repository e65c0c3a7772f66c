"""Files behind addresses that fsspec reads (``s3://``, ``gs://``, ``https://``, ...).

They are read in blocks, which stay on a disk (`blocks`).  A file is known by its size and by what
its store says of its state, an ETag for instance; after every fetch these must be as they were.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from patchmine.data.sources.blocks import Blocks
from patchmine.data.sources.stored import Readable
from patchmine.errors import UserError, foreign_parser, reason_of, shown_name

T = TypeVar("T")

BLOCK = 8 << 20
"""Bytes that are fetched and kept together."""

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a lost connection is tried again."""

_AT_ONCE = 16  # files that are asked for their state
_BUFFER = 1 << 20
# What tells one state of a file from another, by the names that the packages below fsspec give it.
_STATES = (
    *("ETag", "etag", "generation", "md5Hash", "content_md5", "Content-MD5", "mtime"),
    *("LastModified", "last_modified", "Last-Modified", "updated", "created"),
)
# Errors that pass and such that do not, by their types or the names of those, and answers of HTTP.
_LOST, _REFUSED = (
    (ConnectionError, TimeoutError),
    (ImportError, PermissionError, NotImplementedError),
)
_PASSING = re.compile(r"connect|timeout", re.IGNORECASE)
_LASTING = re.compile(r"credential|auth|permission|forbidden|profile", re.IGNORECASE)
_PASSING_STATUS = {408, 425, 429}

RESUME = "then `patchmine resume` goes on from the last checkpoint"


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address, as it was when its source was opened."""

    name: str
    size: int
    state: str
    kept: Blocks

    @property
    def buffer(self) -> int:
        """Bytes that are best read at once by who reads on and on."""
        return _BUFFER

    def read(self, start: int, length: int) -> bytes:
        """Bytes from ``start`` on, fewer where the file ends.

        Raises:
            UserError: it is gone or another one, or cannot be reached.
        """
        number, inside = divmod(start, BLOCK)
        if start + length <= self.size and 0 < length <= BLOCK - inside:
            return self._part(number, inside, length)  # of one block, as nearly all images are
        return b"".join(self._parts(start, min(start + length, self.size)))

    def fetch(self) -> None:
        """Fetch what is not kept yet, as far as there is room for it."""
        for number in range(-(-self.size // BLOCK)):
            size = min(BLOCK, self.size - number * BLOCK)
            if not self.kept.holds(self._key, number, size):
                if not self.kept.takes(size):
                    return
                self.kept.keep(self._key, number, self._fetched(number * BLOCK, size))

    def reader(self) -> Readable:
        """The file: nothing of it stays open."""
        return self

    def was_replaced(self) -> bool:
        """Never: `read` raises where it was."""
        return False

    def identity(self) -> bytes | None:
        """Address, size and state."""
        return f"{self.name}\0{self.size}\0{self.state}".encode("utf-8", "surrogateescape")

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(self.identity() or b"").hexdigest()[:32]

    def _parts(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes between, block by block."""
        while start < end:
            number, inside = divmod(start, BLOCK)
            until = min(end, (number + 1) * BLOCK)
            yield self._part(number, inside, until - start)
            start = until

    def _part(self, number: int, inside: int, length: int) -> bytes:
        """Bytes of one block, which is fetched and kept whole while there is room for it."""
        start = number * BLOCK
        size = min(BLOCK, self.size - start)
        part = self.kept.read(self._key, number, size, inside, length)
        if part is not None:
            return part
        if not self.kept.takes(size):
            return self._fetched(start + inside, length)
        block = self._fetched(start, size)
        self.kept.keep(self._key, number, block)
        return block[inside : inside + length]

    def _fetched(self, start: int, length: int) -> bytes:
        def work(files: Any, path: str) -> bytes:
            data: bytes = files.cat_file(path, start=start, end=start + length)
            size, state = _state(files.info(path))
            if (size, state) != (self.size, self.state):
                raise UserError(self._changed(size))
            if len(data) != length:
                raise ConnectionError(f"{len(data):,} bytes came where {length:,} were asked for")
            return data

        try:
            return attempted(self.name, work)
        except FileNotFoundError as error:
            what = "is gone: it was there when this source was opened"
            remedy = f"put it back, {RESUME}; or start again without it"
            raise UserError(f"{shown_name(self.name)} {what}; {remedy}") from error

    def _changed(self, size: int) -> str:
        how = f"it had {self.size:,} bytes and has {size:,}" if size != self.size else "same size"
        what = f"was changed since this source was opened ({how})"
        remedy = f"put the old one back, {RESUME}; or start a new run with the new one"
        return f"{shown_name(self.name)} {what}; {remedy}"


def remote_files(addresses: Sequence[str], kept: Blocks) -> list[RemoteFile]:
    """The files behind addresses as they are now, asked for side by side.

    Raises:
        UserError: one is not there, or cannot be reached.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(lambda address: _remote_file(address, kept), addresses))


def _remote_file(address: str, kept: Blocks) -> RemoteFile:
    try:
        info = attempted(address, lambda files, path: files.info(path))
    except FileNotFoundError as error:
        raise UserError(f"there is nothing at {shown_name(address)}") from error
    if info.get("type") == "directory":
        raise UserError(f"{shown_name(address)} is a folder where a file is meant")
    size, state = _state(info)
    if size < 0:
        raise UserError(f"{shown_name(address)}: its server does not tell how large it is")
    return RemoteFile(address, size, state, kept)


def _state(info: Mapping[str, Any]) -> tuple[int, str]:
    """Size (-1 where it is not told) and state of a file, of what fsspec tells of it."""
    size = info.get("size")
    known = next((f"{name}={info[name]}" for name in _STATES if info.get(name)), "")
    return (-1 if size is None else int(size)), known


def attempted(address: str, work: Callable[[Any, str], T]) -> T:
    """What ``work(file system, path)`` gives, tried again after growing waits.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be opened, or not be reached even after the last wait.
    """
    with foreign_parser(lambda why: _refusal(address, why)):
        files, path = located(address)
    trouble, began = _TroubleError(), time.monotonic()
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        try:
            with foreign_parser(_TroubleError):
                return work(files, path)
        except _TroubleError as error:
            trouble = error
        kind = _kind_of(trouble)
        if kind == "missing":
            raise FileNotFoundError(address) from trouble
        if kind == "refused":
            raise _refusal(address, str(trouble)) from trouble
    taken = time.monotonic() - began  # the packages below fsspec wait and try by themselves, too
    tries = f"{len(WAITS) + 1} tries within {taken:.0f} seconds failed, the last with"
    what = f"{shown_name(address)} cannot be read ({tries}: {trouble})"
    raise UserError(f"{what}; see to the connection, {RESUME}") from trouble


def located(address: str) -> tuple[Any, str]:
    """File system and path of an address; fsspec keeps one for each process and thread."""
    try:
        core = importlib.import_module("fsspec.core")
        found: tuple[Any, str] = core.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:  # whose text names the package
        what = f"{shown_name(address)} cannot be opened: a package is missing"
        raise UserError(f"{what}. {reason_of(error)}") from error
    return found


class _TroubleError(Exception):
    """What fsspec, or a package below it, raised."""


def _refusal(address: str, why: str) -> UserError:
    remedy = "credentials and endpoints are settings of fsspec's package for such addresses"
    return UserError(f"{shown_name(address)} cannot be opened ({why}); {remedy}")


def _kind_of(trouble: BaseException) -> str:
    """Whether a file is "missing", access to it is "refused", or a connection was "lost"."""
    links, link = list[BaseException](), trouble.__cause__
    while link is not None:
        links.append(link)
        link = link.__cause__
    status = next((_status(each) for each in links if isinstance(_status(each), int)), None)
    if status is not None:  # of HTTP, whose file system calls every trouble a missing file
        if status in (404, 410):
            return "missing"
        return "refused" if 400 <= status < 500 and status not in _PASSING_STATUS else "lost"
    if any(isinstance(each, _LOST) or _PASSING.search(type(each).__name__) for each in links):
        return "lost"
    if any(isinstance(each, FileNotFoundError) for each in links):
        return "missing"
    return "refused" if any(map(_is_refusal, links)) else "lost"


def _is_refusal(error: BaseException) -> bool:
    """By its type, or as gcsfs tells it, which has no type for that."""
    told = isinstance(error, OSError) and str(error).startswith("Forbidden")
    return told or isinstance(error, _REFUSED) or bool(_LASTING.search(type(error).__name__))


def _status(error: BaseException) -> Any:
    """That of an answer of HTTP, as aiohttp, Azure's packages and gcsfs call it.

    In other packages a ``code`` is something else: aiohttp has one of 400 where an answer is cut.
    """
    name = "code" if type(error).__name__ == "HttpError" else "status_code"
    return getattr(error, "status", getattr(error, name, None))
