"""From what the user typed after ``data=`` to a source of images, or of videos."""

from __future__ import annotations

import difflib
import errno
import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.video import VIDEOS, backend_name
from patchmine.data.settings import LIST_SUFFIXES, REMOTE_GB
from patchmine.data.sources.addresses import is_address, open_address
from patchmine.data.sources.archive import PACKED_SUFFIXES, refuse_packed
from patchmine.data.sources.combine import DatasetSource, Joined
from patchmine.data.sources.contract import IMAGES, Kind, Labels, Source, data_error
from patchmine.data.sources.embedded import open_embedded
from patchmine.data.sources.folder import FrameFolders, open_folder
from patchmine.data.sources.listfile import open_files, open_list
from patchmine.data.sources.members import is_array_folder
from patchmine.data.sources.parquet import SUFFIX as PARQUET
from patchmine.data.sources.parquet import open_parquet
from patchmine.data.sources.parts import images_in, with_parts
from patchmine.data.sources.patterns import are_endings, endings_of, has_braces, spellings, split
from patchmine.data.sources.rows import RowSource, is_rows
from patchmine.data.sources.shards import open_shards
from patchmine.data.sources.windows import is_window_list, open_windows
from patchmine.errors import UserError, reason_of, shown_name

__all__ = ["KINDS", "Labels", "Source", "Spec", "decoder_of", "default_cache_dir", "open_source"]

Spec = str | Path | Dataset[Any] | Source | Sequence["Spec"]

KINDS = {"image": IMAGES, "video": VIDEOS}

_MOST_BESIDE = 10_000  # names that are looked through for one that is meant

_ARCHIVES = Kind("shard", (".tar",), str, chosen=True)
_PARQUET = Kind("Parquet file", (PARQUET,), str, chosen=True)
_PACKED = Kind("archive", PACKED_SUFFIXES, str, chosen=True)
_LISTS = (
    f"a list file ({', '.join(LIST_SUFFIXES)}), "
    "tar shards (a folder, a pattern, shard-{000..099}.tar)"
)
FORMS = {
    "image": f"a folder of images, {_LISTS}, Parquet files, such at s3://... or embedded:photos",
    "video": f"a folder of videos or of folders of frames, {_LISTS} or embedded:moving-photos",
}


def open_source(
    spec: Spec, kind: str = "image", *, cache_dir: Path | None = None, remote_gb: float = REMOTE_GB
) -> Source:
    """The images of a folder, list, shards, ``embedded:photos`` or torch Dataset, or of several.

    Args:
        spec: one of these, or a list; behind a name, ``::jpg,left.png`` lets only files with these
            endings count.
        kind: "image" or "video"; videos may also be folders of frames, or
            ``embedded:moving-photos``.
        cache_dir: where the indices of folders, lists and shards are kept; None: nowhere.  What is
            read from addresses is kept there, or else in the user's cache folder.
        remote_gb: most that this may take.

    Returns:
        A source: ``len(source)`` items, ``source.fingerprint`` of all their names and sizes.

    Raises:
        UserError: there is nothing of that name, nothing in it, or nothing that could decode it.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind}: a source is of {' or '.join(map(repr, KINDS))}")
    source = _opened(spec, KINDS[kind], cache_dir, int(remote_gb * 1e9))
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


def _opened(spec: Spec, kind: Kind, cache_dir: Path | None, limit: int) -> Source:
    forms = FORMS[kind.name]
    if isinstance(spec, Source):
        return spec
    if is_rows(spec):
        return RowSource(spec)
    if isinstance(spec, Dataset):
        return DatasetSource(spec)
    if isinstance(spec, str | Path):
        return _open_named(os.fspath(spec), cache_dir, kind, limit)
    if isinstance(spec, Sequence):
        parts = [_opened(part, kind, cache_dir, limit) for part in spec]
        if not parts:
            raise UserError(f"data=[]: name at least one source of {kind.name}s: {forms}")
        return parts[0] if len(parts) == 1 else Joined(parts)
    what = f"a {type(spec).__name__} is no source of {kind.name}s"
    raise UserError(f"data={spec!r}: {what}; give {forms}, or a Dataset of torch or datasets")


def _open_named(name: str, cache_dir: Path | None, kind: Kind, limit: int) -> Source:
    if not name.strip():
        forms = FORMS[kind.name]
        raise UserError(f"data= is empty; give {forms} (data=. is the current folder)")
    if is_address(name):
        return open_address(name, kind, cache_dir or default_cache_dir(), limit)
    return _open_local(name, cache_dir, kind)


def _open_local(name: str, cache_dir: Path | None, kind: Kind) -> Source:
    if name.startswith("embedded:"):
        return open_embedded(name, kind)
    path, words = _split(name)
    mode = _mode(path, name)
    parquet = _parquet_files(path, mode, name, kind, words)
    if parquet:
        return _open_parquet(parquet, name, cache_dir, kind, words)
    endings = endings_of(words, name, kind)
    frames = _only(IMAGES, endings) if endings else IMAGES
    kind = _only(kind, endings) if endings else kind
    if stat.S_ISDIR(mode) and not is_array_folder(path.name, kind):
        return _open_directory(path, name, cache_dir, kind, frames, words)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
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
        are_columns = bool(words) and not are_endings(words, kind)
        return _paths(open_folder(path, name, None, _PARQUET)) if are_columns else []
    if path.suffix.lower() != PARQUET:
        return []
    return [path] if stat.S_ISREG(mode) else _expand(path, name)


def _open_pattern(path: Path, name: str, cache_dir: Path | None, kind: Kind) -> Source:
    shards = _expand(path, name)
    if not shards:
        what = f"there is no such file or folder{_nearest(path)}"
        if name.startswith("pipe:"):
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
    """A path, and the words behind it."""
    place, words = split(name)
    try:
        return Path(place).expanduser(), words
    except RuntimeError:  # of ~somebody who is not known here
        return Path(place), words


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
    if is_window_list(file):
        return open_windows(file, name, cache_dir, kind)
    if suffix in LIST_SUFFIXES:
        return with_parts(open_list(file, name, cache_dir, kind))
    if suffix == ".tar":
        return open_shards([file], name, cache_dir, kind)
    if file.name.lower().endswith(kind.suffixes):
        if _images_in(file, name, kind) > 1:
            return with_parts(open_files([os.fspath(file)], kind))
        what = f"this is a single {kind.name}"
        raise data_error(name, f"{what}; give the folder that it lies in, or a list file")
    if suffix in PACKED_SUFFIXES:
        refuse_packed(file)
    what = f"a file that ends in {shown_name(suffix) or 'nothing'} is no source of {kind.name}s"
    raise data_error(name, f"{what}; give {FORMS[kind.name]}")


def _images_in(file: Path, name: str, kind: Kind) -> int:
    """Of a file, or a folder that is one array; UserError where there is none."""
    if kind.name != "image":
        return 1
    try:
        count = images_in(os.fspath(file))
    except (OSError, DecodeError) as error:
        raise data_error(name, f"this {reason_of(error)}") from error
    if not count:
        raise data_error(name, f"there is no image in it; give {FORMS[kind.name]}")
    return count


def _expand(path: Path, name: str) -> list[Path]:
    """Every name that a pattern stands for: ``{first..last}``, ``{train,val}``, ``*``."""
    text = str(path)
    if not has_braces(text):
        return sorted(map(Path, glob.glob(text)))  # noqa: PTH207, absolute patterns
    found: list[str] = []
    for each in spellings(text, name):
        found += sorted(glob.glob(each)) if glob.has_magic(each) else [each]  # noqa: PTH207
    return [Path(each) for each in found]


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
