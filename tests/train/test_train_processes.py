"""Two processes on gloo: they agree with each other and with one process that sees the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import Toy

from patchmine.train.checkpoint import load

pytestmark = [pytest.mark.bitwise, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("processes.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Folder with what two processes wrote, one of which started the other; and how the first one
    ended.
    """
    folder = tmp_path_factory.mktemp("both")
    return folder, start(str(SCRIPT), str(folder))


def ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("run", ["plain", "accumulate", "astray"])
def test_both_processes_end_with_the_same_weights(both: Any, run: str) -> None:
    first, second = ranks(both[0] / run)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("run", ["plain", "accumulate", "astray"])
def test_two_processes_equal_one_with_the_whole_batch(
    both: Any, run_toy: Callable[..., Any], run: str
) -> None:
    # On one process of two the loss is not finite in two steps; both must skip them, as one process
    # would.
    alone = run_toy("alone", method=Toy(nan_steps=(2, 3)) if run == "astray" else None).state_dict()
    for name, value in ranks(both[0] / run)[0].items():
        torch.testing.assert_close(value, alone[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_log_is_written_once_and_averages_over_processes(
    both: Any, run_toy: Callable[..., Any], tmp_path: Path
) -> None:
    run_toy("alone")

    def read(folder):
        return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]

    together, alone = read(both[0] / "plain"), read(tmp_path / "alone")
    assert [line["step"] for line in together] == [4, 8, 12]
    assert all(line["slowest_rank"] in (0, 1) for line in together)
    assert [len(line["data_wait_by_rank"]) for line in together] == [2, 2, 2]
    assert [line["loss"] for line in together] == pytest.approx(
        [line["loss"] for line in alone], rel=1e-5
    )


def test_a_signal_to_one_process_stops_both_after_the_same_step(both: Any) -> None:
    folder, done = both
    assert done.returncode == 143, done.stderr
    assert done.stdout.count("SIGTERM: stopped after step 7 of 12") == 1
    assert load(folder / "stopped/checkpoints/last").step == 7
    assert not (folder / "stopped/rank1.safetensors").exists()
    for noise in ("distributed_backend", "Tip", "litlogger", "GLOBAL_RANK", "Warning"):
        assert noise not in done.stdout + done.stderr


def test_after_the_first_steps_processes_exchange_gradients_and_nothing_else(both: Any) -> None:
    talks = json.loads((both[0] / "quiet/talks.json").read_text())
    assert set(range(1, 11)) <= set(talks)  # they ask each other for signals
    # Then about every second, and for the glance at the numbers of steps 20 and the last one's.
    assert {step for step in talks if step > 10} == {20, 40}


def test_torchrun_gives_the_same(both: Any, tmp_path: Path) -> None:
    done = start(*TORCHRUN, str(SCRIPT), str(tmp_path))
    assert "exitcode  : 143" in done.stderr
    for name, value in ranks(both[0] / "plain")[0].items():
        assert torch.equal(ranks(tmp_path / "plain")[1][name], value), name
