"""Tensors from files into modules: no code is executed, and what went where is told exactly."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from patchmine.backbones.description import find_weights, is_safetensors
from patchmine.backbones.parts import refuse_passing_over
from patchmine.errors import UserError, foreign_parser, reason_of, shown_name

Tensors = dict[str, Tensor]

COUNTER = "num_batches_tracked"  # of a batch norm: older files lack it, nothing is computed from it
_DEEPEST = 8  # dictionaries in dictionaries that are looked through for tensors
_MOST_ENTRIES = 2**18
_SMALL = 2**12  # bytes; so much may be written as one number with strides of zero


class _Inert:
    """A value in a pickle that is no weight: takes whatever it is made of, does nothing with it."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass


# What training scripts leave beside their weights: paths among arguments, numpy's numbers, logs.
_BESIDE_WEIGHTS = (
    *(f"pathlib.{kind}" for kind in ("PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"pathlib._local.{kind}" for kind in ("PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"numpy.core.multiarray.{name}" for name in ("scalar", "_reconstruct")),
    *(f"numpy._core.multiarray.{name}" for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"datetime.{kind}" for kind in ("datetime", "timedelta", "timezone")),
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    *("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"),
)


@dataclass
class LoadReport:
    """What became of every tensor of a file.

    ``dropped``: known, and not needed here; ``unexpected``: not known; ``random``: in the network
    that is made, and not in the file, so that it starts as it was drawn; ``assumed``: notes about
    what the file does not tell.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def render(self) -> str:
        """Lines for a person; many tensors are told by their block or kind, few by their names."""
        lines = [self.source]
        for title in ("loaded", "resized", "dropped", "missing", "unexpected"):
            names: list[str] = getattr(self, title)
            lines.append(f"  {title:<11}{len(names):>4}  {_folded(names)}".rstrip())
        if self.random:
            lines.append(f"  left random{len(self.random):>4}  {_folded(self.random)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in (*self.notes, *self.assumed))])

    def __str__(self) -> str:
        return self.render()


def _folded(names: Sequence[str]) -> str:
    names = [shown_name(name) for name in names]
    if len(names) <= 4:
        return ", ".join(names)
    kinds = [re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", name)) for name in names]
    if len(set(kinds)) > 8:
        kinds = [re.sub(r"(blocks\w*)\.\*\..*", r"\1", kind) for kind in kinds]
    counts = Counter(kinds)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def read_checkpoint(path: str | Path, setting: str = "file") -> dict[str, Any]:
    """The dictionary in a .safetensors file or a torch pickle, on the CPU; nothing is executed.

    Besides tensors and plain containers only `argparse.Namespace` is rebuilt, in which official
    files keep their settings.  Raises UserError, naming ``setting``, for anything else.
    """
    path = Path(path)
    shown = f"{setting}={shown_name(path)}"
    if path.is_dir():
        raise UserError(
            f"{shown} is a folder, not a file of weights: give a .safetensors, .pth or .pt file"
        )
    path = find_weights(path, setting)

    def refuse(reason: str) -> UserError:
        return UserError(f"{shown} cannot be read as weights ({reason}): is the file complete?")

    with foreign_parser(refuse), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about sparse tensors, which are refused below
        content = _parse(path, shown)
    if not isinstance(content, dict):
        raise UserError(
            f"{shown} holds a {type(content).__name__}, not a dictionary of tensors: give a state "
            "dict"
        )
    with foreign_parser(refuse):
        tensors = nested_tensors(content)
        for name, tensor in tensors.items():
            _check_tensor(tensor, f"{shown}: {shown_name(name)}")
        # Views of one storage under many names are a way to make a small file large in memory.
        if sum(map(_num_bytes, tensors.values())) > _SMALL * len(tensors) + 4 * path.stat().st_size:
            raise ValueError("its tensors are many times larger than the file")
    return content


def _parse(path: Path, shown: str) -> Any:
    """What the file holds; a class that is not let in is named, torch's own advice is left out."""
    let_in: list[Any] = [argparse.Namespace, *((_Inert, name) for name in _BESIDE_WEIGHTS)]
    try:
        if is_safetensors(path):
            return dict(load_file(path))
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_archive(path, shown)
        with torch.serialization.safe_globals(let_in):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError) as error:
        refused = re.search(r"GLOBAL (\S+\.\S+)", str(error))
        if refused is not None:
            raise UserError(
                f"{shown} holds a {shown_name(refused[1])}, which patchmine does not unpickle "
                "because that can run code: save the bare state dict as .safetensors and give that"
            ) from error
        unreadable = isinstance(error, pickle.UnpicklingError)
        raise ValueError("not a file of tensors" if unreadable else reason_of(error)) from error


def _check_archive(path: Path, shown: str) -> None:
    """Refuse TorchScript, and archives whose members claim more bytes than the file has."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    claimed = sum(member.file_size for member in members)
    if claimed > path.stat().st_size:  # torch packs nothing; unpacking could fill the memory
        raise zipfile.BadZipFile(
            f"its parts claim {claimed:,} bytes and the file has {path.stat().st_size:,}"
        )
    if any(PurePosixPath(member.filename).name == "constants.pkl" for member in members):
        raise UserError(
            f"{shown} is a TorchScript archive, which holds code beside its weights: open it where "
            "you trust it and save the state dict as .safetensors; of OpenAI's CLIP take timm's "
            "model.safetensors"
        )


def nested_tensors(content: Mapping[Any, Any]) -> Tensors:
    """Every tensor of nested dictionaries by its dotted name; ValueError where there is no end."""
    found: Tensors = {}
    waiting = deque([("", content, 1)])
    entries = 0
    while waiting:
        before, mapping, depth = waiting.popleft()
        entries += len(mapping)
        if entries > _MOST_ENTRIES:
            raise ValueError(f"it has more than {_MOST_ENTRIES:,} entries")
        for key, value in mapping.items():
            if isinstance(value, Tensor):
                found[f"{before}{key}"] = value
            elif isinstance(value, Mapping) and depth < _DEEPEST:
                waiting.append((f"{before}{key}.", value, depth + 1))
    return found


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check_tensor(tensor: Tensor, named: str) -> None:
    """Refuse what is no plain array in memory, or pretends to be larger than its storage."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_nested:
        raise UserError(f"{named} is no plain tensor (sparse, quantised or without data)")
    if _num_bytes(tensor) > max(_SMALL, tensor.untyped_storage().nbytes()):  # strides of zero
        raise UserError(
            f"{named} has shape {tuple(tensor.shape)}, more numbers than the file holds of it"
        )


def plain_tensor(tensor: Tensor, name: str) -> Tensor | None:
    """A weight in float32, the counter of a batch norm as it is; None for other numbers."""
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if name.endswith(COUNTER) else None


def tensors_only(mapping: Mapping[str, Any]) -> Tensors:
    """The weights of a state dict in float32, without the marks that DDP and compile leave."""
    found: Tensors = {}
    for name, value in mapping.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            tensor = plain_tensor(value, name)
            if tensor is not None:
                found[name.removeprefix("module.").replace("_orig_mod.", "")] = tensor
    return found


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError, naming the first tensor, where weights hold NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{source}: {shown_name(name)} has {bad} of {tensor.numel()} numbers that are NaN "
                "or infinite: the training diverged before it was saved, take an earlier file"
            )


def check_fit(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    report: LoadReport,
    *,
    allow: Sequence[str] = (),
) -> None:
    """Report missing and unexpected names; UserError for other shapes, and what is not allowed."""
    own = module.state_dict()
    for name in sorted(own.keys() & tensors.keys()):
        have, want = tuple(tensors[name].shape), tuple(own[name].shape)
        if have != want:
            other_patch = name.endswith("patch_embed.proj.weight") and len(have) == len(want) == 4
            remedy = f", set patch_size={have[-1]}" if other_patch and have[:2] == want[:2] else ""
            raise UserError(
                f"{report.source}: {shown_name(name)} has shape {have}, the model wants {want}: "
                f"the architectures differ{remedy}"
            )
    report.missing += [name for name in own if name not in tensors]
    report.unexpected += [name for name in tensors if name not in own]
    if allow:
        passed = [n for n in report.unexpected if any(fnmatchcase(n, each) for each in allow)]
        refuse_passing_over(passed, report.source)
    for kind, names in (("missing", report.missing), ("unexpected", report.unexpected)):
        refused = [n for n in names if not any(fnmatchcase(n, pattern) for pattern in allow)]
        if refused:
            raise UserError(
                f"{report.source}: {len(refused)} {kind} tensor(s): {_folded(refused)}.  Does the "
                "file belong to this model?  If so, `patchmine import` passes over what it is told "
                f"to, as in allow=[{shown_name(refused[0])}]"
            )


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    report: LoadReport,
    *,
    allow: Sequence[str] = (),
) -> None:
    """Copy ``tensors`` into ``module``, report where each went; UserError leaves it unchanged."""
    check_fit(module, tensors, report, allow=allow)
    known = {name: tensors[name] for name in module.state_dict() if name in tensors}
    refuse_non_finite(known, report.source)
    module.load_state_dict(known, strict=False)
    report.loaded += known
