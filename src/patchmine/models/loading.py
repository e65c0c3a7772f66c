"""Tensors from files into modules: read without executing code, resample positions, say exactly what went where."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from patchmine.errors import UserError
from patchmine.models.torchscript import is_torchscript, read_torchscript

Tensors = dict[str, Tensor]

COUNTER = "num_batches_tracked"  # of a batch norm: older files lack it, and nothing is computed from it

# What the readers raise for files that are cut, garbled or of another kind.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


@dataclass
class LoadReport:
    """What became of every tensor of a file.  ``dropped``: known, and not needed here; ``unexpected``: not known."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def render(self) -> str:
        """The report as lines for a person; many tensors are told by their block or kind, few by their names."""
        lines = [self.source]
        for title in ("loaded", "resized", "dropped", "missing", "unexpected"):
            names: list[str] = getattr(self, title)
            lines.append(f"  {title:<11}{len(names):>4}  {_folded(names)}".rstrip())
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.render()


def _folded(names: Sequence[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    kinds = [re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", name)) for name in names]
    if len(set(kinds)) > 8:
        kinds = [re.sub(r"(blocks\w*)\.\*\..*", r"\1", kind) for kind in kinds]
    counts = Counter(kinds)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def read_checkpoint(path: str | Path, setting: str = "file") -> dict[str, Any]:
    """The dictionary in a .safetensors file, a torch pickle or a TorchScript archive, on the CPU; nothing is executed.

    Besides tensors and plain containers only `argparse.Namespace` (official files keep their settings in one) is
    rebuilt.  Raises UserError, naming ``setting``, for a file that is missing, broken, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file of weights" if path.is_dir() else "does not exist"
        raise UserError(f"{setting}={path} {what}: give a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if is_torchscript(path):
            return dict(read_torchscript(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        refused = re.search(r"GLOBAL (\S+\.\S+)", str(error))
        if refused is None:
            raise UserError(
                f"{setting}={path} cannot be read as weights ({_reason(error)}): is the file complete?"
            ) from error
        raise UserError(
            f"{setting}={path} holds a {refused[1]}, which patchmine does not unpickle because that can run code: "
            "save the bare state dict as .safetensors and give that"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{setting}={path} holds a {type(content).__name__}, not a dictionary of tensors: give a state dict"
        )
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "not a file of tensors"  # torch's own text is about its default settings
    return str(error).split("\n", 1)[0].strip(". ")[:120] or type(error).__name__


def tensors_only(mapping: Mapping[str, Any]) -> Tensors:
    """The float tensors of a state dict in float32, without the prefixes that DDP and compile add to names.

    Of the others only the counters of batch norms are kept.
    """
    plain: Tensors = {}
    for name, value in mapping.items():
        if isinstance(value, Tensor) and (value.is_floating_point() or name.endswith(COUNTER)):
            plain_name = name.removeprefix("module.").replace("_orig_mod.", "")
            plain[plain_name] = value.float() if value.is_floating_point() else value
    return plain


def resample_positions(table: Tensor, grid: tuple[int, int], num_prefix: int, setting: str = "image_size") -> Tensor:
    """(1, P + L, D) of a square grid -> (1, P + L', D) for ``grid`` by bicubic interpolation; the P prefix rows stay.

    Raises UserError when the table is not square, because its rows and columns cannot be told apart.
    """
    side = round((table.shape[1] - num_prefix) ** 0.5)
    if side * side + num_prefix != table.shape[1]:
        raise UserError(
            f"the position table has {table.shape[1]} rows, which is no square grid, and cannot be resampled "
            f"to {grid[0]}x{grid[1]} patches: give the {setting} that it was trained at"
        )
    return resample_abs_pos_embed(
        table, list(grid), [side, side], num_prefix_tokens=num_prefix, interpolation="bicubic"
    )


def load_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], report: LoadReport, *, allow: Sequence[str] = ()
) -> None:
    """Copy ``tensors`` into ``module`` and write down in ``report`` where each went.

    Raises UserError for a tensor of another shape, and for a missing or unexpected one that no pattern of ``allow``
    matches; the module is then unchanged.
    """
    own = module.state_dict()
    for name in own.keys() & tensors.keys():
        have, want = tuple(tensors[name].shape), tuple(own[name].shape)
        if have != want:
            raise UserError(
                f"{report.source}: {name} has shape {have}, the model wants {want}: the architectures differ"
            )
    known = [name for name in own if name in tensors]
    report.missing += [name for name in own if name not in tensors]
    report.unexpected += [name for name in tensors if name not in own]
    for kind, names in (("missing", report.missing), ("unexpected", report.unexpected)):
        refused = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allow)]
        if refused:
            raise UserError(
                f"{report.source}: {len(refused)} {kind} tensor(s): {_folded(refused)}.  Does the file belong to this "
                f"model?  If so, `patchmine import` passes over what it is told to, as in allow=[{refused[0]}]"
            )
    module.load_state_dict({name: tensors[name] for name in known}, strict=False)
    report.loaded += known
