"""Making sure that what was written stays written, is never half there, and may be read by others."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within your quota",
    errno.EACCES: "allow writing there, or name another place",
    errno.EPERM: "allow writing there, or name another place",
    errno.EROFS: "that file system is read-only: name another place",
    errno.ENOENT: "its folder was removed or renamed: put it back, or name another place",
    errno.ENOTDIR: "a part of its path is a file: name another place",
    errno.EISDIR: "a folder has that name: name another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EIO: "that disk reports errors: name another place",
}


def remedy(error: OSError) -> str:
    """What a person can do about a failed write, by its errno."""
    return _REMEDIES.get(error.errno or 0, "see that the place can be written to, or name another one")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file or folder to, which takes the place of ``path`` when the block ends.

    The temporary name carries the process's number, so that two processes never write to one.  When the block raises,
    ``path`` is as it was and nothing is left beside it.  A folder replaces nothing but an absent or empty folder.

    Raises:
        OSError: what writing or renaming raises.
    """
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.new")
    try:
        yield temporary
        settle(temporary)
        temporary.replace(path)
        settle(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Flush a file, or the list of a folder's files (which makes a rename last), to the disk.

    A file also gets the mode that the umask asks for: safetensors leaves its files readable by their owner alone.
    """
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
