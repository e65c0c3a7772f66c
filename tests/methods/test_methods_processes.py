"""Two processes on gloo train what one trains with the whole batch: gradients, teachers, centres,
batch statistics.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import distilled
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from patchmine.models.batch_norm import SyncBatchNorm, synchronise_batch_norms
from patchmine.train.engine import Engine

SCRIPT = Path(__file__).with_name("distilled.py")


class Folders(NamedTuple):
    """What one process left, and what two left."""

    alone: Path
    together: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made = Folders(tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together"))
    distilled.main(Engine(device="cpu"), made.alone)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(made.together)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", distilled.CASES)
def test_two_processes_equal_one_with_the_whole_batch(folders: Folders, name: str) -> None:
    alone, together = (load_file(folder / name / "weights.safetensors") for folder in folders)
    assert alone.keys() == together.keys()
    centres = [tensor for key, tensor in alone.items() if "centre" in key]
    assert len(centres) == (1 if name == "dino" else 4)
    assert all(centre.abs().max() > 1e-4 for centre in centres)  # they moved
    if name in ("dino", "mokd"):
        for key, value in alone.items():
            torch.testing.assert_close(
                together[key], value, atol=2e-6, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}"
            )
        return
    # A ReLU opens or closes for a rounding, so that single numbers may differ; statistics of half
    # of the rows would make another step of the whole tensor.
    before = distilled.build(name).state_dict()
    assert any("running_var" in key for key in alone)
    for key, value in alone.items():
        moved = torch.linalg.vector_norm((value - before[key]).double())
        assert torch.linalg.vector_norm((together[key] - value).double()) <= 1e-2 * moved + 1e-6, (
            key
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", distilled.CASES)
def test_losses_and_gradients_are_those_of_the_whole_batch(folders: Folders, name: str) -> None:
    alone, together = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    )
    assert len(together) == len(alone) == distilled.STEPS
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in together] == pytest.approx(
            [line[key] for line in alone], rel=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", distilled.NORMS)
def test_a_batch_norm_of_unequal_shares_is_that_of_all_rows(folders: Folders, name: str) -> None:
    whole = torch.load(folders.alone / f"{name}-0.pt")
    parts = [torch.load(folders.together / f"{name}-{rank}.pt") for rank in (0, 1)]
    for key, value in whole.items():
        by_row = key in ("output", "grad_x", "still")
        for made in (
            [torch.cat([part[key] for part in parts])] if by_row else [part[key] for part in parts]
        ):
            torch.testing.assert_close(
                made, value, atol=1e-11, rtol=1e-11, msg=lambda text, k=key: f"{k}: {text}"
            )


def test_a_batch_norm_changes_its_class_and_nothing_else() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4)))
    names, tensors = (
        list(module.state_dict()),
        [tensor.data_ptr() for tensor in module.state_dict().values()],
    )
    x = torch.randn(5, 3, 2, 2)
    before = module[:2](x)
    synchronise_batch_norms(module)
    assert [type(part) is SyncBatchNorm for part in (module[0], module[1], module[2][0])] == [
        False,
        True,
        True,
    ]
    assert list(module.state_dict()) == names
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == tensors
    assert torch.equal(module[:2](x), before)  # a process by itself computes what it computed


def test_a_batch_norm_that_is_not_known_is_refused() -> None:
    class Other(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match=r"0\.norm is a Other, which cannot be synchronised"):
        synchronise_batch_norms(nn.Sequential(nn.ModuleDict({"norm": Other(3)})))
