"""The tensors of a TorchScript archive (OpenAI publishes CLIP in this format) without running the
code inside.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_MOST_MODULES = 2**15


class _Module:
    """Stands for any module class of an archive: holds attributes, has no behaviour."""


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds attribute trees and tensors.  Every other name in the pickle is refused, so nothing
    of it can run.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        # Of this archive alone: a pickle can set attributes of the classes and functions that it is
        # given.
        self._module = type("Module", (_Module,), {})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return self._module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return partial(_rebuild)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # typed lists of numbers
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no tensor and no module")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if (key, dtype) not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key, dtype] = (
                torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        return self._storages[key, dtype]


def _rebuild(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)


def check_archive(path: Path) -> None:
    """Raise `zipfile.BadZipFile` for an archive whose members claim more bytes than the file has.

    torch packs nothing, so that such an archive was not written by it, and unpacking it could fill
    the memory.
    """
    with zipfile.ZipFile(path) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
    if claimed > path.stat().st_size:
        raise zipfile.BadZipFile(
            f"its parts claim {claimed:,} bytes and the file has {path.stat().st_size:,}"
        )


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip archive with a ``constants.pkl``, which only TorchScript writes."""
    return zipfile.is_zipfile(path) and _root(path) is not None


def _root(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        found = [
            PurePosixPath(name)
            for name in archive.namelist()
            if PurePosixPath(name).name == "constants.pkl"
        ]
    return str(found[0].parent) if found else None


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names.

    Raises `pickle.UnpicklingError` for anything but modules, tensors and plain values.
    """
    root = _root(path)
    if root is None:
        raise ValueError(f"{path} is no TorchScript archive")
    with zipfile.ZipFile(path) as archive:
        return dict(_named_tensors(_TensorUnpickler(archive, root).load()))


def _named_tensors(module: _Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors by dotted names.  Raises ValueError for modules that hold each other, or one many
    times over.
    """
    waiting = deque([("", module)])
    num_modules = 0
    while waiting:
        prefix, inner = waiting.popleft()
        num_modules += 1
        if num_modules > _MOST_MODULES:
            raise ValueError(f"it has more than {_MOST_MODULES:,} modules")
        for name, value in vars(inner).items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
