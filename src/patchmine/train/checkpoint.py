"""One safetensors file per checkpoint: weights, optimizer state and a little JSON.  Reading one
never executes code.

``checkpoints/step-00000123.safetensors`` holds ``model.NAME``, ``optimizer.PARAMETER.KEY`` and, in
the metadata, the step, the library versions, the run's fingerprints and checksums.  It knows
nothing of ranks: any number of processes can go on from it. A file appears under its name complete
or not at all, and only with a state that is finite. ``checkpoints/last`` points to the newest, for
people; patchmine itself lists the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchmine.disk import remedy, replacing, sweep, system_errors
from patchmine.errors import Say, UserError, foreign_parser, reason_of

FORMAT = 2  # of the head; 1 had no checksum over itself, over shapes and over types

SCRATCH = ".writing"

_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_PARTS = ("model", "optimizer")

Parts = Mapping[str, Mapping[str, Tensor]]


class DamagedCheckpointError(Exception):
    """A checkpoint file that cannot be read to its end or whose contents were altered."""


class NotFiniteError(UserError):
    """A state that is not saved because it holds NaN or infinity."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read from ``path``: tensors on the CPU, and ``facts`` as they were given to
    ``save``.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, oldest step first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("step-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def refuse_shared(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError when two names share memory: such a file could not be written or would come
    apart when read.
    """
    owner: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        first = owner.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), name)
        if first != name:
            raise ValueError(
                f"{first!r} and {name!r} are one tensor; a tensor needs one owner to be saved"
            )


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write the checkpoint of ``step`` atomically, and keep the newest ``keep`` files.

    ``last`` points to it, ``best`` to the file of step ``best``, which is kept too.  ``facts`` must
    be JSON.

    Raises:
        NotFiniteError: the state is not finite; like below, earlier checkpoints are untouched.
        UserError: the file cannot be written (a full disk, say).
    """
    path = _file(folder, step)
    parts = {"model": _on_cpu(model), "optimizer": _on_cpu(optimizer)}
    if bad := not_finite(parts):
        good = newest_finite(folder)
        kept = f"the last good state is {good}" if good else "there is no earlier good state"
        raise NotFiniteError(
            f"after step {step} {bad[0]} holds values that are not finite ({len(bad)} of "
            f"{sum(map(len, parts.values()))} tensors do), so this state was not saved; {kept}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)  # what killed processes left half written
        if path.is_dir():
            path.rename(path.with_name(f"{path.name}.{os.getpid()}.folder"))
        # safetensors first writes to files with names of its own: in a folder of ours, which goes
        # too when we are killed.
        scratch = folder / f"{SCRATCH}.{os.getpid()}"
        scratch.mkdir()
        try:
            with replacing(path) as new:
                _write(scratch / path.name, step, parts, facts)
                (scratch / path.name).rename(new)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} could not be written ({error.strerror or reason_of(error)}); "
            f"{remedy(error)}, then go on with `patchmine resume {folder.parent}`; earlier "
            "checkpoints are intact"
        ) from error
    point(path, "last")
    if best is not None:
        point(_file(folder, best), "best")
    paths = list_checkpoints(folder)
    past = paths[: paths.index(path) + 1]
    # Those beyond this step are faulty ones, which resuming passed over.
    for old in (*past[:-keep], *paths[len(past) :]):
        if best is None or old != _file(folder, best):
            with suppress(OSError):  # a folder, or one that another process removed
                old.unlink()
    return path


def point(path: Path, name: str) -> None:
    """Make ``name`` beside a checkpoint a link to it, or a file with its name without links."""
    link = path.with_name(name)
    # Nobody here reads it and the checkpoint stands already, so that failing at it must not end the
    # run.
    try:
        with replacing(link) as new:
            new.symlink_to(path.name)
    except OSError:
        with suppress(OSError), replacing(link) as new:
            new.write_text(path.name + "\n", encoding="utf-8")


def point_again(start: Checkpoint) -> None:
    """Put ``last`` and ``best`` right beside the checkpoint that a run goes on from.

    A kill or a full disk may have kept them at older ones.
    """
    point(start.path, "last")
    best = start.facts.get("best")
    step = best.get("step") if isinstance(best, dict) else None
    if type(step) is int and (file := _file(start.path.parent, step)).is_file():
        point(file, "best")


def load(path: Path, *, parts: tuple[str, ...] = _PARTS) -> Checkpoint:
    """Read a checkpoint, or only its ``parts`` ("model", "optimizer").

    Raises:
        DamagedCheckpointError: anything in it is not as it was written, or it is not the step that
        its name says.
        UserError: a newer version wrote it.
    """
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    with foreign_parser(DamagedCheckpointError, DamagedCheckpointError):
        path = _followed(path)  # links may lead to each other
        if not path.is_file():  # opening a pipe would wait for ever
            raise DamagedCheckpointError("it is no file" if path.exists() else "it is missing")
        with safe_open(path, framework="pt", device="cpu") as file:
            head = _read_head(file.metadata(), path)
            for name in file.keys():  # noqa: SIM118  (no mapping, only looks like one)
                part, rest = name.split(".", 1)
                if part not in _PARTS:
                    raise DamagedCheckpointError(f"its tensor {name} belongs to nothing")
                if part in parts:
                    tensors[part][rest] = file.get_tensor(name)
        for part in parts:
            if _checksum(tensors[part], head["format"]) != head["crc32"][part]:
                raise DamagedCheckpointError(f"checksum of {part} differs")
    return Checkpoint(path, head["step"], tensors["model"], tensors["optimizer"], head["facts"])


def load_newest(
    folder: Path, say: Say, *, parts: tuple[str, ...] = _PARTS, finite: bool = False
) -> Checkpoint:
    """The newest readable checkpoint; others are passed over with a warning that names both.

    ``finite``: states with NaN or infinity, as earlier versions could write them, are passed over
    too.  Raises UserError where there is none.
    """
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            found = load(path, parts=parts)
            fault = _fault_of(found) if finite else ""
        except DamagedCheckpointError as error:
            fault = f"is damaged ({error})"
        if not fault:
            for what in passed_over:
                say(f"warning: checkpoint {what}; going on from {path} instead")
            return found
        passed_over.append(f"{path} {fault}")
    if passed_over:
        raise UserError(
            f"no usable checkpoint in {folder} ({'; '.join(passed_over)}); start the run anew in "
            "another folder"
        )
    raise UserError(
        f"no checkpoint in {folder}; the run stopped before its first one, start it anew"
    )


def newest_finite(folder: Path) -> Path | None:
    """The newest file from which training can go on, read to its end, or None."""
    for path in reversed(list_checkpoints(folder)):
        with suppress(DamagedCheckpointError, UserError):
            if not _fault_of(load(path)):
                return path
    return None


def not_finite(parts: Parts) -> list[str]:
    """Names of the tensors, as in a checkpoint file, that hold a value which is not finite."""
    return [
        f"{part}.{name}"
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all())
    ]


def versions() -> dict[str, str]:
    """Versions of the libraries that shape the numbers."""
    found = {}
    for name in ("patchmine", "torch", "timm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _fault_of(found: Checkpoint) -> str:
    bad = not_finite({"model": found.model, "optimizer": found.optimizer})
    return f"holds values that are not finite (in {bad[0]})" if bad else ""


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write(path: Path, step: int, parts: Parts, facts: Mapping[str, Any]) -> None:
    crc32 = {part: _checksum(tensors) for part, tensors in parts.items()}
    head = {
        "format": FORMAT,
        "step": step,
        "versions": versions(),
        "crc32": crc32,
        "facts": dict(facts),
    }
    text = json.dumps(head)
    flat = {
        f"{part}.{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    with system_errors(path):
        save_file(
            flat, path, metadata={"patchmine": text, "crc32": f"{zlib.crc32(text.encode()):08x}"}
        )


def _read_head(kept: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
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
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != head["step"]:
        raise DamagedCheckpointError(f"it holds step {head['step']}, not that of its name")
    return head


def _checksum(tensors: Mapping[str, Tensor], version: int = FORMAT) -> int:
    """CRC-32 over names and bytes, and since format 2 over types and shapes."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]) if version > 1 else name
        value = zlib.crc32(head.encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _followed(path: Path) -> Path:
    """The checkpoint that ``last`` points to, as a link or as a small file; any other path as it
    is.
    """
    if _NAME.fullmatch(path.name):
        return path
    if path.is_symlink():
        return path.resolve()
    if path.is_file() and path.stat().st_size <= 100:
        name = path.read_text(encoding="utf-8", errors="replace").strip()
        return path.with_name(name) if _NAME.fullmatch(name) else path
    return path
