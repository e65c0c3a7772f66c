"""Weights divided among processes on gloo: the numbers, the memory and the checkpoints of one."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from safetensors.torch import load_file
from torch.distributed import device_mesh, fsdp

from fixtures.ranks import finish, start_ranks
from patchmine.errors import UserError
from patchmine.train.checkpoint import list_checkpoints, load
from patchmine.train.engine import Engine, refuse_unshardable
from patchmine.train.launch import Launch
from patchmine.train.settings import TrainSettings
from patchmine.train.sharding import divide

SCRIPT = Path(sharded.__file__)


def start(processes: int, *words: str, nodes: int = 1) -> list[subprocess.Popen[str]]:
    """`sharded.py` in so many processes."""
    return start_ranks([[str(SCRIPT), *words]] * processes, nodes)


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
@pytest.mark.parametrize(
    ("sharding", "processes", "nodes"),
    [("ddp", 2, 1), ("ddp", 4, 1), ("fsdp", 2, 1), ("fsdp", 4, 1), ("hybrid", 4, 2)],
)
def test_several_processes_come_to_the_weights_of_one(
    alone: Path, tmp_path: Path, sharding: str, processes: int, nodes: int
) -> None:
    run(processes, str(tmp_path), sharding, str(sharded.STEPS), *sharded.CASES, nodes=nodes)
    for name in sharded.CASES:
        assert_alike(tmp_path, alone, name)
        for key in ("loss", "grad_norm"):
            want = [line[key] for line in lines(alone, name)]
            assert [line[key] for line in lines(tmp_path, name)] == pytest.approx(want, rel=1e-4)
        if name == "hpm":
            assert max(want) > sharded.CASES[name]["clip_grad"]  # gradients are clipped
        if sharding == "ddp":
            continue
        whole = json.loads((alone / name / "held-0.json").read_text())
        most = 0.6 if processes == 2 * nodes else 0.35
        for rank in range(processes):
            held = json.loads((tmp_path / name / f"held-{rank}.json").read_text())
            assert held <= most * whole, f"{name}: {held} of {whole} bytes on rank {rank}"


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
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_several_processes_miss_the_pixels_that_one_does(tmp_path: Path, sharding: str) -> None:
    names = ("mae", "hpm", "amt")
    for name in names:
        sharded.train_case(Engine(device="cpu"), tmp_path / "alone", name, sharded.STEPS, gaps=True)
    given = [f"{name}+gaps=1" for name in names]
    run(2, str(tmp_path), sharding, str(sharded.STEPS), *given)
    for name in names:
        assert_alike(tmp_path / "gaps=1", tmp_path / "alone", name)
        counted = [
            [line["counted"] for line in lines(folder, name)]
            for folder in (tmp_path / "gaps=1", tmp_path / "alone")
        ]
        assert counted[0] == pytest.approx(counted[1], rel=1e-6)
        assert all(0 < share < 1 for share in counted[0])


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
    names = ("mae", "hpm", "mokd", "amt")
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
    ("name", "sharding", "processes", "victim", "saving"),
    [
        ("hpm", "fsdp", 2, 0, "blocking"),
        ("mokd", "fsdp", 2, 1, "blocking"),
        ("hpm", "fsdp", 2, 1, "background"),
        ("mae", "fsdp", 4, 3, "blocking"),
        ("amt", "ddp", 2, 1, "blocking"),
    ],
)
def test_a_killed_process_loses_nothing_that_was_written(
    alone: Path, tmp_path: Path, name: str, sharding: str, processes: int, victim: int, saving: str
) -> None:
    way = tmp_path / f"saving={saving}"
    words, checkpoints = (sharding, str(sharded.STEPS), f"{name}+{way.name}"), way / name
    started, end = start(processes, str(tmp_path), *words), time.monotonic() + 300
    while not list_checkpoints(checkpoints / "checkpoints") and time.monotonic() < end:
        time.sleep(0.002)
    started[victim].send_signal(signal.SIGKILL)
    told = finish(started)
    for rank, process in enumerate(started):
        assert process.returncode == (-signal.SIGKILL if rank == victim else 2), told
        assert rank == victim or f"rank {victim} on" in "".join(told)
    for path in list_checkpoints(checkpoints / "checkpoints"):
        load(path)
    run(processes, str(tmp_path), *words)
    assert_alike(way, alone, name)
    assert not list((checkpoints / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_all_processes_skip_the_steps_that_one_would_skip(sharding: str, tmp_path: Path) -> None:
    names, engine = ("mae", "hpm", "amt"), Engine(device="cpu")
    for name in names:
        sharded.train_case(engine, tmp_path / "alone", name, sharded.STEPS, spoilt=True)
    run(2, str(tmp_path), sharding, str(sharded.STEPS), *(f"{name}+spoilt=1" for name in names))
    for name in names:
        assert_alike(tmp_path / "spoilt=1", tmp_path / "alone", name)
        told = lines(tmp_path / "spoilt=1", name)
        assert [line["skipped"] for line in told] == [0, 1, 1, 0]


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
