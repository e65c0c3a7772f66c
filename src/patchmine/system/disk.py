"""Making sure that what was written stays written and is never half there."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchmine.errors import UserError, reason_of, shown_name

_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`), or name another place",
    errno.EACCES: "allow writing there, or name another place",
    errno.EPERM: "allow writing there, or name another place",
    errno.EROFS: "that file system is read-only: name another place",
    errno.ENOENT: "its folder was removed or renamed: put it back, or name another place",
    errno.ENOTDIR: "a part of its path is a file: name another place",
    errno.EISDIR: "a folder has that name: name another place",
    errno.EEXIST: "something else, a broken link perhaps, has that name: name another place",
    errno.ELOOP: "a link stands there that leads nowhere or may not be followed: remove it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EIO: "that disk reports errors: name another place",
}

# What file systems say that have no modes, no flushing of folders, no links, no replacing (FAT,
# SMB, FUSE).
_UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.EBADF,
}

# Names of what is being written: those of `replacing`, and of folders that replace a whole one.
_TEMPORARY = re.compile(r"\..+\.\d+\.new(\.[^.]+)?|\..+\.(new|old)-\d+|\.writing(\.\d+)?")

_FREE_SHARE = 0.1  # of a disk, which caches leave to others


def leaves_room(folder: Path, size: int) -> bool:
    """Whether so many bytes more leave others enough of the disk that a folder lies on."""
    disk = shutil.disk_usage(folder)
    return disk.free - size >= _FREE_SHARE * disk.total


def remedy(error: OSError) -> str:
    """What a person can do about a failed write, by its errno."""
    return _REMEDIES.get(
        error.errno or 0, "see that the place can be written to, or name another one"
    )


def refusal(error: OSError, doing: str = "cannot be read or written") -> str:
    """One sentence about a failed access: the file, what it failed with, and what can be done."""
    name = error.filename2 or error.filename
    what = (
        shown_name(os.fsdecode(name))
        if isinstance(name, str | bytes | os.PathLike)
        else "a file or stream"
    )
    return f"{what} {doing} ({error.strerror or error}); {remedy(error)}"


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Around safetensors' ``save_file``, which only quotes the system's error: the OSError that it
    was, of ``path``.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        quoted = re.search(r"(?:code: |os error )(\d+)", str(error))
        number = int(quoted[1]) if quoted else 0
        raise OSError(
            number, os.strerror(number) if number else reason_of(error), str(path)
        ) from error


@contextmanager
def output(path: Path, setting: str = "out") -> Iterator[Path]:
    """A name to write the file of ``out=path`` to, which takes its place whole; its folder is made.

    Raises:
        UserError: ``path`` cannot be written (a folder, below a file, a full disk), with the
        ``setting`` that names it and the remedy.
    """
    with _writing(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with replacing(path) as new:
            yield new


@contextmanager
def output_folder(path: Path, setting: str = "out") -> Iterator[Path]:
    """The same of a new folder ``out=path``: an empty one to fill, which takes its place whole.

    Who fills it flushes its files (`settle`).

    Raises:
        UserError: as `output` does, and where there is a file or a folder that is not empty.
    """
    with _writing(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if path.is_dir() and any(path.iterdir()):
            held = shown_name(min(entry.name for entry in path.iterdir()))
            name = shown_name(path)
            raise UserError(f"{setting}={name} holds other things ({held}): name a new folder")
        with replacing(path.resolve()) as new:
            new.mkdir()
            yield new


@contextmanager
def exchanging(folder: Path) -> Iterator[Path]:
    """The same of a folder that may be there, whose older content it replaces.

    Who fills it flushes its files (`settle`).  Between two renames there is an instant without
    ``folder``: no call of all systems exchanges two.

    Raises:
        OSError: what writing or renaming raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{age}-{os.getpid()}") for age in ("new", "old"))
    new.mkdir()
    try:
        yield new
        settle(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def refuse_other_content(folder: Path, needed: Collection[str], more: Collection[str] = ()) -> None:
    """UserError where ``out=folder`` is a link or a file, or holds anything but an older export.

    Args:
        folder: what is to be written; it may be missing.
        needed: the files that every export of its kind has.
        more: the others that one may have.
    """
    if folder.is_symlink() or folder.is_file():
        kind = "link" if folder.is_symlink() else "file"
        raise UserError(f"out={folder} is a {kind}: choose another folder for the export")
    content = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    whole = set(needed) <= set(content)
    other = [name for name in content if not whole or name not in {*needed, *more}]
    if other:
        raise UserError(
            f"out={folder} holds other things than an export (such as {other[0]}): choose an empty "
            "or new folder"
        )


@contextmanager
def _writing(path: Path, setting: str) -> Iterator[None]:
    """What the system refuses is a UserError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError):  # of making a folder where a file is
            error = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        raise UserError(
            f"{setting}={shown_name(path)} cannot be written ({error.strerror or error}); "
            f"{remedy(error)}"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file or folder to, which takes the place of ``path`` when
    the block ends.

    The temporary name carries the process's number, so that two processes never write to one, and
    ends as ``path`` does, because some writers choose the format by it.  When the block raises,
    ``path`` is as it was and nothing is left beside it.  A folder replaces nothing but an absent or
    empty folder.

    Raises:
        OSError: what writing or renaming raises.
    """
    temporary = path.with_name(f".{path.stem[:100]}.{os.getpid()}.new{path.suffix}")
    try:
        yield temporary
        settle(temporary)
        _rename(temporary, path)
        settle(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that nobody else writes to now."""
    for left in [*folder.glob(".*")] if folder.is_dir() else []:
        if not _TEMPORARY.fullmatch(left.name):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()


def _rename(temporary: Path, path: Path) -> None:
    """Rename over ``path``; where a file system cannot replace a file, it is removed first."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EEXIST} or not path.is_file():
            raise
        path.unlink()
        temporary.rename(path)


def settle(path: Path) -> None:
    """Flush a file, or the list of a folder's files (which makes a rename last), to the disk.

    A file also gets the mode that the umask asks for: safetensors leaves its files readable by
    their owner alone. What a file system does not support is left out; what it fails at (a full
    disk, a broken one) is raised.
    """
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        with _where_supported():
            path.chmod(0o666 & ~mask)
    with _where_supported():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _where_supported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
