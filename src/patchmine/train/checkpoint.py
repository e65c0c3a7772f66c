"""One safetensors file per checkpoint: weights, optimizer state and a little JSON.  Reading one
never executes code.

``checkpoints/step-00000123.safetensors`` holds ``model.NAME``, ``optimizer.PARAMETER.KEY`` and, in
the metadata, the step, the library versions, the run's fingerprints and checksums.  It knows
nothing of ranks: any number of processes can go on from it. A file appears under its name complete
or not at all, and only with a state that is finite. ``checkpoints/last`` points to the newest, for
people; patchmine itself lists the files.

Of a run whose weights are sharded it is a folder ``step-00000123`` of such files, one of each
process: of most tensors a file holds some rows, which its head tells.  Whoever reads one gets the
whole tensors, so that any number of processes can go on from it too.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchmine.errors import Say, UserError, foreign_parser, reason_of
from patchmine.system.disk import remedy, replacing, settle, sweep, system_errors
from patchmine.train.head import FORMAT, NAME, DamagedCheckpointError, checksum, read_head, versions
from patchmine.train.pieces import Piece, joined, on_host, part_files

SCRATCH = ".writing"

_PARTS = ("model", "optimizer")

Parts = Mapping[str, Mapping[str, Tensor]]


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
    """The checkpoints of a folder, files or folders of parts, oldest step first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("step-*")
        if (match := NAME.fullmatch(path.name))
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
        raise not_finite_error(folder, step, bad, sum(map(len, parts.values())))
    with written(path):
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
                write_file(scratch / path.name, step, parts, facts)
                (scratch / path.name).rename(new)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _settle_others(path, keep, best)
    return path


def publish(scratch: Path, path: Path, *, keep: int, best: int | None = None) -> None:
    """Give a folder of parts, complete and on the disk, its name, and do what `save` does then.

    Raises OSError.
    """
    _put_aside(path)
    scratch.rename(path)
    settle(path.parent)
    sweep(path.parent)
    _settle_others(path, keep, best)


def not_finite_error(folder: Path, step: int, bad: Sequence[str], count: int) -> NotFiniteError:
    """What is said where tensors named ``bad``, of so many, are not finite."""
    good = newest_finite(folder)
    kept = f"the last good state is {good}" if good else "there is no earlier good state"
    return NotFiniteError(
        f"after step {step} {bad[0]} holds values that are not finite ({len(bad)} of "
        f"{count} tensors do), so this state was not saved; {kept}"
    )


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around the writing of a checkpoint: an OSError becomes a UserError with the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"checkpoint {path} could not be written ({error.strerror or reason_of(error)}); "
            f"{remedy(error)}, then go on with `patchmine resume {path.parent.parent}`; earlier "
            "checkpoints are intact"
        ) from error


def _settle_others(path: Path, keep: int, best: int | None) -> None:
    """Let ``last`` and ``best`` point to what they mean now, and remove what is not kept."""
    folder = path.parent
    point(path, "last")
    chosen = None if best is None else _of_step(folder, best)
    if chosen is not None:
        point(chosen, "best")
    paths = list_checkpoints(folder)
    past = paths[: paths.index(path) + 1]
    # Those beyond this step are faulty ones, which resuming passed over.
    for old in (*past[:-keep], *paths[len(past) :]):
        if old == chosen:
            continue
        with suppress(OSError):  # a folder that is not ours, or what another process removed
            if _is_of_parts(old):
                shutil.rmtree(_put_aside(old), ignore_errors=True)
            else:
                old.unlink()


def _of_step(folder: Path, step: int) -> Path | None:
    """The checkpoint of a step, of whichever kind."""
    names = (f"step-{step:08d}.safetensors", f"step-{step:08d}")
    return next((folder / name for name in names if (folder / name).exists()), None)


def _is_of_parts(path: Path) -> bool:
    return path.suffix == "" and path.is_dir()


def _put_aside(path: Path) -> Path:
    """Another name for what stands at ``path``, if anything does, under which it is swept away."""
    aside = path.with_name(f".{path.name}.old-{os.getpid()}")
    if os.path.lexists(path):
        path.rename(aside)
    return aside


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
    if type(step) is int and (file := _of_step(start.path.parent, step)) is not None:
        point(file, "best")


def load(path: Path, *, parts: tuple[str, ...] = _PARTS) -> Checkpoint:
    """Read a checkpoint, or only its ``parts`` ("model", "optimizer").

    Raises:
        DamagedCheckpointError: anything in it is not as it was written, or it is not the step that
        its name says.
        UserError: a newer version wrote it.
    """
    with foreign_parser(DamagedCheckpointError, DamagedCheckpointError):
        path = _followed(path)  # links may lead to each other
        if _is_of_parts(path):
            read = [_read(file, path, parts) for file in part_files(path)]
            head = read[0][0]
            tensors = joined([(own["part"], held) for own, held in read])
        else:
            head, tensors = _read(path, path, parts)
            if "part" in head:
                raise DamagedCheckpointError("it is a part of a checkpoint, which is its folder")
    return Checkpoint(path, head["step"], tensors["model"], tensors["optimizer"], head["facts"])


def _read(
    path: Path, named: Path, parts: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The head and the tensors of one file of the checkpoint ``named``."""
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    if not path.is_file():  # opening a pipe would wait for ever
        raise DamagedCheckpointError("it is no file" if path.exists() else "it is missing")
    with safe_open(path, framework="pt", device="cpu") as file:
        head = read_head(file.metadata(), named)
        for name in file.keys():  # noqa: SIM118  (no mapping, only looks like one)
            part, rest = name.split(".", 1)
            if part not in _PARTS:
                raise DamagedCheckpointError(f"its tensor {name} belongs to nothing")
            if part in parts:
                tensors[part][rest] = file.get_tensor(name)
    of = "" if path == named else f" in {path.name}"
    for part in parts:
        if checksum(tensors[part], head["format"]) != head["crc32"][part]:
            raise DamagedCheckpointError(f"checksum of {part} differs{of}")
    return head, tensors


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


def _fault_of(found: Checkpoint) -> str:
    bad = not_finite({"model": found.model, "optimizer": found.optimizer})
    return f"holds values that are not finite (in {bad[0]})" if bad else ""


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: on_host(name, tensor) for name, tensor in tensors.items()}


def write_file(
    path: Path, step: int, parts: Parts, facts: Mapping[str, Any], piece: Piece | None = None
) -> None:
    """One file of a checkpoint: all of it, or this ``piece``.  Raises OSError."""
    crc32 = {part: checksum(tensors) for part, tensors in parts.items()}
    head = {
        "format": FORMAT,
        "step": step,
        "versions": versions(),
        "crc32": crc32,
        "facts": dict(facts),
    }
    if piece is not None:
        head["part"] = piece.as_json()
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


def _followed(path: Path) -> Path:
    """The checkpoint that ``last`` points to, as a link or as a small file; any other path as it
    is.
    """
    if NAME.fullmatch(path.name):
        return path
    if path.is_symlink():
        return path.resolve()
    if path.is_file() and path.stat().st_size <= 100:
        name = path.read_text(encoding="utf-8", errors="replace").strip()
        return path.with_name(name) if NAME.fullmatch(name) else path
    return path
