"""What the engine refuses, which GPU it takes, what it compiles, and that no step waits for a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy import Toy, toy_batches

from patchmine.errors import UserError
from patchmine.train import engine as engines
from patchmine.train import hardware
from patchmine.train.engine import Engine
from patchmine.train.launch import Launch
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Progress


def test_settings_that_this_machine_cannot_follow_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda, but torch sees no GPU here; use device=cpu"):
        Engine(device="cuda")
    with pytest.raises(UserError, match="device=tpu is not known; use auto, cpu or cuda"):
        Engine(device="tpu")
    with pytest.raises(UserError, match="precision=fp8 is not known; use auto, fp32 or bf16"):
        Engine(device="cpu", precision="fp8")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(
        UserError, match=r"devices=65536 would start .* this machine has 2 cores .* set devices=2"
    ):
        Engine(device="cpu", devices=65536)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="devices=4, but this machine has 2 GPUs"):
        Engine(device="cuda", devices=4)
    assert [
        engines._choose_gpu(Launch(by="SLURM", local_rank=rank, local_size=2)) for rank in (0, 1)
    ] == [0, 1]
    with pytest.raises(UserError, match="devices=3, but this machine has 2 GPUs"):
        engines._choose_gpu(Launch(by="torchrun", local_rank=2, local_size=3))
    monkeypatch.setattr(
        torch.cuda, "device_count", lambda: 1
    )  # srun --gpus-per-task=1 hides the others
    assert engines._choose_gpu(Launch(by="SLURM", local_rank=1, local_size=2)) == 0


@pytest.mark.parametrize(
    ("cores", "processes", "by_torch", "threads"),
    [
        *((1, 1, 1, 1), (2, 1, 2, 2), (64, 1, 64, 64)),  # one process has all
        (16, 1, 8, 8),  # two hardware threads a core
        *((2, 2, 2, 1), (8, 3, 8, 2), (64, 8, 64, 8), (2, 5, 2, 1)),
        (2, 1, 64, 2),  # a container that may use two of 64
    ],
)
def test_cores_are_shared_by_processes(
    cores: int, processes: int, by_torch: int, threads: int
) -> None:
    assert hardware.threads_for(cores, processes, by_torch) == threads


def test_a_containers_quota_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert hardware.usable_cores() == 64
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert hardware.usable_cores() == 64
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert hardware.usable_cores() == 2
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert hardware.usable_cores() == 1
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu.max").unlink()
    assert hardware.usable_cores() == 64


def test_processors_compute_in_fp32_unless_told(engine: Engine) -> None:
    assert (engine.precision, engine.device.type, engine.rank, engine.world_size) == (
        "fp32",
        "cpu",
        0,
        1,
    )


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ({"blr": 0.1}, {"blr": 0.2}, "differ: blr is 0.1 on a (rank 0) and 0.2 on b (rank 1)"),
        ({"blr": 0.1}, {"blr": 0.1, "head": "dpt"}, "head is not there on a (rank 0) and dpt on b"),
        ({"blr": 0.1, "head": "dpt"}, {"blr": 0.1}, "head is dpt on a (rank 0) and not there on b"),
    ],
)
def test_processes_that_differ_are_told_what_differs(
    first: dict[str, object],
    second: dict[str, object],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(device="cpu")
    every = [{name: str(value) for name, value in each.items()} for each in (first, second)]
    monkeypatch.setattr(engine, "gather", lambda own: every)
    monkeypatch.setattr(engine, "_group", SimpleNamespace(hosts=["a", "b"]))
    with pytest.raises(UserError) as refused:
        engine.agree(first)
    assert sentence in str(refused.value)


def test_blocks_are_compiled_in_place_and_keep_their_names() -> None:
    from timm.models.vision_transformer import Block

    module = nn.ModuleDict(
        {"encoder": nn.Sequential(Block(8, 2), Block(8, 2)), "head": nn.Linear(8, 8)}
    )
    names = list(module.state_dict())
    engines._compile_blocks(module)
    assert [m._compiled_call_impl is not None for m in (*module["encoder"], module["head"])] == [
        True,
        True,
        False,
    ]
    assert list(module.state_dict()) == names


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    engine = Engine(device="cuda")
    settings = TrainSettings(batch_size=8, accumulate=2)
    stepper = Stepper(Toy(nan_steps=(3,)), engine, settings)
    batches = iter([batch.to("cuda") for batch in toy_batches(0, 6, 8, accumulate=2)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(6):
            stepper.make(Progress(step, 6, 3), batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stepper.read_skips() == (1, 1)
