"""Weights divided among processes on gloo: the numbers, the memory and the checkpoints of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from safetensors.torch import load_file
from torch.distributed import device_mesh, fsdp

from patchmine.errors import UserError
from patchmine.train.checkpoint import list_checkpoints, load
from patchmine.train.engine import Engine, refuse_unshardable
from patchmine.train.launch import Launch
from patchmine.train.settings import TrainSettings
from patchmine.train.sharding import divide

SCRIPT = Path(sharded.__file__)


def start(processes: int, *words: str, nodes: int = 1) -> list[subprocess.Popen[str]]:
    """`sharded.py` in so many processes, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_each = processes // nodes
    started = []
    for rank in range(processes):
        own = dict(
            RANK=rank,
            LOCAL_RANK=rank,  # of one machine, which these share even where they stand for two
            WORLD_SIZE=processes,
            LOCAL_WORLD_SIZE=on_each,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            TORCHELASTIC_RUN_ID="sharded",
            TORCHELASTIC_USE_AGENT_STORE="False",
            OMP_NUM_THREADS=1,
        )
        environment = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, str(SCRIPT), *words]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=900)[0] for process in processes]


def run(processes: int, *words: str, nodes: int = 1) -> None:
    started = start(processes, *words, nodes=nodes)
    told = finish(started)
    assert [process.returncode for process in started] == [0] * processes, "\n".join(told)


def assert_alike(made: Path, wanted: Path, name: str, *, times: float = 1.0) -> None:
    """The same weights but for rounding, or so many times that of float32.

    AdamW makes a step of full length out of a gradient that is rounding only, as of the keys'
    biases: together they still move as they should.
    """
    whole = distance = 0.0
    got, want = (load_file(folder / name / "weights.safetensors") for folder in (made, wanted))
    before = sharded.build(name).state_dict()
    assert got.keys() == want.keys()
    for key, value in want.items():
        first = before[key] if before[key].shape == value.shape else torch.zeros_like(value)
        moved = torch.linalg.vector_norm(value.double() - first.double())
        off = torch.linalg.vector_norm(got[key].double() - value.double())
        whole, distance = whole + float(moved) ** 2, distance + float(off) ** 2
        assert key.endswith("bias") or off <= times * 1e-2 * moved + 1e-6, (
            f"{key}: {off:.3g} of {moved:.3g}"
        )
    assert distance <= (times * 2e-3) ** 2 * whole, f"{distance**0.5:.3g} of {whole**0.5:.3g}"


def lines(folder: Path, name: str) -> list[dict[str, float]]:
    text = (folder / name / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the joint batch."""
    folder, engine = tmp_path_factory.mktemp("alone"), Engine(device="cpu")
    for name in sharded.CASES:
        sharded.train_case(engine, folder, name, sharded.STEPS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "processes", "nodes"), [("fsdp", 2, 1), ("hybrid", 4, 2)])
def test_divided_weights_become_those_of_one_process(
    alone: Path, tmp_path: Path, sharding: str, processes: int, nodes: int
) -> None:
    run(processes, str(tmp_path), sharding, str(sharded.STEPS), *sharded.CASES, nodes=nodes)
    for name in sharded.CASES:
        assert_alike(tmp_path, alone, name)
        for key in ("loss", "grad_norm"):
            want = [line[key] for line in lines(alone, name)]
            assert [line[key] for line in lines(tmp_path, name)] == pytest.approx(want, rel=1e-4)
        whole = json.loads((alone / name / "held-0.json").read_text())
        for rank in range(processes):
            held = json.loads((tmp_path / name / f"held-{rank}.json").read_text())
            assert held <= 0.6 * whole, f"{name}: {held} of {whole} bytes on rank {rank}"


@pytest.mark.slow
def test_parts_of_a_batch_and_blocks_computed_again_change_nothing(
    alone: Path, tmp_path: Path
) -> None:
    ways = ("accumulate=2", "remat=blocks")
    names = [f"{name}+{way}" for way in ways for name in ("mae", "hpm")]
    run(2, str(tmp_path), "fsdp", str(sharded.STEPS), *names, "mokd+remat=blocks")
    for name in ("mae", "hpm"):
        for way in ways:
            assert_alike(tmp_path / way, alone, name)
    assert_alike(tmp_path / "remat=blocks", alone, "mokd")
    held = [json.loads((tmp_path / way / "hpm" / "held-0.json").read_text()) for way in ways]
    assert held[0] == held[1]  # no whole gradients between the parts of a batch


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "sharding"), [("nadamw", "fsdp"), ("muon", "ddp")])
def test_other_optimizers_make_of_parts_what_they_make_of_the_whole(
    tmp_path: Path, optimizer: str, sharding: str
) -> None:
    given = f"optimizer={optimizer}"
    sharded.train_case(
        Engine(device="cpu"), tmp_path / "alone", "mae", sharded.STEPS, optimizer=optimizer
    )
    run(2, str(tmp_path), sharding, str(sharded.STEPS), f"mae+{given}")
    times = 4.0 if optimizer == "muon" else 1.0  # which turns matrices in bfloat16
    assert_alike(tmp_path / given, tmp_path / "alone", "mae", times=times)


@pytest.mark.slow
def test_parts_in_the_hosts_memory_change_no_bit(tmp_path: Path) -> None:
    ways = ("sharding=fsdp+offload=false", "sharding=fsdp+offload=true")
    run(2, str(tmp_path), "fsdp", str(sharded.STEPS), *(f"hpm+{way}" for way in ways))
    here, there = (load_file(tmp_path / way / "hpm" / "weights.safetensors") for way in ways)
    assert all(torch.equal(there[key], value) for key, value in here.items())


@pytest.mark.slow
def test_any_number_of_processes_goes_on_from_any_checkpoint(alone: Path, tmp_path: Path) -> None:
    names = ("hpm", "mokd", "amt")
    for number, (processes, sharding) in enumerate(
        [(2, "fsdp"), (1, "ddp"), (4, "fsdp"), (2, "ddp")], start=1
    ):
        run(processes, str(tmp_path), sharding, str(number), *names)
        newest = list_checkpoints(tmp_path / "hpm" / "checkpoints")[-1]
        assert newest.is_dir() == (sharding != "ddp")
        assert load(newest).step == number
    for name in names:
        assert_alike(tmp_path, alone, name)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_checkpoints_in_the_background_are_those_that_are_waited_for(
    tmp_path: Path, sharding: str
) -> None:
    ways = ("saving=blocking", "saving=background")
    run(2, str(tmp_path), sharding, str(sharded.STEPS), *(f"hpm+{way}" for way in ways))
    kept = [list_checkpoints(tmp_path / way / "hpm" / "checkpoints") for way in ways]
    assert len(kept[0]) == len(kept[1]) == sharded.STEPS
    assert all(path.is_dir() == (sharding == "fsdp") for path in kept[1])
    for waited, beside in zip(*(map(load, paths) for paths in kept), strict=True):
        assert (waited.step, waited.facts) == (beside.step, beside.facts)
        for one, other in ((waited.model, beside.model), (waited.optimizer, beside.optimizer)):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "saving"), [(0, "blocking"), (1, "blocking"), (1, "background")]
)
def test_a_killed_process_loses_nothing_that_was_written(
    alone: Path, tmp_path: Path, victim: int, saving: str
) -> None:
    way, given = tmp_path / f"saving={saving}", f"hpm+saving={saving}"
    started = start(2, str(tmp_path), "fsdp", str(sharded.STEPS), given)
    end = time.monotonic() + 300
    while not list_checkpoints(way / "hpm" / "checkpoints") and time.monotonic() < end:
        time.sleep(0.002)
    started[victim].send_signal(signal.SIGKILL)
    told = finish(started)
    assert started[victim].returncode == -signal.SIGKILL
    assert started[1 - victim].returncode == 2, told
    assert f"rank {victim} on" in told[1 - victim]
    for path in list_checkpoints(way / "hpm" / "checkpoints"):
        load(path)
    run(2, str(tmp_path), "fsdp", str(sharded.STEPS), given)
    assert_alike(way, alone, "hpm")
    left = [path.name for path in (way / "hpm" / "checkpoints").glob(".*")]
    assert not left


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_offloaded_parts_have_torchs_policy(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    given = list[dict[str, Any]]()
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *_, **__: None)
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **how: given.append(how))
    for offload in (False, True):
        divide(sharded.build("mae"), (2,), torch.device(device), "fp32", offload=offload)
    half = len(given) // 2  # each block, and the rest
    assert not any("offload_policy" in how for how in given[:half])
    policies = [how["offload_policy"] for how in given[half:]]
    assert len(policies) == 5
    assert all(isinstance(policy, fsdp.CPUOffloadPolicy) for policy in policies)
    assert {policy.pin_memory for policy in policies} == {device == "cuda"}


def test_weights_are_divided_among_several_processes_only() -> None:
    with pytest.raises(ValueError, match=r"parts of divided weights .*set sharding=fsdp"):
        TrainSettings(offload=True)
    with pytest.raises(UserError, match=r"sharding=fsdp divides .* has one: set sharding=ddp"):
        Engine(device="cpu", sharding="fsdp")
    with pytest.raises(UserError, match="2 processes on each of 1 machines: set sharding=fsdp"):
        refuse_unshardable("hybrid", Launch(world_size=2, local_size=2))
    with pytest.raises(UserError, match="1 processes on each of 2 machines: set sharding=fsdp"):
        refuse_unshardable("hybrid", Launch(world_size=2, local_size=1))
