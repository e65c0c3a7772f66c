"""Two processes on gloo train what one trains with the whole batch: the gradients, the teachers and the centres."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distilled.py")


def trained(name: str, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), name, str(folder), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("name", ["dino", "mokd"])
def test_two_processes_equal_one_with_the_whole_batch(name: str, tmp_path: Path) -> None:
    alone, together = trained(name, tmp_path / "alone", 1), trained(name, tmp_path / "together", 2)
    centres = [tensor for key, tensor in alone.items() if key.endswith(".mean")]
    assert len(centres) == {"dino": 1, "mokd": 4}[name]
    assert all(centre.abs().max() > 1e-4 for centre in centres)  # they moved
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, atol=2e-6, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")
