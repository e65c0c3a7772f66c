"""Who started a process is read off its environment: torchrun, srun, a person, or nobody."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from patchmine.errors import UserError
from patchmine.train.launch import STARTED_BY, Launch, first_host, read_launch, start_others

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29400"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def place(launch: Launch) -> tuple[str, int, int, int, int]:
    return launch.by, launch.rank, launch.world_size, launch.local_rank, launch.local_size


def test_a_process_by_itself_starts_the_others() -> None:
    assert read_launch({}) == Launch()
    assert read_launch({}, devices=3) == Launch(world_size=3, local_size=3, starts=2)


def test_torchrun_says_who_and_where() -> None:
    launch = read_launch(TORCHRUN)
    assert place(launch) == ("torchrun", 5, 8, 1, 4)
    assert (launch.address, launch.port, launch.agent, launch.attempt) == (
        "node0",
        29400,
        True,
        "2",
    )
    assert not launch.starts
    assert read_launch(TORCHRUN, devices=4, num_nodes=2) == launch


def test_srun_says_who_and_where() -> None:
    launch = read_launch(SRUN)
    assert place(launch) == ("SLURM", 5, 8, 1, 4)
    assert launch.address == "gpu07"
    assert (
        launch.port != read_launch(SRUN | {"SLURM_STEP_ID": "1"}).port
    )  # two steps of one job, side by side
    assert launch.port == read_launch(SRUN | {"SLURM_PROCID": "7", "SLURM_LOCALID": "3"}).port
    named = read_launch(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (named.address, named.port) == ("10.0.0.1", 1234)


def test_what_the_step_has_comes_before_what_the_job_has() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    launch = read_launch(SRUN | step | {"SLURM_STEP_NODELIST": "gpu08", "SLURM_PROCID": "1"})
    assert (*place(launch), launch.address) == ("SLURM", 1, 2, 1, 2, "gpu08")


@pytest.mark.parametrize(
    "environment",
    [
        BATCH_SCRIPT,  # sbatch
        without(BATCH_SCRIPT, "SLURM_PROCID", "SLURM_LOCALID"),  # salloc
        SRUN | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the shell of salloc, on a node
        SRUN | {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch script, where it has a number
        SRUN | {"SLURM_JOB_NAME": "bash"},
        SRUN | {"SLURM_JOB_NAME": "interactive"},
    ],
)
def test_slurm_without_srun_is_one_process_that_goes_by_devices(
    environment: dict[str, str],
) -> None:
    for devices in (1, 2):
        launch = read_launch(environment, devices)
        assert place(launch) == ("patchmine", 0, devices, 0, devices)
        assert launch.starts == devices - 1
        assert launch.note is not None
        assert "SLURM has 8 tasks" in launch.note
        assert "put srun before the command" in launch.note


@pytest.mark.parametrize("started", [{}, {"SLURM_STEP_ID": "0"}])
def test_a_single_task_starts_as_many_as_devices_says(started: dict[str, str]) -> None:
    single = (
        BATCH_SCRIPT
        | started
        | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "1"}
    )
    assert read_launch(single, devices=2) == Launch(world_size=2, local_size=2, starts=1)


@pytest.mark.parametrize("on_each", ["2,1", "2(x2),1", "1,2(x3)", "3,2,3"])
def test_uneven_tasks_are_refused(on_each: str) -> None:
    with pytest.raises(
        UserError,
        match=r"SLURM_TASKS_PER_NODE=.*: every node must run as many .*--ntasks-per-node=",
    ):
        read_launch(SRUN | {"SLURM_TASKS_PER_NODE": on_each})
    with pytest.raises(UserError, match="3 tasks on 2 nodes: every node"):
        read_launch(without(SRUN, "SLURM_TASKS_PER_NODE") | {"SLURM_NTASKS": "3"})


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN])
def test_devices_and_nodes_must_be_the_launchers(environment: dict[str, str]) -> None:
    who = read_launch(environment).by
    with pytest.raises(
        UserError,
        match=f"devices=3, but {who} started 4 processes on this machine; leave .* start 3",
    ):
        read_launch(environment, devices=3)
    with pytest.raises(
        UserError, match=f"num_nodes=4, but {who} started processes on 2; leave the setting out"
    ):
        read_launch(environment, num_nodes=4)


def test_variables_set_by_hand() -> None:
    assert place(read_launch(BY_HAND)) == ("the environment", 1, 2, 0, 1)
    assert place(read_launch(BY_HAND | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})) == (
        "the environment",
        1,
        2,
        1,
        2,
    )


REFUSED = {
    "no address": (
        without(BY_HAND, "MASTER_ADDR"),
        "MASTER_ADDR is not: start the processes with torchrun or srun",
    ),
    "no rank": (
        without(BY_HAND, "RANK", "MASTER_PORT"),
        "RANK, MASTER_PORT are not: .*unset WORLD_SIZE MASTER_ADDR",
    ),
    "torchrun in part": (
        without(TORCHRUN, "LOCAL_RANK", "MASTER_PORT"),
        "MASTER_PORT, LOCAL_RANK are not",
    ),
    "only its mark": (
        {"TORCHELASTIC_RUN_ID": "x"},
        "unset TORCHELASTIC_RUN_ID to train with this one",
    ),
    "srun in part": (
        without(SRUN, "SLURM_PROCID"),
        "srun started 8 tasks, but SLURM_PROCID is not set",
    ),
    "a rank too many": (BY_HAND | {"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
    "no number": (BY_HAND | {"RANK": "one"}, "RANK=one in the environment is no whole number"),
    "a negative one": (BY_HAND | {"RANK": "-1"}, "RANK=-1 in the environment is no whole number"),
    "no port": (
        BY_HAND | {"MASTER_PORT": "tcp"},
        "MASTER_PORT=tcp in the environment is no whole number",
    ),
    "no size": (
        BY_HAND | {"WORLD_SIZE": "two"},
        "WORLD_SIZE=two in the environment is no whole number",
    ),
    "mpirun": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        "start them with torchrun or srun",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_is_refused(case: str) -> None:
    environment, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        read_launch(environment)


def test_a_stale_rank_is_left_aside() -> None:
    launch = read_launch({"RANK": "3", "LOCAL_RANK": "3"}, devices=2)
    assert place(launch) == ("patchmine", 0, 2, 0, 2)
    assert launch.note is not None
    assert "RANK=3 and LOCAL_RANK=3 in the environment, but no WORLD_SIZE" in launch.note
    assert (
        read_launch({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"})
        == Launch()
    )


def test_several_machines_without_a_launcher() -> None:
    environment = {"NODE_RANK": "1", "MASTER_ADDR": "node0"}
    launch = read_launch(environment, devices=2, num_nodes=3)
    assert place(launch) == ("patchmine", 2, 6, 0, 2)
    assert (launch.starts, launch.address, launch.port) == (1, "node0", 29500)
    with pytest.raises(
        UserError,
        match=r"num_nodes=3, but NODE_RANK and MASTER_ADDR are not set: start .* with srun",
    ):
        read_launch({}, num_nodes=3)
    with pytest.raises(UserError, match="NODE_RANK=3 must be below num_nodes=3"):
        read_launch(environment | {"NODE_RANK": "3"}, num_nodes=3)


def test_what_a_process_starts_reads_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "subprocess.Popen", lambda command, env: started.append({"command": command, "env": env})
    )
    monkeypatch.setattr(sys, "argv", ["patchmine"])
    monkeypatch.setattr(
        sys,
        "orig_argv",
        ["python", "-X", "dev", "-m", "patchmine.cli.app", "pretrain", "devices=3"],
    )
    start_others(Launch(world_size=3, local_size=3, starts=2, port=1234))
    assert [place(read_launch(each["env"], devices=3)) for each in started] == [
        ("patchmine", rank, 3, rank, 3) for rank in (1, 2)
    ]
    assert all(
        STARTED_BY in each["env"] and each["env"]["MASTER_PORT"] == "1234" for each in started
    )
    assert started[0]["command"] == [
        sys.executable,
        "-X",
        "dev",
        "-m",
        "patchmine.cli.app",
        "pretrain",
        "devices=3",
    ]
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(
        UserError, match="devices=3 starts this program 2 more times, which a notebook or a prompt"
    ):
        start_others(Launch(world_size=3, local_size=3, starts=2, port=1234))


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-08]", "gpu07"),
        ("gpu[7,9-12],c3", "gpu7"),
        ("rack[1-2]n[07,09-12],c3", "rack1n07"),
        ("a[1-2]-ib.cluster", "a1-ib.cluster"),
        ("node1 node2", "node1"),
    ],
)
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
