"""Memory that is freed and taken again, by the pages that the system had to make for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Frees and takes again what a step does, and prints the pages made in the last three rounds.
_ROUNDS = """
import resource, threading
import numpy as np
from patchmine.system import heap

def step():
    held = [np.ones((size, 1 << 20), np.float32) for size in (1, 10)]  # 4 and 40 MB
    del held

def pages(rounds=3):
    for _ in range(5):  # until the heap is as large as a step needs it
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's memory is managed so"
)


def numbers_of(script: str, **variables: str) -> list[int]:
    """What a process of its own prints."""
    deciding = ("MALLOC_", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(deciding)}
    done = subprocess.run(
        [sys.executable, "-c", _ROUNDS + script],
        env=kept | {"NUMPY_MADVISE_HUGEPAGE": "0"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


def test_a_processor_that_computes_keeps_what_it_frees() -> None:
    script = """
from patchmine.train.engine import Engine
print(pages()); Engine("cpu"); print(pages())
"""
    before, after = numbers_of(script)
    assert before > 10_000
    assert after < 100


def test_what_is_kept_is_given_back_when_told_so() -> None:
    script = """
def resident():  # MB
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            print(int(line.split()[1]) >> 10)

resident(); heap.keep_freed(); step(); resident(); heap.give_back_freed(); resident()
"""
    begun, kept, given = numbers_of(script)
    assert kept > begun + 30
    assert given < begun + 15


def test_a_thread_beside_finds_room_too() -> None:
    script = """
heap.keep_freed()
for _ in range(2):
    beside = threading.Thread(target=step)
    beside.start()
    step()
    beside.join()
print(pages())
"""
    assert numbers_of(script)[0] < 100


def test_who_set_the_variables_of_glibc_decides() -> None:
    for name, value in (("MALLOC_MMAP_MAX_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")):
        script = "heap.keep_freed(); print(pages())"
        assert numbers_of(script, **{name: value})[0] > 10_000
