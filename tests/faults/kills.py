"""Runs that are killed at random moments, gone on with, killed again, and must end as if nothing
had happened.
"""

from __future__ import annotations

import random
import shutil
import signal
import time

from scene import WAIT, Scene
from spread import Outcome, spread
from verdict import differences, ended_badly, processes_of

SIGNALS = (
    *(signal.SIGKILL,) * 12,
    *(signal.SIGTERM,) * 3,
    *(signal.SIGINT,) * 3,
    signal.SIGHUP,
    signal.SIGUSR1,
)
GRACE = 12.0  # seconds in which data workers see that their process is gone; torch's look every 5


def kill_runs(scene: Scene, *, kills: int, processes: int, seconds: float) -> Outcome:
    """At least ``kills`` kills, spread over runs of one to three of them."""
    chance, plan = random.Random(f"{scene.seed}/kills"), []
    while sum(plan) < kills:
        plan.append(chance.choice((1, 1, 2, 3)))
    cases = list(enumerate(plan))
    outcome = spread(
        lambda case: _one_run(scene, *case), cases, processes=processes, seconds=seconds
    )
    outcome.remark = f"{kills} kills in {len(plan)} runs"
    return outcome


def _one_run(scene: Scene, number: int, kills: int) -> tuple[int, list[str]]:
    chance = random.Random(f"{scene.seed}/kills/{number}")
    out, log = scene.scratch / f"killed-{number}", scene.scratch / f"killed-{number}.log"
    sessions, faults, done, told = set[int](), list[str](), 0, list[str]()
    while done < kills and not faults:
        log.unlink(missing_ok=True)
        workers = f"workers={chance.choice((0, 0, 1, 2))}"
        child = scene.go_on(out, log, workers)
        sessions.add(child.pid)
        time.sleep(scene.seconds * chance.random() * (0.8 if told else 1.0))
        sent = chance.choice(SIGNALS)
        alive = child.running()
        child.kill(sent)
        ended = child.wait(WAIT)
        told.append(f"{workers} {sent.name}: {ended.code}")
        faults = ended_badly(ended, 0, -sent, 128 + sent)
        done += alive
        if (
            ended.code == 0 and done < kills
        ):  # it was done before the signal came: its like once more
            faults += differences(out, scene.whole)
            shutil.rmtree(out, ignore_errors=True)
    if not faults:
        log.unlink(missing_ok=True)
        child = scene.go_on(out, log, f"workers={chance.choice((0, 1, 2))}")
        sessions.add(child.pid)
        faults = ended_badly(child.wait(WAIT), 0) or differences(out, scene.whole)
    faults += _left(sessions)
    shutil.rmtree(out, ignore_errors=True)
    return done, [f"run {number} ({'; '.join(told)}): {fault}" for fault in faults]


def _left(sessions: set[int]) -> list[str]:
    end = time.monotonic() + GRACE
    while found := processes_of(sessions):
        if time.monotonic() > end:
            return [f"{len(found)} processes still live {GRACE:.0f} s after the run"]
        time.sleep(0.2)
    return []
