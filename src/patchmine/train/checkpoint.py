"""One safetensors file per checkpoint: weights, optimizer state and a little JSON.  Reading one never executes code.

``checkpoints/step-00000123.safetensors`` holds ``model.NAME``, ``optimizer.PARAMETER.KEY`` and, in the metadata, the
step, the library versions, the run's fingerprints and checksums.  It knows nothing of ranks: any number of processes
can go on from it. A file appears under its name complete or not at all; ``checkpoints/last`` is a link to the newest.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchmine.disk import settle
from patchmine.errors import UserError

_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_PARTS = ("model", "optimizer")


class DamagedCheckpointError(Exception):
    """A checkpoint file that cannot be read to its end or whose contents were altered."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read from ``path``: tensors on the CPU, and ``facts`` as they were given to ``save``."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, oldest step first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def refuse_shared(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError when two names share memory: such a file could not be written or would come apart when read."""
    owner: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        first = owner.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), name)
        if first != name:
            raise ValueError(f"{first!r} and {name!r} are one tensor; a tensor needs one owner to be saved")


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` atomically, point ``last`` to it and keep the newest ``keep`` files.

    ``facts`` must be JSON.  Raises UserError when the file cannot be written (a full disk, say); the checkpoints that
    were there before are then untouched.
    """
    path = folder / f"step-{step:08d}.safetensors"
    writing = folder / ".writing"
    try:
        shutil.rmtree(writing, ignore_errors=True)  # what a killed process left behind
        writing.mkdir(parents=True)
        _write(writing / path.name, step, {"model": model, "optimizer": optimizer}, facts)
        (writing / path.name).replace(path)
        settle(folder)
        (writing / "last").symlink_to(path.name)
        (writing / "last").replace(folder / "last")
        settle(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path} could not be written ({_reason(error)}); make room there, then go on with"
            f" `patchmine resume {folder.parent}`; earlier checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    _forget(folder, step, keep)
    return path


def load(path: Path, *, parts: tuple[str, ...] = _PARTS) -> Checkpoint:
    """Read a checkpoint, or only its ``parts`` ("model", "optimizer"); raises DamagedCheckpointError."""
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            head = json.loads(file.metadata()["patchmine"])
            for name in file.keys():  # noqa: SIM118  (no mapping, only looks like one)
                part, rest = name.split(".", 1)
                if part in parts:
                    tensors[part][rest] = file.get_tensor(name)
        altered = [part for part in parts if _checksum(tensors[part]) != head["crc32"][part]]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(_reason(error)) from error
    if altered:
        raise DamagedCheckpointError(f"checksum of {altered[0]} differs")
    return Checkpoint(path, int(head["step"]), tensors["model"], tensors["optimizer"], head["facts"])


def load_newest(folder: Path, say: Callable[[str], None], *, parts: tuple[str, ...] = _PARTS) -> Checkpoint:
    """The newest readable checkpoint of a folder; damaged ones are passed over with a warning that names both."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            found = load(path, parts=parts)
        except DamagedCheckpointError as error:
            damaged.append((path, str(error)))
            continue
        for bad, reason in damaged:
            say(f"warning: checkpoint {bad} is damaged ({reason}); going on from {path} instead")
        return found
    if damaged:
        names = "; ".join(f"{path}: {reason}" for path, reason in damaged)
        raise UserError(
            f"no usable checkpoint in {folder}, all are damaged ({names}); start the run anew in another folder"
        )
    raise UserError(f"no checkpoint in {folder}; the run stopped before its first one, start it anew")


def versions() -> dict[str, str]:
    """Versions of the libraries that shape the numbers."""
    found = {}
    for name in ("patchmine", "torch", "timm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _write(path: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    on_cpu = {
        part: {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    crc32 = {part: _checksum(tensors) for part, tensors in on_cpu.items()}
    head = {"format": 1, "step": step, "versions": versions(), "crc32": crc32, "facts": dict(facts)}
    flat = {f"{part}.{name}": tensor for part, tensors in on_cpu.items() for name, tensor in tensors.items()}
    save_file(flat, path, metadata={"patchmine": json.dumps(head)})
    settle(path)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names and bytes; a file that the disk damaged has the right length and wrong numbers."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _forget(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` files, and those beyond ``step``: damaged ones, which resuming passed over."""
    here = folder / f"step-{step:08d}.safetensors"
    paths = list_checkpoints(folder)
    past = paths[: paths.index(here) + 1]
    for path in (*past[:-keep], *paths[len(past) :]):
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
