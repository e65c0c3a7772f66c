"""Small campaigns of every kind; `make faults` makes the large ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = {
    "mutants": "MUTANTS=1200",
    "kills": "KILLS=12",
    "crashes": "CRASHES=40",
    "full-disk": "FULL_DISK=30",
    "outputs": "OUTPUTS=40",
    "shared-folder": "SHARED=1",
    "killed-rank": "RANKS=2",
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("group", SIZES)
def test_nothing_does_what_it_may_not(group: str) -> None:
    program = Path(__file__).parent
    command = [sys.executable, str(program), f"ONLY={group}", SIZES[group], "SEED=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1100, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
