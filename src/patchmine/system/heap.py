"""What becomes of the memory that this process frees on the processor.

glibc gives large blocks back to the system, and the next step asks for them again: pages that are
made and zeroed anew, 20,000 in a step of a small network, which is a tenth of its time.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DECIDING = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed() -> None:
    """What is freed from now on stays with this process, for what it needs next.

    Only glibc can be told so; nothing happens with others, and where the user decided by glibc's
    own variables.
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def give_back_freed() -> None:
    """The end of `keep_freed`: what was kept goes back, and from now on glibc's own rules hold, as
    they stand once it has freed large blocks.
    """
    _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}, trim=True)


def _set(options: dict[int, int], trim: bool = False) -> None:
    decided = any(name in os.environ for name in _DECIDING)
    if decided or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        for option, value in options.items():
            library.mallopt(option, value)
        if trim:
            library.malloc_trim(0)
