"""Writing a checkpoint of which each process holds a part."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from patchmine.errors import UserError
from patchmine.system.disk import settle, sweep
from patchmine.train import checkpoint
from patchmine.train.engine import Engine
from patchmine.train.pieces import Host, PartTensors, Piece, on_host, own_pieces

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
"""`Engine.gather`, or the like over other connections."""


@dataclass(frozen=True)
class PartsSaver:
    """`checkpoint.save` by all processes together, each of which writes what it holds.

    The folder ``step-00000123`` appears under its name when all files of it are on the disk, by a
    rename of the first process.

    Args:
        engine: the processes.
        folder: of the checkpoints.
        step: as in `checkpoint.save`; so are ``facts``, ``keep`` and ``best``.
        before: called in the first process before anything is written.
        gather: by which the processes talk; None: the engine's.
    """

    engine: Engine
    folder: Path
    step: int
    facts: Mapping[str, Any]
    keep: int
    best: int | None = None
    before: Callable[[], None] = lambda: None
    gather: Gather | None = None

    @property
    def path(self) -> Path:
        """Of the checkpoint."""
        return self.folder / f"step-{self.step:08d}"

    def save(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Write it.  Raises, in all processes alike, what `checkpoint.save` raises."""
        self.taken({"model": model, "optimizer": optimizer})()

    def taken(self, state: PartTensors, host: Host = on_host) -> Callable[[], None]:
        """Take what this process holds of the state now; gives what writes it, as `save` does."""
        parts, rows = own_pieces(state, first=self.engine.is_main, host=host)
        count = sum(map(len, state.values()))
        return lambda: self._save(parts, rows, count)

    def _save(self, parts: PartTensors, rows: dict[str, tuple[int, int]], count: int) -> None:
        engine, gather = self.engine, self.gather or self.engine.gather
        bad = [name for names in gather(checkpoint.not_finite(parts)) for name in names]
        if bad:
            raise checkpoint.not_finite_error(self.folder, self.step, bad, count)
        writes = engine.is_main or any(parts.values())
        writers = [rank for rank, one in enumerate(gather(writes)) if one]
        name, saving = self._together(self._begin)[0]
        scratch = self.folder / name
        try:
            piece = None
            if engine.rank in writers:
                piece = Piece(writers.index(engine.rank), len(writers), saving, rows)
            files = self._together(lambda: self._write(scratch, parts, piece))
            self._together(lambda: self._publish(scratch, files))
        finally:
            if engine.is_main:
                shutil.rmtree(scratch, ignore_errors=True)

    def _begin(self) -> tuple[str, str]:
        """The name of a folder to write to, and one that this saving is known by."""
        if not self.engine.is_main:
            return "", ""
        self.before()
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)  # what killed processes left half written
        name = f"{checkpoint.SCRATCH}.{os.getpid()}"
        (self.folder / name).mkdir()
        return name, secrets.token_hex(8)

    def _write(self, scratch: Path, parts: PartTensors, piece: Piece | None) -> tuple[str, int]:
        """This process's file, where it has one: its name and size."""
        if piece is None:
            return "", 0
        file = scratch / piece.file
        checkpoint.write_file(file, self.step, parts, self.facts, piece)
        settle(file)
        return file.name, file.stat().st_size

    def _publish(self, scratch: Path, files: list[tuple[str, int]]) -> None:
        if not self.engine.is_main:
            return
        for name, size in files:
            if name and (found := (scratch / name).stat().st_size) != size:
                raise UserError(
                    f"checkpoint {self.path}: {name} has {size} bytes where it was written and "
                    f"{found} as rank 0 sees it; all machines of a run need one file system"
                )
        settle(scratch)
        checkpoint.publish(scratch, self.path, keep=self.keep, best=self.best)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gave in each process; what one of them cannot write is raised in all."""
        found, sentence = list[T](), None
        try:
            with self.engine.undisturbed(), checkpoint.written(self.path):
                found.append(work())
        except UserError as error:
            sentence = str(error)
        every = (self.gather or self.engine.gather)((found, sentence))
        for _, each in every:
            if each is not None:
                raise UserError(each)
        return [one for given, _ in every for one in given]
