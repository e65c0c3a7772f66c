"""From what the user typed after ``data=`` to a source of images, or of videos."""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from patchmine.data.sources.archive import PACKED_SUFFIXES, refuse_packed
from patchmine.data.sources.combine import DatasetSource, Joined
from patchmine.data.sources.contract import IMAGES, Kind, Labels, Source
from patchmine.data.sources.folder import open_folder
from patchmine.data.sources.frame_folders import open_frame_folders
from patchmine.data.sources.listfile import LIST_SUFFIXES, open_list
from patchmine.data.sources.moving import open_moving_photos
from patchmine.data.sources.photos import open_photos
from patchmine.data.sources.shards import open_shards
from patchmine.errors import UserError, reason_of, shown_name

__all__ = ["Labels", "Source", "Spec", "default_cache_dir", "open_source"]

Spec = str | Path | Dataset[Any] | Sequence["Spec"]

MOST_SHARDS = 100_000
MOST_DIGITS = 12
"""Of what ``{first..last}`` may stand for."""

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

MOST_BESIDE = 10_000
"""Names that are looked through for one that is meant."""

_ARCHIVES = Kind("shard", (".tar",), str, chosen=True)

_PACKED = f"a list file ({', '.join(LIST_SUFFIXES)}), tar shards (a folder, a pattern, shard-{{000..099}}.tar)"
FORMS = {
    "image": f"a folder of images, {_PACKED} or embedded:photos",
    "video": f"a folder of videos or of folders of frames, {_PACKED} or embedded:moving-photos",
}


def open_source(
    spec: Spec | Source, *, cache_dir: Path | None = None, kind: Kind = IMAGES
) -> Source:
    """The images of a folder, list, tar shards, ``embedded:photos`` or torch Dataset, or of several.

    Args:
        spec: one of these, or a list; behind a name, ``::jpg,left.png`` lets only files with these
            endings count.
        cache_dir: where the indices of folders, lists and shards are kept; None: nowhere.
        kind: `VIDEOS` for videos.

    Returns:
        A source: ``len(source)`` items, ``source.fingerprint`` of all their names and sizes.

    Raises:
        UserError: there is nothing of that name, or nothing in it.
    """
    if isinstance(spec, Dataset):
        return DatasetSource(spec)
    if isinstance(spec, str) and not spec.strip():
        raise UserError(f"data= is empty; give {FORMS[kind.name]} (data=. is the current folder)")
    if isinstance(spec, str | Path):
        return _open_named(os.fspath(spec), cache_dir, kind)
    if isinstance(spec, Sequence):
        parts = [open_source(part, cache_dir=cache_dir, kind=kind) for part in spec]
        if not parts:
            raise UserError(
                f"data=[]: name at least one source of {kind.name}s: {FORMS[kind.name]}"
            )
        return parts[0] if len(parts) == 1 else Joined(parts)
    if hasattr(spec, "read") and hasattr(spec, "fingerprint"):
        return spec
    what = f"a {type(spec).__name__} is no source of {kind.name}s"
    raise UserError(f"data={spec!r}: {what}; give {FORMS[kind.name]}, or a torch Dataset")


def default_cache_dir() -> Path | None:
    """``patchmine`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``); None where
    there is none.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchmine"
    except RuntimeError:  # a number without a name, as in containers
        return None


def _open_named(name: str, cache_dir: Path | None, kind: Kind) -> Source:
    if name.startswith("embedded:"):
        return open_photos(name) if kind is IMAGES else open_moving_photos(name)
    path, endings = _chosen_endings(name, kind)
    frames, kind = (_only(IMAGES, endings), _only(kind, endings)) if endings else (IMAGES, kind)
    mode = _mode(path, name)
    if stat.S_ISDIR(mode):
        return _open_directory(path, name, cache_dir, kind, frames)
    if stat.S_ISREG(mode):
        return _open_file(path, name, cache_dir, kind)
    if mode:
        raise UserError(
            f"data={shown_name(name)}: this is a pipe, a socket or a device; give {FORMS[kind.name]}"
        )
    shards = _expand(path, name)
    if not shards:
        what = f"there is no such file or folder{_nearest(path)}"
        if "://" in name or name.startswith("pipe:"):
            what = "this is no place on a disk; fetch or mount the data first"
        raise UserError(f"data={shown_name(name)}: {what}; give {FORMS[kind.name]}")
    _refuse_others(shards, name)
    return open_shards(shards, name, cache_dir, kind)


def _refuse_others(shards: Sequence[Path], name: str) -> None:
    """UserError where a pattern stands for files that are no tar archives, or packed ones."""
    other = next((shard for shard in shards if shard.suffix.lower() != ".tar"), None)
    if other is not None and other.suffix.lower() in PACKED_SUFFIXES and other.is_file():
        refuse_packed(other)
    if other is not None:
        raise UserError(
            f"data={shown_name(name)}: a pattern may name tar shards only, but {shown_name(other)} is none; "
            "give its folder"
        )


def _chosen_endings(name: str, kind: Kind) -> tuple[Path, tuple[str, ...]]:
    """The path of ``photos/::jpg,left.png``, and the endings; none where a name has no such part."""
    place, separator, endings = name.rpartition("::")
    if not separator or not place or "/" in endings or os.path.lexists(name):
        return _expanded(name), ()
    chosen = tuple("." + ending.strip().lower().lstrip(".") for ending in endings.split(","))
    known = (*kind.suffixes, *(IMAGES.suffixes if kind.folders else ()))
    stranger = next((ending for ending in chosen if not ending.endswith(known)), None)
    if stranger is not None:
        raise UserError(
            f"data={shown_name(name)}: {shown_name(stranger)} is no ending of {kind.name}s; behind :: stand the "
            f"endings that count, with commas between them: of {', '.join(known)}, also as in left.png"
        )
    return _expanded(place), chosen


def _only(kind: Kind, endings: tuple[str, ...]) -> Kind:
    """A kind of which only files with these endings count."""
    return replace(
        kind,
        suffixes=tuple(ending for ending in endings if ending.endswith(kind.suffixes)),
        chosen=True,
    )


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # of ~somebody who is not known here
        return Path(name)


def _mode(path: Path, name: str) -> int:
    """What kind of file a path is, in the bits of ``st_mode``; 0 where there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # no permission, links in a circle, a NUL
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return 0  # a pattern may be longer than the names that it stands for
        raise UserError(
            f"data={shown_name(name)}: this cannot be opened ({reason_of(error)})"
        ) from error


def _open_directory(
    folder: Path, name: str, cache_dir: Path | None, kind: Kind, frames: Kind
) -> Source:
    files = open_folder(folder, name, cache_dir, kind)
    if len(files):
        return files
    if kind.folders is not None:
        in_folders = open_frame_folders(folder, name, cache_dir, frames)
        if len(in_folders):
            return in_folders
    archives = open_folder(folder, name, None, _ARCHIVES)
    if not len(archives):
        _refuse_packed_in(folder, name)
        hint = (
            "; videos are for video models, such as model=video_vit_small_patch16"
            if kind.name == "image"
            else ""
        )
        found = "".join(f". {note}" for note in files.notes)
        raise UserError(
            f"data={shown_name(name)}: no {kind.name} and no tar shard in this folder; files that count end in "
            f"{', '.join(kind.suffixes)} or .tar{hint}{found}"
        )
    shards = open_shards(
        [Path(archives.path(i)) for i in range(len(archives))], name, cache_dir, kind
    )
    shards.notes = (*archives.notes, *shards.notes)
    return shards


def _open_file(file: Path, name: str, cache_dir: Path | None, kind: Kind) -> Source:
    suffix = file.suffix.lower()
    if suffix in LIST_SUFFIXES:
        return open_list(file, name, cache_dir, kind)
    if suffix == ".tar":
        return open_shards([file], name, cache_dir, kind)
    if suffix in kind.suffixes:
        raise UserError(
            f"data={shown_name(name)}: this is a single {kind.name}; give the folder that it lies in, or a list file"
        )
    if suffix in PACKED_SUFFIXES:
        refuse_packed(file)
    what = f"a file that ends in {shown_name(suffix) or 'nothing'} is no source of {kind.name}s"
    raise UserError(f"data={shown_name(name)}: {what}; give {FORMS[kind.name]}")


def _refuse_packed_in(folder: Path, name: str) -> None:
    """UserError where what a folder holds are packed archives."""
    packed = open_folder(folder, name, None, Kind("archive", PACKED_SUFFIXES, str, chosen=True))
    if len(packed):
        refuse_packed(Path(packed.path(0)))


def _expand(path: Path, name: str) -> list[Path]:
    """Every name that a pattern stands for: ``{first..last}`` with the zeros of the first,
    ``{train,val}``, ``*``.
    """
    first, *others = _BRACES.split(str(path))[:: _BRACES.groups + 1]
    choices = [found.groups() for found in _BRACES.finditer(str(path))]
    _refuse_many(choices, name)
    names = [first]
    for chosen, text in zip(choices, others, strict=True):
        names = [before + choice + text for before in names for choice in _choices(*chosen)]
    if not choices:
        return sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207, absolute patterns
    found = [sorted(glob.glob(each)) if glob.has_magic(each) else [each] for each in names]  # noqa: PTH207
    return [Path(each) for group in found for each in group]


def _choices(first: str | None, last: str | None, listed: str | None) -> list[str]:
    if first is None or last is None:
        return str(listed).split(",")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _refuse_many(choices: Sequence[tuple[str | None, ...]], name: str) -> None:
    count = 1
    for first, last, listed in choices:
        if first is None or last is None:
            count *= str(listed).count(",") + 1
            continue
        if max(len(first), len(last)) > MOST_DIGITS:
            count = MOST_SHARDS + 1
            break
        if int(last) < int(first):
            what = f"the range {{{first}..{last}}} runs backwards"
            raise UserError(f"data={shown_name(name)}: {what}; write {{{last}..{first}}}")
        count *= int(last) - int(first) + 1
    if count > MOST_SHARDS:
        raise UserError(
            f"data={shown_name(name)}: the pattern stands for more than {MOST_SHARDS:,} shards, the most that a "
            "pattern may name; name those that there are, or give their folder"
        )


def _nearest(path: Path) -> str:
    """A hint at what lies beside a missing path."""
    if len(path.name) > 255:
        return ""
    try:
        beside = list(islice((entry.name for entry in os.scandir(path.parent)), MOST_BESIDE))
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, beside, n=3)
    names = " or ".join(shown_name(path.parent / name) for name in close)
    return f" (did you mean {names}?)" if close else ""
