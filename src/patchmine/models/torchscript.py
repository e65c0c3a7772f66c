"""The tensors of a TorchScript archive (OpenAI publishes CLIP in this format) without running the code inside."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
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


class _Module:
    """Stands for any module class of the archive: holds attributes, has no behaviour."""


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds attribute trees and tensors.  Every other name in the pickle is refused, so nothing of it can run."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # typed lists of numbers
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no tensor and no module")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        return torch.frombuffer(bytearray(self._archive.read(f"{self._root}/data/{key}")), dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip archive with a ``constants.pkl``, which only TorchScript writes."""
    return zipfile.is_zipfile(path) and _root(path) is not None


def _root(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        found = [PurePosixPath(name) for name in archive.namelist() if PurePosixPath(name).name == "constants.pkl"]
    return str(found[0].parent) if found else None


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names.

    Raises `pickle.UnpicklingError` for anything but modules, tensors and plain values.
    """
    root = _root(path)
    if root is None:
        raise ValueError(f"{path} is no TorchScript archive")
    with zipfile.ZipFile(path) as archive:
        return dict(_named_tensors(_TensorUnpickler(archive, root).load(), ""))


def _named_tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named_tensors(value, f"{prefix}{name}.")
