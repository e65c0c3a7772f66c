"""The golden tests run unchanged on a folder of other sizes, options and names of cases
(`make_vectors.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.golden
def test_golden_second_folder(repository: Path, tmp_path: Path) -> None:
    """All tests of this folder, but this one, in a process of its own: cases are listed when tests
    are collected.
    """
    make = [sys.executable, HERE / "make_vectors.py", tmp_path]
    subprocess.run(make, check=True, timeout=120, cwd=repository)
    environment = {**os.environ, "PATCHMINE_GOLDEN": str(tmp_path)}
    run = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(HERE)]
    done = subprocess.run(
        run,
        env=environment,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    # The released alignment, relative positions of all blocks together, first weights and resized
    # tables are not made.
    skipped = re.search(r"(\d+) skipped", done.stdout)
    assert skipped is None or int(skipped[1]) <= 4, done.stdout[-2000:]
