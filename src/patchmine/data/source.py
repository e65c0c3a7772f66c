"""From what the user typed after ``data=`` to a source of images, or of videos."""

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
from patchmine.data.contract import IMAGES, Kind, Labels, Source
from patchmine.data.folder import open_folder
from patchmine.data.frame_folders import open_frame_folders
from patchmine.data.listfile import LIST_SUFFIXES, open_list
from patchmine.data.moving import open_moving_photos
from patchmine.data.photos import open_photos
from patchmine.data.shards import open_shards
from patchmine.errors import UserError

__all__ = ["Labels", "Source", "Spec", "default_cache_dir", "open_source"]

Spec = str | Path | Dataset[Any] | Sequence["Spec"]

_PACKED = f"a list file ({', '.join(LIST_SUFFIXES)}), tar shards (a folder, a pattern, shard-{{000..099}}.tar)"
FORMS = {
    "image": f"a folder of images, {_PACKED} or embedded:photos",
    "video": f"a folder of videos or of folders of frames, {_PACKED} or embedded:moving-photos",
}


def open_source(spec: Spec | Source, *, cache_dir: Path | None = None, kind: Kind = IMAGES) -> Source:
    """The images of a folder, list, tar shards, ``embedded:photos`` or torch Dataset, or of several of these together.

    ``cache_dir``: where the indices of folders, lists and shards are kept and looked for; None = nowhere.  UserError
    when there is nothing of that name, or nothing in it.  ``kind``: `data.video.VIDEOS` for `open_videos`.
    """
    if isinstance(spec, Dataset):
        return DatasetSource(spec)
    if isinstance(spec, str | Path):
        return _open_named(os.fspath(spec), cache_dir, kind)
    if isinstance(spec, Sequence):
        parts = [open_source(part, cache_dir=cache_dir, kind=kind) for part in spec]
        if not parts:
            raise UserError(f"data=[]: name at least one source of {kind.name}s: {FORMS[kind.name]}")
        return parts[0] if len(parts) == 1 else Joined(parts)
    if hasattr(spec, "read") and hasattr(spec, "fingerprint"):
        return spec
    what = f"a {type(spec).__name__} is no source of {kind.name}s"
    raise UserError(f"data={spec!r}: {what}; give {FORMS[kind.name]}, or a torch Dataset")


def default_cache_dir() -> Path:
    """``patchmine`` in the user's cache folder (``XDG_CACHE_HOME``, by default ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchmine"


def _open_named(name: str, cache_dir: Path | None, kind: Kind) -> Source:
    if name.startswith("embedded:"):
        return open_photos(name) if kind is IMAGES else open_moving_photos(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_directory(path, name, cache_dir, kind)
    if path.is_file():
        return _open_file(path, name, cache_dir, kind)
    found = sorted(glob.glob(str(path)))  # noqa: PTH207, Path.glob takes no absolute pattern
    shards = _expand_ranges(path) or [Path(shard) for shard in found]
    if not shards:
        raise UserError(f"data={name}: there is no such file or folder{_nearest(path)}; give {FORMS[kind.name]}")
    other = next((shard for shard in shards if shard.suffix.lower() != ".tar"), None)
    if other is not None:
        raise UserError(f"data={name}: a pattern may name tar shards only, but {other} is none; give its folder")
    return open_shards(shards, name, cache_dir, kind)


def _open_directory(folder: Path, name: str, cache_dir: Path | None, kind: Kind) -> Source:
    files = open_folder(folder, name, cache_dir, kind)
    if len(files):
        return files
    if kind is not IMAGES and len(frames := open_frame_folders(folder, name, cache_dir)):
        return frames
    shards = sorted(folder.rglob("*.tar"))
    if not shards:
        hint = "; videos are for video models, such as model=video_vit_small_patch16" if kind is IMAGES else ""
        raise UserError(
            f"data={name}: no {kind.name} and no tar shard in this folder; files that count end in "
            f"{', '.join(kind.suffixes)} or .tar{hint}"
        )
    return open_shards(shards, name, cache_dir, kind)


def _open_file(file: Path, name: str, cache_dir: Path | None, kind: Kind) -> Source:
    suffix = file.suffix.lower()
    if suffix in LIST_SUFFIXES:
        return open_list(file, name, cache_dir, kind)
    if suffix == ".tar":
        return open_shards([file], name, cache_dir, kind)
    if suffix in kind.suffixes:
        raise UserError(f"data={name}: this is a single {kind.name}; give the folder that it lies in, or a list file")
    what = f"a file that ends in {suffix or 'nothing'} is no source of {kind.name}s"
    raise UserError(f"data={name}: {what}; give {FORMS[kind.name]}")


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
