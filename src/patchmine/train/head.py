"""What stands beside the tensors of a checkpoint's file: its step, checksums and facts."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchmine.errors import UserError

FORMAT = 2  # of the head; 1 had no checksum over itself, over shapes and over types
NAME = re.compile(r"step-(\d{8,})(\.safetensors)?")  # of a checkpoint, a file or a folder


class DamagedCheckpointError(Exception):
    """A checkpoint file that cannot be read to its end or whose contents were altered."""


def versions() -> dict[str, str]:
    """Versions of the libraries that shape the numbers."""
    found = {}
    for name in ("patchmine", "torch", "timm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def read_head(kept: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    """What was written beside the tensors, if it is whole and belongs under this name."""
    if not kept or "patchmine" not in kept:
        raise DamagedCheckpointError("it lacks the head of a checkpoint")
    text = kept["patchmine"]
    if "crc32" in kept and kept["crc32"] != f"{zlib.crc32(text.encode()):08x}":
        raise DamagedCheckpointError("checksum of its head differs")
    head: dict[str, Any] = json.loads(text)
    version = head["format"]
    if "crc32" in kept and isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{path} was written by a newer patchmine (format {version}): update patchmine to "
            "read it"
        )
    if version != (FORMAT if "crc32" in kept else 1):
        raise DamagedCheckpointError(f"it has no known format ({version!r:.20})")
    wanted = {"step": int, "versions": dict, "crc32": dict, "facts": dict}
    if wrong := [key for key, kind in wanted.items() if type(head.get(key)) is not kind]:
        raise DamagedCheckpointError(f"its head lacks {wrong[0]}")
    if not isinstance(head["facts"].get("identity", {}), dict):
        raise DamagedCheckpointError("its head lacks facts.identity")
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != head["step"]:
        raise DamagedCheckpointError(f"it holds step {head['step']}, not that of its name")
    return head


def checksum(tensors: Mapping[str, Tensor], version: int = FORMAT) -> int:
    """CRC-32 over names and bytes, and since format 2 over types and shapes."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]) if version > 1 else name
        value = zlib.crc32(head.encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value
