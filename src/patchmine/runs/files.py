"""The files of a run's folder."""

from __future__ import annotations

from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from patchmine.config.resolve import parse
from patchmine.config.schema import AnyConfig
from patchmine.errors import UserError
from patchmine.runs.known import CONFIG, settings_file
from patchmine.train.checkpoint import list_checkpoints
from patchmine.train.log import read_line

MONITOR_START = Path("monitor", "start.safetensors")
ORIGIN = "origin.jsonl"
"""How and where a run was made: a JSON object each time it began or went on."""


class RunFiles:
    """A run that was made, or is being made; UserError where the folder ``path`` holds none."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = settings_file(path).parent

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config_file(self) -> Path:
        """The settings, fully resolved."""
        return self.path / CONFIG

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_dir(self) -> Path:
        """Checkpoints; ``last`` is the newest."""
        return self.path / "checkpoints"

    @property
    def sample_dir(self) -> Path:
        """Pictures made during training."""
        return self.path / "samples"

    @property
    def monitor_start(self) -> Path:
        """The nearest neighbours at step 0, which later ones are compared with."""
        return self.path / MONITOR_START

    @property
    def eval_dir(self) -> Path:
        """Results of evaluations, one JSON file each."""
        return self.path / "eval"

    @property
    def export_dir(self) -> Path:
        """The encoder for timm and transformers."""
        return self.path / "export"

    @property
    def bad_files(self) -> Path:
        """Images that could not be read."""
        return self.path / "bad_files.txt"

    def export_folder(self, which: str) -> Path:
        """Where an encoder of the run is exported to; a teacher takes the place of its student."""
        name = which.removesuffix("teacher").rstrip("-")
        return self.path / ("export" if name in ("", "student") else f"export-{name}")

    @cached_property
    def config(self) -> AnyConfig:
        """The run's settings.  Raises UserError when config.yaml is damaged."""
        return parse(self.config_file, [])

    @property
    def whole_config(self) -> AnyConfig:
        """The same with mean and std.  Raises UserError where the file has none."""
        if self.config.mean is None or self.config.std is None:
            raise UserError(
                f"{self.config_file} has no mean and std; write those of the run into it"
            )
        return self.config

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return list_checkpoints(self.checkpoint_dir)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that can be read; a kill may have cut the last one short."""
        if not self.metrics_file.is_file():
            return []
        lines = [read_line(text) for text in self.metrics_file.read_bytes().split(b"\n")]
        return [line for line in lines if line is not None]

    @property
    def made(self) -> str:
        """What kind of run this is, in a sentence."""
        made = {"pretrain": "was pre-trained", "classify": "was fine-tuned"}
        return made.get(self.config.kind, f"learned to {self.config.kind}")
