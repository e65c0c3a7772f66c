"""Whatever ends one of three processes ends all of them, with one sentence and exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patchmine.train.checkpoint import load

SCRIPT = Path(__file__).with_name("ending.py")
HOST = socket.gethostname()
SENTENCES = {
    "mistake": f"rank 2 on {HOST}: data=photos does not exist\n",
    "killed": f"rank 2 on {HOST} ended without a word (killed, out of memory, or its machine is gone); go on with"
    " `patchmine resume r`\n",
    "first": f"rank 0 on {HOST} ended without a word (killed, out of memory, or its machine is gone); go on with"
    " `patchmine resume r`\n",
}


def gone(process: int) -> bool:
    """Whether it ends by itself; one that nobody collects counts."""
    for _ in range(300):
        try:
            if ") Z" in Path(f"/proc/{process}/stat").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mistake", "killed", "first"])
def test_one_process_ends_all(case: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), case],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment,
    )
    assert done.returncode == (-9 if case == "first" else 2), done.stderr
    said = [
        line for line in done.stderr.splitlines(keepends=True) if not line.startswith("[")
    ]  # gloo's own log
    # Where the first process is gone its machine has two others, and each says so.
    assert said == [SENTENCES[case]] * (2 if case == "first" else 1)
    for rank in range(3):
        assert gone(int((tmp_path / f"process{rank}").read_text()))
    for rank in range(3):
        differ, batch = (tmp_path / f"said{rank}.txt").read_text().splitlines()
        assert differ == (
            f"the processes of this run differ: data is 4 items on {HOST} (rank 0) and 3 items "
            f"on {HOST} (rank 2); give"
            " all of them the same"
        )
        assert batch == (
            "batch_size=8 cannot be shared out to 3 processes x accumulate=1: start 2 or 4 "
            "processes (devices x"
            " num_nodes; a resumed run may change it), or in a new run use a multiple of 3"
        )
    if case != "mistake":
        assert load(tmp_path / "checkpoints/last").step == 10
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
            "last",
            "step-00000005.safetensors",
            "step-00000010.safetensors",
        }
