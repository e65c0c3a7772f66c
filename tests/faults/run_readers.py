"""How commands read what a run has written, settings and weights: each gets a mutant's bytes and a
folder.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_recipe(data: bytes, folder: Path) -> object:
    from patchmine.config.resolve import parse

    path = folder / "x.yaml"
    path.write_bytes(data)
    return parse(path, ["data=x", "out=y"]).to_yaml()


def read_config(data: bytes, folder: Path) -> object:
    from patchmine.report.page import write_report
    from patchmine.runs.folder import RunFolder

    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "config.yaml").write_bytes(data)
    write_report([folder / "run"], folder / "report.html")
    config = RunFolder(folder / "run").config
    config.to_yaml()
    return config


def digest(value: Any) -> str:
    """A text that is equal for equal values, tensors included."""
    if isinstance(value, Mapping):
        return digest([[key, value[key]] for key in sorted(value)])
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(digest, value)) + "]"
    if isinstance(value, Tensor):
        content = hashlib.sha256(np.ascontiguousarray(value.numpy()).tobytes()).hexdigest()
        return f"{value.dtype} {tuple(value.shape)} {content}"
    return repr(value)


def load_checkpoint(name: str, data: bytes, folder: Path) -> object:
    from patchmine.train.checkpoint import load

    path = folder / name
    path.write_bytes(data)
    found = load(path)
    return digest([found.step, found.model, found.optimizer, found.facts])


def resume_from(checkpoints: Sequence[Path], data: bytes, folder: Path) -> object:
    """The newest file is damaged: what is read is it, unharmed, or the one before."""
    from patchmine.train.checkpoint import load, load_newest

    parts = ("model", "optimizer") if zlib.crc32(data) % 2 else ("model",)
    for path in checkpoints[-2:]:
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    (folder / checkpoints[-1].name).write_bytes(data)
    found = load_newest(folder, lambda text: None, parts=parts)
    sound = load(next(path for path in checkpoints if path.name == found.path.name), parts=parts)
    same = digest([found.step, found.model, found.optimizer, found.facts]) == digest(
        [sound.step, sound.model, sound.optimizer, sound.facts]
    )
    return "as it was written" if same else "something else"


def read_run_file(run: Path, name: str, data: bytes, folder: Path) -> object:
    """Everything that looks at a run's files beside its weights: the run, its report, and a log
    that goes on.
    """
    from patchmine.report.page import write_report
    from patchmine.runs.folder import RunFolder
    from patchmine.train.log import trim_metrics

    copy = folder / "run"
    if not copy.exists():
        shutil.copytree(run, copy, symlinks=True)
    path = copy / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    RunFolder(copy).metrics()
    write_report([copy], folder / "report.html").read_text(encoding="utf-8")
    if name == "metrics.jsonl":
        trim_metrics(path, 4)
        return [line.get("step") for line in RunFolder(copy).metrics()]
    return None


def read_bad_files(data: bytes, folder: Path) -> object:
    from torch.utils.data import TensorDataset

    from patchmine.data.badfiles import BadFiles
    from patchmine.data.sources.combine import DatasetSource

    path = folder / "bad_files.txt"
    path.write_bytes(data)
    bad = BadFiles(path, 1.0)
    bad.note(
        DatasetSource(TensorDataset(torch.zeros(3, 3, 4, 4))),
        3,
        [(0, "is broken"), (1, "is broken")],
    )
    return path.read_bytes()


def follow_last(checkpoints: Sequence[Path], data: bytes, folder: Path) -> object:
    """``last`` as a small file, which stands for a link where there are none; it need not lead
    anywhere.
    """
    from patchmine.train.checkpoint import DamagedCheckpointError, load

    for path in checkpoints:
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    (folder / "last").write_bytes(data)
    try:
        return load(folder / "last").step
    except DamagedCheckpointError as error:
        return str(error)


def take_lock(name: str, data: bytes, folder: Path) -> object:
    """What a process that has ended says of itself does not keep others out."""
    from patchmine.runs.lock import lock

    (folder / name).write_bytes(data)
    with lock(folder):
        return None


def read_export(run: Path, name: str, data: bytes, folder: Path) -> object:
    from patchmine.evaluate.evaluated import open_evaluated

    copy = folder / "export"
    if not copy.exists():
        shutil.copytree(run / "export", copy)
    (copy / name).write_bytes(data)
    return open_evaluated(copy)


def read_weights(name: str, data: bytes, folder: Path) -> object:
    from patchmine.backbones.weights import load_encoder

    (folder / name).write_bytes(data)
    return load_encoder(folder / name, model_args={"num_heads": 2})


def import_weights(name: str, data: bytes, folder: Path) -> object:
    from patchmine.runs.transfer import import_file

    (folder / name).write_bytes(data)
    out = folder / "imported"
    shutil.rmtree(out, ignore_errors=True)
    return import_file(str(folder / name), str(out), num_heads=2, decoder_num_heads=2)
