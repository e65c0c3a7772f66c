"""Making sure that what was written stays written, and that others may read it."""

from __future__ import annotations

import os
from pathlib import Path


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
