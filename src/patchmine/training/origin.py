"""How and where a run is made, noted for those who read of it later."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from patchmine.runs.files import ORIGIN
from patchmine.train.engine import Engine
from patchmine.train.hardware import device_name
from patchmine.train.head import versions

_PACKAGE = Path(__file__).parents[1]
CODE = "the code of patchmine (its fingerprint)"


def note_origin(folder: Path, engine: Engine, images: int, first_step: int) -> None:
    """A line of origin.jsonl; a run that begins writes the first one.

    Args:
        folder: the run's.
        engine: where it is computed.
        images: how many items are trained on.
        first_step: that is made now.
    """
    line = json.dumps({"step": first_step, "images": images, **_origin(engine)})
    # It is not worth a run.
    with suppress(OSError), (folder / ORIGIN).open("a" if first_step else "w") as file:
        file.write(line + "\n")


def fingerprints_of_code(top: Path = _PACKAGE) -> dict[str, str]:
    """Versions of the libraries that shape the numbers, and a digest of the sources in ``top``: one
    version of patchmine may be several clones.
    """
    digest = hashlib.blake2b(digest_size=6)
    for file in sorted(top.rglob("*.py")):
        digest.update(f"{file.relative_to(top)}\n".encode() + file.read_bytes())
    return {CODE: digest.hexdigest()} | versions()


def _origin(engine: Engine) -> dict[str, Any]:
    name = device_name(engine.device)
    return {
        "command": _command(),
        "patchmine": _version("patchmine"),
        "torch": torch.__version__,
        "device": f"{engine.world_size} x {name}" if engine.world_size > 1 else name,
        "precision": engine.precision,
        "product": engine.product,
    }


def _command() -> str | None:
    """What was typed; None of a run that another program made."""
    program, *words = sys.argv
    is_ours = Path(program).name == "patchmine" or program.endswith("patchmine/__main__.py")
    return shlex.join(["patchmine", *words]) if is_ours else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # its sources are used as they lie
        return None
