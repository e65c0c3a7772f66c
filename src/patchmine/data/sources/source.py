"""From what the user typed after ``data=`` to a source of images, or of videos."""

from __future__ import annotations

import difflib
import errno
import glob
import math
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from patchmine.data.decoding.video import VIDEOS, backend_name
from patchmine.data.settings import LIST_SUFFIXES
from patchmine.data.sources.archive import PACKED_SUFFIXES, refuse_packed
from patchmine.data.sources.combine import DatasetSource, Joined
from patchmine.data.sources.contract import IMAGES, Kind, Labels, Source, data_error
from patchmine.data.sources.embedded import open_embedded
from patchmine.data.sources.folder import FrameFolders, open_folder
from patchmine.data.sources.listfile import open_files, open_list
from patchmine.data.sources.parquet import SUFFIX as PARQUET
from patchmine.data.sources.parquet import open_parquet
from patchmine.data.sources.parts import with_parts
from patchmine.data.sources.shards import open_shards
from patchmine.errors import UserError, reason_of, shown_name

__all__ = ["KINDS", "Labels", "Source", "Spec", "decoder_of", "default_cache_dir", "open_source"]

Spec = str | Path | Dataset[Any] | Source | Sequence["Spec"]

KINDS = {"image": IMAGES, "video": VIDEOS}

MOST_SHARDS = 100_000
"""Shards that a pattern may stand for."""
_MOST_DIGITS = 12  # of a number in a pattern
_MOST_BESIDE = 10_000  # names that are looked through for one that is meant

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_ARCHIVES = Kind("shard", (".tar",), str, chosen=True)
_PARQUET = Kind("Parquet file", (PARQUET,), str, chosen=True)
_PACKED = Kind("archive", PACKED_SUFFIXES, str, chosen=True)
_LISTS = (
    f"a list file ({', '.join(LIST_SUFFIXES)}), "
    "tar shards (a folder, a pattern, shard-{000..099}.tar)"
)
FORMS = {
    "image": f"a folder of images, {_LISTS}, Parquet files or embedded:photos",
    "video": f"a folder of videos or of folders of frames, {_LISTS} or embedded:moving-photos",
}


def open_source(spec: Spec, kind: str = "image", *, cache_dir: Path | None = None) -> Source:
    """The images of a folder, list, shards, ``embedded:photos`` or torch Dataset, or of several.

    Args:
        spec: one of these, or a list; behind a name, ``::jpg,left.png`` lets only files with these
            endings count.
        kind: "image" or "video"; videos may also be folders of frames, or
            ``embedded:moving-photos``.
        cache_dir: where the indices of folders, lists and shards are kept; None: nowhere.

    Returns:
        A source: ``len(source)`` items, ``source.fingerprint`` of all their names and sizes.

    Raises:
        UserError: there is nothing of that name, nothing in it, or nothing that could decode it.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind}: a source is of {' or '.join(map(repr, KINDS))}")
    source = _opened(spec, KINDS[kind], cache_dir)
    if kind == "video":
        decoder_of(source)  # whose absence is better told now than by the first worker
    return source


def decoder_of(source: Source) -> str | None:
    """What decodes videos, with its version; None for frames and arrays.  UserError without it."""
    return backend_name() if source.encoded else None


def default_cache_dir() -> Path | None:
    """``patchmine`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``), if any."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchmine"
    except RuntimeError:  # a number without a name, as in containers
        return None


def _opened(spec: Spec, kind: Kind, cache_dir: Path | None) -> Source:
    forms = FORMS[kind.name]
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, Dataset):
        return DatasetSource(spec)
    if isinstance(spec, str | Path):
        name = os.fspath(spec)
        if not name.strip():
            raise UserError(f"data= is empty; give {forms} (data=. is the current folder)")
        return _open_named(name, cache_dir, kind)
    if isinstance(spec, Sequence):
        parts = [_opened(part, kind, cache_dir) for part in spec]
        if not parts:
            raise UserError(f"data=[]: name at least one source of {kind.name}s: {forms}")
        return parts[0] if len(parts) == 1 else Joined(parts)
    what = f"a {type(spec).__name__} is no source of {kind.name}s"
    raise UserError(f"data={spec!r}: {what}; give {forms}, or a torch Dataset")


def _open_named(name: str, cache_dir: Path | None, kind: Kind) -> Source:
    if name.startswith("embedded:"):
        return open_embedded(name, kind)
    path, words = _split(name)
    mode = _mode(path, name)
    parquet = _parquet_files(path, mode, name, kind, words)
    if parquet:
        return _open_parquet(parquet, name, cache_dir, kind, words)
    endings = _endings(words, name, kind)
    frames = _only(IMAGES, endings) if endings else IMAGES
    kind = _only(kind, endings) if endings else kind
    if stat.S_ISDIR(mode):
        return _open_directory(path, name, cache_dir, kind, frames, words)
    if stat.S_ISREG(mode):
        return _open_file(path, name, cache_dir, kind)
    if mode:
        what = "this is a pipe, a socket or a device"
        raise data_error(name, f"{what}; give {FORMS[kind.name]}")
    return _open_pattern(path, name, cache_dir, kind)


def _parquet_files(
    path: Path, mode: int, name: str, kind: Kind, words: Sequence[str]
) -> list[Path]:
    """The Parquet files that a name means without doubt."""
    if stat.S_ISDIR(mode):  # whose columns may be named, where a folder of images has endings
        are_columns = bool(words) and not _are_endings(words, kind)
        return _paths(open_folder(path, name, None, _PARQUET)) if are_columns else []
    if path.suffix.lower() != PARQUET:
        return []
    return [path] if stat.S_ISREG(mode) else _expand(path, name)


def _open_pattern(path: Path, name: str, cache_dir: Path | None, kind: Kind) -> Source:
    shards = _expand(path, name)
    if not shards:
        what = f"there is no such file or folder{_nearest(path)}"
        if "://" in name or name.startswith("pipe:"):
            what = "this is no place on a disk; fetch or mount the data first"
        raise data_error(name, f"{what}; give {FORMS[kind.name]}")
    other = next((shard for shard in shards if shard.suffix.lower() != ".tar"), None)
    if other is not None and other.suffix.lower() in PACKED_SUFFIXES and other.is_file():
        refuse_packed(other)
    if other is not None:
        what = f"a pattern may name tar shards only, but {shown_name(other)} is none"
        raise data_error(name, f"{what}; give its folder")
    return open_shards(shards, name, cache_dir, kind)


def _split(name: str) -> tuple[Path, list[str]]:
    """The path of ``photos/::jpg,left.png``, and the words behind it, where a name has such."""
    place, separator, behind = name.rpartition("::")
    words = list[str]()
    if separator and place and "/" not in behind and not os.path.lexists(name):
        name, words = place, [word.strip() for word in behind.split(",")]
    try:
        return Path(name).expanduser(), words
    except RuntimeError:  # of ~somebody who is not known here
        return Path(name), words


def _are_endings(words: Sequence[str], kind: Kind) -> bool:
    known = (*kind.suffixes, *(IMAGES.suffixes if kind.folders else ()))
    return all(_as_ending(word).endswith(known) for word in words)


def _as_ending(word: str) -> str:
    return "." + word.lower().lstrip(".")


def _endings(words: Sequence[str], name: str, kind: Kind) -> tuple[str, ...]:
    """The endings that a user chose; UserError where a word is none."""
    stranger = next((word for word in words if not _are_endings([word], kind)), None)
    if stranger is not None:
        known = (*kind.suffixes, *(IMAGES.suffixes if kind.folders else ()))
        what = f"{shown_name(_as_ending(stranger))} is no ending of {kind.name}s"
        rule = "behind :: stand the endings that count, with commas between them: of"
        raise data_error(name, f"{what}; {rule} {', '.join(known)}, also as in left.png")
    return tuple(map(_as_ending, words))


def _only(kind: Kind, endings: tuple[str, ...]) -> Kind:
    """A kind of which only files with these endings count."""
    own = tuple(ending for ending in endings if ending.endswith(kind.suffixes))
    return replace(kind, suffixes=own, chosen=True)


def _mode(path: Path, name: str) -> int:
    """What kind of file a path is, in the bits of ``st_mode``; 0 where there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # no permission, links in a circle, a NUL
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return 0  # a pattern may be longer than the names that it stands for
        raise data_error(name, f"this cannot be opened ({reason_of(error)})") from error


def _open_directory(
    folder: Path, name: str, cache_dir: Path | None, kind: Kind, frames: Kind, words: Sequence[str]
) -> Source:
    files = open_folder(folder, name, cache_dir, kind)
    if len(files):
        return with_parts(files)
    if kind.folders is not None:
        in_folders = FrameFolders(open_folder(folder, name, cache_dir, frames))
        if len(in_folders):
            return in_folders
    archives = open_folder(folder, name, None, _ARCHIVES)
    if len(archives):
        source = open_shards(_paths(archives), name, cache_dir, kind)
        source.notes = (*archives.notes, *source.notes)
        return source
    parquet = open_folder(folder, name, None, _PARQUET)
    if len(parquet):
        return _open_parquet(_paths(parquet), name, cache_dir, kind, words)
    packed = open_folder(folder, name, None, _PACKED)
    if len(packed):
        refuse_packed(Path(packed.path(0)))
    hint = "; videos are for video models, such as model=video_vit_small_patch16"
    what = f"no {kind.name} and no tar shard in this folder; files that count end in"
    told = (hint if kind.name == "image" else "") + "".join(f". {note}" for note in files.notes)
    raise data_error(name, f"{what} {', '.join(kind.suffixes)}, {PARQUET} or .tar{told}")


def _paths(files: Source) -> list[Path]:
    return [Path(files.path(number)) for number in range(len(files))]


def _open_parquet(
    files: Sequence[Path], name: str, cache_dir: Path | None, kind: Kind, words: Sequence[str]
) -> Source:
    if kind.name != IMAGES.name:
        what = f"Parquet files hold images here, no {kind.name}s"
        raise data_error(name, f"{what}; give {FORMS[kind.name]}")
    return open_parquet(files, name, cache_dir, words)


def _open_file(file: Path, name: str, cache_dir: Path | None, kind: Kind) -> Source:
    suffix = file.suffix.lower()
    if suffix in LIST_SUFFIXES:
        return with_parts(open_list(file, name, cache_dir, kind))
    if suffix == ".tar":
        return open_shards([file], name, cache_dir, kind)
    if file.name.lower().endswith(kind.suffixes):
        single = with_parts(open_files([os.fspath(file)], kind))
        if len(single) > 1:
            return single
        what = f"this is a single {kind.name}"
        raise data_error(name, f"{what}; give the folder that it lies in, or a list file")
    if suffix in PACKED_SUFFIXES:
        refuse_packed(file)
    what = f"a file that ends in {shown_name(suffix) or 'nothing'} is no source of {kind.name}s"
    raise data_error(name, f"{what}; give {FORMS[kind.name]}")


def _expand(path: Path, name: str) -> list[Path]:
    """Every name that a pattern stands for: ``{first..last}``, ``{train,val}``, ``*``."""
    choices = [_choices(name, *found.groups()) for found in _BRACES.finditer(str(path))]
    if math.prod(map(len, choices)) > MOST_SHARDS:
        what = f"the pattern stands for more than {MOST_SHARDS:,} shards, the most that it may name"
        raise data_error(name, f"{what}; name those that there are, or give their folder")
    if not choices:
        return sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207, absolute patterns
    texts = _BRACES.split(str(path))[:: _BRACES.groups + 1]  # between the braces
    found: list[str] = []
    for choice in product(*choices):
        each = texts[0] + "".join(map("".join, zip(choice, texts[1:], strict=True)))
        found += sorted(glob.glob(each)) if glob.has_magic(each) else [each]  # noqa: PTH207
    return [Path(each) for each in found]


def _choices(name: str, first: str | None, last: str | None, listed: str | None) -> list[str]:
    """What a pair of braces stands for: words, or numbers with the zeros of the first."""
    if first is None or last is None:
        return str(listed).split(",")
    if max(len(first), len(last)) > _MOST_DIGITS:
        return [""] * (MOST_SHARDS + 1)  # which is refused
    if int(last) < int(first):
        what = f"the range {{{first}..{last}}} runs backwards"
        raise data_error(name, f"{what}; write {{{last}..{first}}}")
    numbers = range(int(first), int(last) + 1)[: MOST_SHARDS + 1]
    return [f"{number:0{len(first)}d}" for number in numbers]


def _nearest(path: Path) -> str:
    """A hint at what lies beside a missing path."""
    if len(path.name) > 255:
        return ""
    try:
        beside = list(islice((entry.name for entry in os.scandir(path.parent)), _MOST_BESIDE))
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, beside, n=3)
    names = " or ".join(shown_name(path.parent / name) for name in close)
    return f" (did you mean {names}?)" if close else ""
