"""The folder of a run that is to be made: a place that holds nothing yet."""

from __future__ import annotations

import os
from pathlib import Path

from patchmine.config.schema import RunConfig
from patchmine.errors import UserError, shown_name

_WRITTEN = (
    *("checkpoints", "metrics.jsonl", "samples", "monitor", "export", "export-partner"),
    "bad_files.txt",
)
_BEGINNING = {"step-00000000.safetensors", "last"}
"""What an extension writes into checkpoints/ before its settings, and writes anew."""


def new_folder(config: RunConfig) -> Path:
    """The folder of a run to be made.  Raises UserError for a place where no run can be."""
    if config.out is None:
        raise UserError("out is not set: name a new folder for the run, as in out=runs/first")
    folder = Path(config.out)
    # Safetensors opens no path that is not UTF-8, and no checkpoint could be read
    if not str(folder).isprintable():
        raise UserError(
            f"out={shown_name(folder)}: name the run's folder by letters that can be printed"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: name a new folder for the run")
    for name in [config.data] if isinstance(config.data, str) else config.data:
        # Path refuses users that are unknown.
        data = os.path.expanduser(name.split("::")[0])  # noqa: PTH111
        inside = Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(data))
        if inside and os.path.isdir(data):  # noqa: PTH112
            raise UserError(
                f"out={folder} lies in data={shown_name(name)}, where the run's pictures would be "
                "taken for images: name a folder beside it"
            )
    return folder


def refuse_used_folder(folder: Path, *, extends: bool = False) -> None:
    """Raise UserError where a new run would write over another one, or over somebody's files.

    ``extends``: it begins with a checkpoint, which a kill may have left there without settings.
    """
    if os.path.lexists(folder / "config.yaml"):
        raise UserError(
            f"out={folder} already holds a run, which is left as it is: go on with it by "
            f"`patchmine resume {folder}`, or choose another out"
        )
    for name in _WRITTEN:
        place = folder / name
        held = {each.name for each in place.iterdir()} if place.is_dir() else {name}
        if extends and name == "checkpoints":
            # Names with a dot are of half written files, which the next checkpoint sweeps away
            held = {each for each in held if not each.startswith(".")} - _BEGINNING
        if os.path.lexists(place) and held:
            raise UserError(
                f"out={folder} holds no run, but {name}, which a run writes itself: choose a new "
                "folder"
            )
