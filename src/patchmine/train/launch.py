"""Who started this process, and which of how many it is: read from what launchers export.

torchrun and srun start all processes of a run; a process that is alone starts those that
``devices`` asks for itself.  What launchers leave in a shell in which nothing was started is told
apart from that and left aside.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from patchmine.errors import UserError

STARTED_BY = "PATCHMINE_STARTED_BY"  # set for processes that `start_others` started
PORT = 29500  # torchrun's

# SLURM's numbers for steps that srun did not start: the batch script, `salloc`'s shell and the like
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Launch:
    """This process among those of a run.

    Args:
        by: who started them: "torchrun", "SLURM", "the environment" or "patchmine".
        rank: of this process, among ``world_size``.
        local_rank: the same on this machine, among ``local_size``.
        starts: how many this one has to start.
        address: where the process of rank 0 is.
        port: where it listens; 0 is any free one.
        agent: torchrun listens there itself, once for each ``attempt``.
        note: what the user should know about it.
    """

    by: str = "patchmine"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    starts: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    agent: bool = False
    attempt: str = "0"
    note: str | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process is the one on its machine that talks to the user."""
        return self.local_rank == 0


def read_launch(environment: Mapping[str, str], devices: int = 1, num_nodes: int = 1) -> Launch:
    """What the environment and the settings ``devices`` and ``num_nodes`` amount to.

    Raises UserError for variables that are incomplete or contradict each other or the settings.
    """
    if STARTED_BY in environment:
        return _from_variables(environment, "patchmine")
    if "TORCHELASTIC_RUN_ID" in environment:
        launch = _from_variables(environment, "torchrun")
    elif _is_slurm_step(environment):
        launch = _from_slurm(environment)
    elif _started_by_mpi(environment):
        raise UserError(
            "mpirun's variables say nothing of where processes meet: start them with torchrun or "
            "srun"
        )
    elif environment.get("WORLD_SIZE", "1") != "1":
        launch = _from_variables(environment, "the environment")
    else:
        return _alone(environment, devices, num_nodes)
    nodes = -(-launch.world_size // launch.local_size)
    many = f"{launch.local_size} process{'es' * (launch.local_size > 1)} on this machine"
    for name, given, found, started in (
        ("devices", devices, launch.local_size, many),
        ("num_nodes", num_nodes, nodes, f"processes on {nodes}"),
    ):
        if given not in (1, found):
            raise UserError(
                f"{name}={given}, but {launch.by} started {started}; leave the setting out, or "
                f"start {given}"
            )
    return launch


def start_others(launch: Launch) -> list[subprocess.Popen[bytes]]:
    """Start this program again, once for each process that ``launch`` still needs here.

    Raises UserError where there is no program that could be started again, as in a notebook.
    """
    typed = sys.argv[0] in ("", "-") or hasattr(sys, "ps1") or "ipykernel" in sys.modules
    if launch.starts and typed:
        raise UserError(
            f"devices={launch.local_size} starts this program {launch.starts} more times, which a "
            "notebook or a prompt cannot: write it into a file, or use devices=1"
        )
    started = []
    for local_rank in range(1, launch.starts + 1):
        own = {
            STARTED_BY: os.getpid(),
            "RANK": launch.rank + local_rank,
            "WORLD_SIZE": launch.world_size,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": launch.local_size,
            "MASTER_ADDR": launch.address,
            "MASTER_PORT": launch.port,
        }
        environment = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, *sys.orig_argv[1:]]
        started.append(subprocess.Popen(command, env=environment))
    return started


def _alone(environment: Mapping[str, str], devices: int, num_nodes: int) -> Launch:
    """A process that starts the others on its machine, if there are any."""
    if num_nodes == 1:
        note = _left_aside(environment)
        return Launch(local_size=devices, world_size=devices, starts=devices - 1, note=note)
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in environment]
    if missing:
        are = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        raise UserError(
            f"num_nodes={num_nodes}, but {are} not set: start the run with srun or torchrun on all "
            "machines, or set NODE_RANK and MASTER_ADDR on each"
        )
    node = _number(environment, "NODE_RANK")
    if node >= num_nodes:
        raise UserError(
            f"NODE_RANK={node} must be below num_nodes={num_nodes}: machines are numbered from 0"
        )
    return Launch(
        rank=node * devices,
        world_size=num_nodes * devices,
        local_size=devices,
        starts=devices - 1,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else PORT,
    )


def _left_aside(environment: Mapping[str, str]) -> str | None:
    """What to say of a launcher's variables where no launcher started this process."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks not in ("", "1"):
        return (
            f"SLURM has {tasks} tasks for this job, but srun did not start this process, so that "
            "it goes by `devices`: put srun before the command to use them"
        )
    ranks = {name: environment.get(name, "0") for name in ("RANK", "LOCAL_RANK")}
    stale = [f"{name}={value}" for name, value in ranks.items() if value != "0"]
    if not stale:
        return None
    return (
        f"{' and '.join(stale)} in the environment, but no WORLD_SIZE: left aside, this process "
        "goes by `devices`"
    )


def _from_variables(environment: Mapping[str, str], by: str) -> Launch:
    """torchrun's variables; without LOCAL_RANK a process is the only one on its machine."""
    wanted = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    if by != "the environment":
        wanted += ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    given = [name for name in wanted if environment.get(name)]
    if missing := [name for name in wanted if name not in given]:
        shown = ", ".join(f"{name}={environment[name]}" for name in given) or by
        raise UserError(
            f"{shown} {'is' if len(given) == 1 else 'are'} set in the environment, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: start the processes "
            f"with torchrun or srun, or unset {' '.join(given) or 'TORCHELASTIC_RUN_ID'} to train "
            "with this one"
        )
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank >= world_size:
        raise UserError(
            f"RANK={rank} must be below WORLD_SIZE={world_size}: processes are numbered from 0"
        )
    local_rank = _number(environment, "LOCAL_RANK", default=0)
    return Launch(
        by=by,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=_number(environment, "LOCAL_WORLD_SIZE", default=local_rank + 1),
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several; a batch script has SLURM_NTASKS too."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP or interactive:
        return False
    return _slurm_tasks(environment) > 1


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    name = _of_step(environment, "STEP_NUM_TASKS", "NTASKS", "NPROCS")
    return _number(environment, name, default=1)


def _from_slurm(environment: Mapping[str, str]) -> Launch:
    tasks = _slurm_tasks(environment)
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environment]
    if missing:
        raise UserError(
            f"srun started {tasks} tasks, but {' and '.join(missing)} is not set: put srun before "
            "patchmine"
        )
    name = _of_step(environment, "STEP_NUM_NODES", "NNODES", "JOB_NUM_NODES")
    nodes = _number(environment, name, default=1)
    name = _of_step(environment, "STEP_TASKS_PER_NODE", "TASKS_PER_NODE")
    on_each = environment.get(name, "")  # "2(x3),1" is 2, 2, 2, 1
    if len({count for count, _ in re.findall(r"(\d+)(\(x\d+\))?", on_each)}) > 1 or tasks % nodes:
        shown = f"{name}={on_each}" if on_each else f"{tasks} tasks on {nodes} nodes"
        raise UserError(
            f"{shown}: every node must run as many tasks as the others, as in `srun "
            f"--nodes={nodes} --ntasks-per-node={max(1, tasks // nodes)}`"
        )
    name = _of_step(environment, "STEP_NODELIST", "NODELIST", "JOB_NODELIST")
    job, step = (
        int(re.sub(r"\D", "", environment.get(key, "")) or 0)
        for key in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    return Launch(
        by="SLURM",
        rank=_number(environment, "SLURM_PROCID"),
        world_size=tasks,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_size=tasks // nodes,
        address=environment.get("MASTER_ADDR") or first_host(environment.get(name, "127.0.0.1")),
        # All tasks know the same one; another job, or step of this one, on the node has another.
        port=_number(environment, "MASTER_PORT", default=15000 + (job + 131 * step) % 15000),
    )


def _of_step(environment: Mapping[str, str], *names: str) -> str:
    """The first of SLURM's variables that is set; those of the step come before the job's."""
    full = [f"SLURM_{name}" for name in names]
    return next((name for name in full if environment.get(name)), full[-1])


def first_host(hosts: str) -> str:
    """The first name in SLURM's list of hosts: "rack[1-2]n[07,09-12],c3" begins with "rack1n07"."""
    first = re.match(r"(?:[^\[\],\s]|\[[^\]]*\])+", hosts.strip())
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else hosts


def _started_by_mpi(environment: Mapping[str, str]) -> bool:
    sizes = (
        environment.get(name, "1")
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
    )
    in_job = "SLURM_JOB_ID" in environment  # where PMI_SIZE is SLURM's own
    return (
        not in_job
        and any(size not in ("", "1") for size in sizes)
        and "WORLD_SIZE" not in environment
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise UserError(
            f"{name}={text} in the environment is no whole number: correct it, or `unset {name}`"
        )
    return int(text)
