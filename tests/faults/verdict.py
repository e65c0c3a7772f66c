"""Whether an interrupted run arrived where the uninterrupted one did."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from scene import Ended, last_lines

from patchmine.train.checkpoint import DamagedCheckpointError, list_checkpoints, load

EXACT = (
    "step",
    "epoch",
    "samples",
    "loss",
    "grad_norm",
    "lr",
    "skipped",
)  # of a metrics line; the rest are times


def torn(out: Path) -> list[str]:
    """The checkpoints that are listed and cannot be read."""
    found = []
    for path in list_checkpoints(out / "checkpoints"):
        try:
            load(path)
        except DamagedCheckpointError as error:
            found.append(f"{path.name} is torn ({error})")
    return found


def ended_badly(ended: Ended, *codes: int) -> list[str]:
    """What is wrong with the way in which a command ended, whose exit code should be one of
    ``codes``.
    """
    if ended.code is None:
        return [f"hung: {last_lines(ended.output)}"]
    if "Traceback (most recent call last)" in ended.output:
        return [f"a traceback: {last_lines(ended.output)}"]
    if ended.code not in codes:
        return [
            f"exit code {ended.code}, not {' or '.join(map(str, codes))}: "
            f"{last_lines(ended.output)}"
        ]
    return []


def differences(out: Path, whole: Path, *, pictures: bool = True) -> list[str]:
    """In what a finished run differs from the uninterrupted one: weights, numbers, files."""
    found = torn(out)
    pairs = {
        "the newest checkpoint": (_newest(out), _newest(whole)),
        "export/model.safetensors": (
            out / "export" / "model.safetensors",
            whole / "export" / "model.safetensors",
        ),
    }
    found += [f"{name} differs" for name, pair in pairs.items() if not _same_tensors(*pair)]
    if (out / "checkpoints" / "last").resolve().name not in (_newest(out).name, "last"):
        found.append("checkpoints/last names another file than the newest")
    if _lines(out) != _lines(whole):
        found.append(f"metrics.jsonl differs: steps {[line.get('step') for line in _lines(out)]}")
    own, others = _names(out, pictures), _names(whole, pictures)
    if own - others:
        found.append(f"left behind: {sorted(own - others)}")
    if others - own:
        found.append(f"missing: {sorted(others - own)}")
    return found


def _newest(out: Path) -> Path:
    return (list_checkpoints(out / "checkpoints") or [out / "checkpoints" / "none"])[-1]


def _same_tensors(one: Path, other: Path) -> bool:
    if not one.exists():
        return False
    with one.open("rb") as a, other.open("rb") as b:
        return body(a.read()) == body(b.read())


def body(data: bytes) -> bytes:
    """The tensors' table and numbers of a safetensors file, without its notes, which tell paths and
    versions.
    """
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    return json.dumps(table, sort_keys=True).encode() + data[8 + length :]


def _lines(out: Path) -> list[dict[str, object]]:
    lines = []
    with suppress(OSError):
        for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            lines.append({key: line[key] for key in EXACT if key in line})
    return lines


def _names(out: Path, pictures: bool) -> set[str]:
    """All names but those of older checkpoints: a stop writes one at its own step."""
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    names = {name for name in names if not re.fullmatch(r"checkpoints/step-\d+\.safetensors", name)}
    return names if pictures else {name for name in names if not name.startswith("samples/")}


def processes_of(sessions: set[int]) -> list[int]:
    """Processes that still live in one of these sessions."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (
                    Path(entry.path, "stat")
                    .read_text(encoding="ascii", errors="replace")
                    .rpartition(")")[2]
                    .split()
                )
                if int(fields[3]) in sessions and fields[0] != "Z":
                    found.append(int(entry.name))
    return found
