"""Two processes on gloo train what one trains with the whole batch: the gradients, the teacher and the centre."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distilled.py")


def trained(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "weights.safetensors")


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    alone, together = trained(tmp_path / "alone", 1), trained(tmp_path / "together", 2)
    assert alone["centre.mean"].abs().max() > 1e-3  # it moved
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=2e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
