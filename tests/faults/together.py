"""Two processes in one folder, and two that train one model of which one is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

import seeds
from safetensors.torch import save_file
from scene import WAIT, Child, Ended, Scene, last_lines
from spread import Outcome, spread
from verdict import differences, ended_badly, torn

ALONE = 60.0  # seconds in which a process whose partner died must end
RANK_STEPS = 60  # of the runs on two processes, which are killed meanwhile


def shared_folder_runs(scene: Scene, *, count: int, processes: int, seconds: float) -> Outcome:
    """``count`` times each: two that start together, 20 ms apart, and a resume beside a run that
    goes on.
    """
    ways = (
        "at once",
        "20 ms apart",
        "other settings",
        "import",
        "resume beside a run",
        "two resumes",
        "readers",
    )
    cases = [(way, number) for number in range(count) for way in ways]
    return spread(
        lambda case: _shared_folder(scene, *case), cases, processes=processes, seconds=seconds
    )


def _shared_folder(scene: Scene, way: str, number: int) -> tuple[int, list[str]]:
    faults = _readers(scene, number) if way == "readers" else _writers(scene, way, number)
    return 1, [f"{way}: {fault}" for fault in faults]


def _readers(scene: Scene, number: int) -> list[str]:
    """What only reads a run succeeds or says what is not there yet, and does not disturb it."""
    out = scene.scratch / f"read-{number}"
    run = Child(scene.pretrain(out, "workers=0"), out.with_suffix(".log"))
    _until((out / "config.yaml").exists, run)
    commands = [
        ["report", str(out), f"out={out}.html"],
        ["export", str(out), f"out={out}-export"],
        ["show", str(out), str(scene.scratch / "images" / "00.png"), f"out={out}.png"],
        ["embed", str(out), f"data={scene.scratch / 'images'}", f"out={out}.parquet", "workers=0"],
    ]
    readers = [
        Child(words, scene.scratch / f"reader-{number}-{words[0]}.log") for words in commands
    ]
    faults = [fault for reader in readers for fault in ended_badly(reader.wait(WAIT), 0, 2)]
    return faults + (ended_badly(run.wait(WAIT), 0) or differences(out, scene.whole))


def _writers(scene: Scene, way: str, number: int) -> list[str]:
    out = scene.scratch / f"shared-{way.replace(' ', '-')}-{number}"
    logs = [out.with_suffix(f".{place}.log") for place in (1, 2)]
    first = scene.pretrain(out, "workers=0")
    second, delay = first, 0.02 if way == "20 ms apart" else 0.0
    if way == "other settings":
        second = [*first, "seed=1"]
    elif way == "import":
        weights = scene.scratch / f"official-{number}.safetensors"
        save_file(seeds.official_weights(), weights)
        second = ["import", str(weights), f"out={out}", "num_heads=2", "decoder_num_heads=2"]
    elif way in ("resume beside a run", "two resumes"):
        second = ["resume", str(out), "workers=0"]
    if way == "two resumes":
        killed = Child(first, logs[0])
        _until(lambda: any((out / "checkpoints").glob("step-*")), killed)
        killed.kill()
        killed.wait(WAIT)
        first = second
        logs[0].unlink()
    one = Child(first, logs[0])
    if way == "resume beside a run":
        _until((out / "config.yaml").exists, one)
    time.sleep(delay)
    other = Child(second, logs[1])
    ends = [one.wait(WAIT), other.wait(WAIT)]
    faults = _one_wins(ends, way)
    if not faults and not (way in ("other settings", "import") and ends[1].code == 0):
        faults = differences(out, scene.whole)
    shutil.rmtree(out, ignore_errors=True)
    return faults


def _until(ready: object, child: Child) -> None:
    end = time.monotonic() + WAIT
    while not ready() and child.running() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.002)


def _one_wins(ends: list[Ended], way: str) -> list[str]:
    faults = [fault for end in ends for fault in ended_badly(end, 0, 2)]
    if not faults and sorted(end.code or 0 for end in ends) != [0, 2]:
        faults = [
            f"exit codes {[end.code for end in ends]}, not one 0 and one 2: "
            f"{last_lines(ends[1].output)}"
        ]
    if not faults and way == "resume beside a run" and ends[0].code != 0:
        faults = [f"the run that was there first lost: {last_lines(ends[0].output)}"]
    return faults


def killed_rank_runs(scene: Scene, *, count: int, seconds: float) -> Outcome:
    """Two processes as torchrun starts them; one is killed at a random step, the other ends by
    itself.
    """
    return spread(partial(_killed_rank, scene), range(count), processes=1, seconds=seconds)


def _killed_rank(scene: Scene, number: int) -> tuple[int, list[str]]:
    chance = random.Random(f"{scene.seed}/ranks/{number}")
    out = scene.scratch / f"ranks-{number}"
    shutil.rmtree(out, ignore_errors=True)
    words = scene.pretrain(out, "workers=0", f"steps={RANK_STEPS}")
    ranks = _two(words, scene.scratch, f"ranks-{number}")
    victim, step = number % 2, chance.randrange(3, RANK_STEPS - 20)
    _until(
        lambda: (
            (out / "metrics.jsonl").exists()
            and (out / "metrics.jsonl").read_bytes().count(b"\n") >= step
        ),
        ranks[0],
    )
    ranks[victim].kill(signal.SIGKILL)
    killed, began = ranks[victim].wait(WAIT), time.monotonic()
    left = ranks[1 - victim].wait(ALONE)
    about = f"rank {victim} killed at step {step}, the other after {time.monotonic() - began:.0f} s"
    faults = (
        []
        if killed.code == -signal.SIGKILL
        else [f"it had ended before, with {killed.code}: {last_lines(killed.output)}"]
    )
    faults += ended_badly(left, 2) + torn(out)
    if not faults:
        faults = _goes_on(scene, out, number)
    shutil.rmtree(out, ignore_errors=True)
    return 1, [f"{about}: {fault}" for fault in faults]


def _goes_on(scene: Scene, out: Path, number: int) -> list[str]:
    """With two processes, or with one, to the end."""
    if number % 4 < 2:
        ends = [
            child.wait(WAIT)
            for child in _two(["resume", str(out)], scene.scratch, f"again-{number}")
        ]
    else:
        log = scene.scratch / f"again-{number}.log"
        log.unlink(missing_ok=True)
        ends = [scene.go_on(out, log).wait(WAIT)]
    faults = [fault for end in ends for fault in ended_badly(end, 0)]
    steps = [text for text in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in text]
    return (
        faults
        + (
            []
            if len(steps) == RANK_STEPS
            else [f"{len(steps)} lines of metrics for {RANK_STEPS} steps"]
        )
        + torn(out)
    )


def _two(words: list[str], scratch: Path, name: str) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [scratch / f"{name}.{rank}.log" for rank in (0, 1)]
    for log in logs:
        log.unlink(missing_ok=True)
    return [
        Child(words, log, prepare=partial(_as_rank, rank, port)) for rank, log in enumerate(logs)
    ]


def _as_rank(rank: int, port: int) -> None:
    """The environment that torchrun gives."""
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "faults",
            "TORCHELASTIC_USE_AGENT_STORE": "False",
        }
    )
