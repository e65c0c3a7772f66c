"""The calls by which a run changes a folder, counted; any one of them can be made the last, or be
refused.

Wrapped where Python's own libraries look them up: the functions of ``os``, ``open`` and the
``write`` of what it returns, and the one function of safetensors that writes.  What happens before
the first call after the last is the same on disk, so a crash before and after every call passes
through all states that a killed process can leave.
"""

# What stands below pathlib cannot be written with it.
# ruff: noqa: PTH100, PTH115, PTH116, PTH118, PTH119

from __future__ import annotations

import builtins
import errno
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CRASHED = 99  # exit code of a process that was made to crash
Action = Literal["record", "before", "half", "after", "full"]

_PLAIN = (
    "replace",
    "rename",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "symlink",
    "link",
    "chmod",
    "truncate",
    "ftruncate",
    "fsync",
)
NEEDS_ROOM = ("mkdir", "symlink", "link", "fsync", "open", "write", "save")
_MAKES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class FileSystem:
    """Counts the calls below ``root`` in this process once it is installed.

    ``action`` happens at call ``number``: a crash before it, half way through what it writes, or
    after it; "full": from there on nothing that needs room succeeds.  ``record``: where the calls
    are listed, one name a line.
    """

    root: Path
    action: Action = "record"
    number: int = -1
    record: Path | None = None
    count: int = 0
    _files: dict[int, str] = field(default_factory=dict)

    def install(self) -> None:
        """Wrap the calls; for the rest of the process."""
        import safetensors.torch

        self._root = os.path.realpath(self.root)
        self._open, self._log = (
            os.open,
            None if self.record is None else self.record.open("w", encoding="utf-8"),
        )
        for name in _PLAIN:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        os.open = self._os_open  # type: ignore[assignment]
        opened = builtins.open
        builtins.open = io.open = lambda *given, **named: self._opened(opened, *given, **named)  # type: ignore[assignment]
        save = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = lambda tensors, path, **named: self._saved(
            save, tensors, path, **named
        )

    def _call(
        self, name: str, path: str, do: Callable[[], Any], half: Callable[[], Any] | None = None
    ) -> Any:
        number, self.count = self.count, self.count + 1
        if self._log is not None:
            self._log.write(json.dumps([name, os.path.basename(path)]) + "\n")
            self._log.flush()
        if self.action == "full" and number >= self.number and name in NEEDS_ROOM:
            if half is not None:
                half()
            raise _full(name, path)
        if number != self.number or self.action in ("full", "record"):
            return do()
        if self.action == "half" and half is not None:
            half()
        elif self.action == "after":
            with suppress(OSError):  # what fails leaves the folder as it was
                do()
        os._exit(CRASHED)

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            path = self._path(given[0], named.get("dir_fd", named.get("src_dir_fd")))
            if name in ("symlink", "link", "replace", "rename"):
                path = self._path(given[1], None)
            if not path.startswith(self._root):
                return original(*given, **named)
            return self._call(name, path, lambda: original(*given, **named))

        return call

    def _path(self, given: Any, folder: int | None) -> str:
        if isinstance(given, int):
            return _target(given)
        path = os.fsdecode(given)
        return os.path.join(_target(folder), path) if folder is not None else os.path.abspath(path)

    def _os_open(self, path: Any, flags: int, *given: Any, **named: Any) -> int:
        place = self._path(path, named.get("dir_fd"))
        if not flags & _MAKES or not place.startswith(self._root):
            return self._open(path, flags, *given, **named)
        return int(self._call("open", place, lambda: self._open(path, flags, *given, **named)))

    def _opened(
        self, original: Callable[..., Any], file: Any, mode: str = "r", *given: Any, **named: Any
    ) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return original(file, mode, *given, **named)
        place = self._path(file, None)
        if not place.startswith(self._root):
            return original(file, mode, *given, **named)
        return _File(
            self._call("open", place, lambda: original(file, mode, *given, **named)), self, place
        )

    def _saved(self, original: Callable[..., Any], tensors: Any, path: Any, **named: Any) -> Any:
        def half() -> None:
            original(tensors, path, **named)
            with self_open(path, "rb+") as file:
                file.truncate(os.stat(path).st_size // 2)

        self_open, place = io.FileIO, self._path(path, None)
        if not place.startswith(self._root):
            return original(tensors, path, **named)
        return self._call("save", place, lambda: original(tensors, path, **named), half)


class _File:
    """A file that was opened for writing."""

    def __init__(self, file: Any, system: FileSystem, path: str) -> None:
        self._file, self._system, self._place = file, system, path

    def write(self, data: Any) -> Any:
        """One call; half of it is what fits."""

        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._system._call("write", self._place, lambda: self._file.write(data), half)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _target(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def _full(name: str, path: str) -> Exception:
    if name == "save":
        from safetensors import SafetensorError

        return SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def calls(record: Path) -> list[tuple[str, str]]:
    """What was recorded: (call, name of the file)."""
    return [tuple(json.loads(line)) for line in record.read_text(encoding="utf-8").splitlines()]
