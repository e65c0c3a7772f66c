"""What decoders in C print on standard error, where they name no file."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.utils.data import get_worker_info

# libjpeg's jerror.h, libpng's png_warning, libtiff's TIFFWarning and TIFFError
_PRINTED = re.compile(
    rb"Corrupt JPEG data|Premature end of JPEG file|Invalid SOS parameters for sequential JPEG"
    rb"|Warning: unknown JFIF revision number|Inconsistent progression sequence for component"
    rb"|Unknown Adobe color transform code|Caution: quantization tables are too coarse"
    rb"|Application transferred too many scanlines|libpng (warning|error): |TIFF\w+: "
)
_capturing = threading.Lock()


@contextmanager
def unnamed_warnings() -> Iterator[None]:
    """Around a decoder: what it prints is not shown, and all else that is printed meanwhile is.

    What cannot be decoded is refused by name anyway.  Nothing happens where the system has no files
    in memory, while another thread does the same, and in a worker, where `quiet_decoding` does it.
    """
    if get_worker_info() is not None or not _capturing.acquire(blocking=False):
        yield
        return
    try:
        opened = _open()
        if opened is None:
            yield
            return
        shown, heard = opened
        try:
            os.dup2(heard, 2)
            yield
        finally:
            _flush()  # what other threads wrote belongs to them
            os.dup2(shown, 2)
            _hand_on(heard)
            os.close(heard)
            os.close(shown)
    finally:
        _capturing.release()


def _open() -> tuple[int, int] | None:
    """Standard error as it is, and a file in memory; None where there is no such thing."""
    if not hasattr(os, "memfd_create"):
        return None
    _flush()
    try:
        shown = os.dup(2)
    except OSError:  # closed, as in a program without a terminal
        return None
    try:
        return shown, os.memfd_create("stderr")
    except OSError:  # too many files are open
        os.close(shown)
        return None


def _flush() -> None:
    if sys.stderr is not None and not sys.stderr.closed:
        sys.stderr.flush()


def _hand_on(heard: int) -> None:
    """Write what is no warning of a decoder to standard error."""
    size = os.lseek(heard, 0, os.SEEK_CUR)
    if size == 0:
        return
    lines = os.pread(heard, size, 0).splitlines(keepends=True)
    others = b"".join(line for line in lines if not _PRINTED.match(line))
    with suppress(OSError):  # nobody reads it any more
        while others:
            others = others[os.write(2, others) :]
