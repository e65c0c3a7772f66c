"""From what the user typed after ``data=`` to a source of images."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from patchmine.data.combine import DatasetSource, Joined
from patchmine.data.contract import IMAGE_SUFFIXES, Labels, Source
from patchmine.data.folder import open_folder
from patchmine.data.listfile import LIST_SUFFIXES, open_list
from patchmine.data.photos import open_photos
from patchmine.data.shards import open_shards
from patchmine.errors import UserError

__all__ = ["Labels", "Source", "Spec", "default_cache_dir", "open_source"]

Spec = str | Path | Dataset[Any] | Sequence["Spec"]

FORMS = (
    f"a folder of images, a list file ({', '.join(LIST_SUFFIXES)}), tar shards (a folder, a pattern, "
    "shard-{000..099}.tar) or embedded:photos"
)


def open_source(spec: Spec | Source, *, cache_dir: Path | None = None) -> Source:
    """The images of a folder, list, tar shards, ``embedded:photos`` or torch Dataset, or of several of these together.

    ``cache_dir``: where the indices of folders, lists and shards are kept and looked for; None = nowhere.  UserError
    when there is nothing of that name, or nothing in it.
    """
    if isinstance(spec, Dataset):
        return DatasetSource(spec)
    if isinstance(spec, str | Path):
        return _open_named(os.fspath(spec), cache_dir)
    if isinstance(spec, Sequence):
        parts = [open_source(part, cache_dir=cache_dir) for part in spec]
        if not parts:
            raise UserError(f"data=[]: name at least one source of images: {FORMS}")
        return parts[0] if len(parts) == 1 else Joined(parts)
    if hasattr(spec, "read") and hasattr(spec, "fingerprint"):
        return spec
    raise UserError(f"data={spec!r}: a {type(spec).__name__} is no source of images; give {FORMS}, or a torch Dataset")


def default_cache_dir() -> Path:
    """``patchmine`` in the user's cache folder (``XDG_CACHE_HOME``, by default ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchmine"


def _open_named(name: str, cache_dir: Path | None) -> Source:
    if name.startswith("embedded:"):
        return open_photos(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_directory(path, name, cache_dir)
    if path.is_file():
        return _open_file(path, name, cache_dir)
    found = sorted(glob.glob(str(path)))  # noqa: PTH207, Path.glob takes no absolute pattern
    shards = _expand_ranges(path) or [Path(shard) for shard in found]
    if not shards:
        raise UserError(f"data={name}: there is no such file or folder{_nearest(path)}; give {FORMS}")
    other = next((shard for shard in shards if shard.suffix.lower() != ".tar"), None)
    if other is not None:
        raise UserError(f"data={name}: a pattern may name tar shards only, but {other} is none; give its folder")
    return open_shards(shards, name, cache_dir)


def _open_directory(folder: Path, name: str, cache_dir: Path | None) -> Source:
    images = open_folder(folder, name, cache_dir)
    if len(images):
        return images
    shards = sorted(folder.rglob("*.tar"))
    if not shards:
        raise UserError(
            f"data={name}: no image and no tar shard in this folder; files that count end in {_SUFFIXES} or .tar"
        )
    return open_shards(shards, name, cache_dir)


def _open_file(file: Path, name: str, cache_dir: Path | None) -> Source:
    suffix = file.suffix.lower()
    if suffix in LIST_SUFFIXES:
        return open_list(file, name, cache_dir)
    if suffix == ".tar":
        return open_shards([file], name, cache_dir)
    if suffix in IMAGE_SUFFIXES:
        raise UserError(f"data={name}: this is a single image; give the folder that it lies in, or a list file")
    raise UserError(f"data={name}: a file that ends in {suffix or 'nothing'} is no source of images; give {FORMS}")


def _expand_ranges(path: Path) -> list[Path]:
    """Every name that ``{first..last}`` stands for, with the zeros of the first; nothing where there is no range."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", str(path))
    if len(parts) == 1:
        return []
    choices = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        choices.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
    texts = parts[0::3]
    return [
        Path(texts[0] + "".join(n + text for n, text in zip(chosen, texts[1:], strict=True)))
        for chosen in product(*choices)
    ]


def _nearest(path: Path) -> str:
    """A hint at what lies beside a missing path."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, beside, n=3)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in close)}?)" if close else ""


_SUFFIXES = ", ".join(IMAGE_SUFFIXES)
