"""A crash before, within and after every call by which a run changes its folder; a disk that is
full from each on.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filesystem import CRASHED, NEEDS_ROOM, Action, FileSystem, calls
from scene import WAIT, Child, Scene
from spread import Outcome, spread
from verdict import differences, ended_badly, torn


@dataclass(frozen=True)
class Part:
    """A part of a run: the whole of it, or what is left of one that stopped half way (``start``: a
    folder to copy).  ``words``: settings of its own.
    """

    name: str
    start: Path | None
    words: tuple[str, ...] = ()


def parts(scene: Scene) -> list[Part]:
    """The whole run, the same gone on with after its first half, and the whole one with a thread
    that writes its checkpoints, whose calls come in another order each time.
    """
    half, log = scene.scratch / "half", scene.scratch / "half.log"
    shutil.rmtree(half, ignore_errors=True)
    log.unlink(missing_ok=True)
    words = scene.pretrain(half / "run", "workers=0")
    ended = Child(words, log, prepare=crash_after_checkpoint).wait(WAIT)
    if ended.code != CRASHED:
        raise RuntimeError(
            f"the first half of a run ended with {ended.code}: {ended.output[-2000:]}"
        )
    return [
        Part("a run", None),
        Part("a resumed run", half / "run"),
        Part("a run that saves in the background", None, ("saving=background",)),
    ]


def crash_after_checkpoint(last: int = 4) -> None:
    """Make the process end when the checkpoint of step ``last`` is complete."""
    import patchmine.train.keeper as keeper

    save = keeper.save

    def saved(folder: Path, step: int, *given: object, **named: object) -> Path:
        path = save(folder, step, *given, **named)
        if step == last:
            os._exit(CRASHED)
        return path

    keeper.save = saved  # type: ignore[assignment]


def _lay_out(scene: Scene, part: Part, name: str) -> Path:
    """A folder of its own for one case, with the run's beginning in it."""
    base = scene.scratch / name
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    if part.start is not None:
        shutil.copytree(part.start, base / "run", symlinks=True)
    return base


def _start(scene: Scene, part: Part, base: Path, prepare: Callable[[], None], log: Path) -> Child:
    def begin() -> None:
        os.environ["XDG_CACHE_HOME"] = str(base / "cache")
        prepare()

    words = ["resume", str(base / "run"), "workers=0", *part.words]
    if not (base / "run" / "config.yaml").exists():
        words = scene.pretrain(base / "run", "workers=0", *part.words)
    return Child(words, log, prepare=begin)


def record(scene: Scene, part: Part) -> list[tuple[str, str]]:
    """The calls of one part of a run, in order."""
    base = _lay_out(scene, part, "recorded")
    listing, log = scene.scratch / "calls.jsonl", scene.scratch / "recorded.log"
    ended = _start(scene, part, base, FileSystem(base, record=listing).install, log).wait(WAIT)
    if ended.code != 0:
        raise RuntimeError(
            f"{part.name}, recorded, ended with {ended.code}: {ended.output[-2000:]}"
        )
    return calls(listing)


def crash_runs(scene: Scene, *, processes: int, seconds: float, most: int | None = None) -> Outcome:
    """Every call of both parts, before, half way through a write, and after; ``most``: so many of
    them, chosen.
    """
    cases, remarks = list[tuple[Part, int, str, Action]](), list[str]()
    for part in parts(scene):
        found = record(scene, part)
        remarks.append(f"{len(found)} calls of {part.name}")
        for number, (name, file) in enumerate(found):
            actions: tuple[Action, ...] = (
                ("before", "half", "after") if name in ("write", "save") else ("before", "after")
            )
            cases += [(part, number, f"{name} {file}", action) for action in actions]
    random.Random(f"{scene.seed}/crashes").shuffle(
        cases
    )  # so that an early end leaves some of each kind
    outcome = spread(
        lambda case: _crash(scene, *case), cases[:most], processes=processes, seconds=seconds
    )
    outcome.remark = ", ".join(remarks)
    return outcome


def _crash(
    scene: Scene, part: Part, number: int, call: str, action: Action
) -> tuple[int, list[str]]:
    base = _lay_out(scene, part, f"crash-{os.getpid()}")
    log = base.with_suffix(".log")
    log.unlink(missing_ok=True)
    out = base / "run"
    ended = _start(scene, part, base, FileSystem(base, action, number).install, log).wait(WAIT)
    faults = ended_badly(ended, CRASHED) or torn(out)
    if not faults:
        ended = scene.go_on(out, log, "workers=0", *part.words).wait(WAIT)
        faults = ended_badly(ended, 0) or differences(out, scene.whole, pictures=False)
    shutil.rmtree(base, ignore_errors=True)
    return 1, [f"{part.name}, crashed {action} call {number} ({call}): {fault}" for fault in faults]


def full_disk_runs(
    scene: Scene, *, processes: int, seconds: float, most: int | None = None
) -> Outcome:
    """From every call that needs room on, there is none; then there is again.  And one run under a
    real limit.
    """
    cases, remarks = list[tuple[Part, int, str]](), list[str]()
    for part in parts(scene):
        found = record(scene, part)
        chosen = [
            (part, number, f"{name} {file}")
            for number, (name, file) in enumerate(found)
            if name in NEEDS_ROOM
        ]
        remarks.append(f"{len(chosen)} calls of {part.name}")
        cases += chosen
    random.Random(f"{scene.seed}/full").shuffle(cases)
    limited = [(Part("a run under RLIMIT_FSIZE", None), -1, "")]
    outcome = spread(
        lambda case: _full(scene, *case),
        limited + cases[:most],
        processes=processes,
        seconds=seconds,
    )
    outcome.remark = ", ".join(remarks)
    return outcome


def _full(scene: Scene, part: Part, number: int, call: str) -> tuple[int, list[str]]:
    base = _lay_out(scene, part, f"full-{os.getpid()}")
    log = base.with_suffix(".log")
    log.unlink(missing_ok=True)
    out = base / "run"
    prepare = FileSystem(base, "full", number).install if number >= 0 else partial(_limit, 2**16)
    ended = _start(scene, part, base, prepare, log).wait(WAIT)
    faults = ended_badly(ended, 0, 2) + torn(out)
    if ended.code == 2 and not ended.output.strip():
        faults.append("exit code 2 without a word")
    if not faults and ended.code == 2:
        ended = scene.go_on(out, log, "workers=0", *part.words).wait(WAIT)
        faults = ended_badly(ended, 0) or differences(out, scene.whole, pictures=False)
    elif not faults:
        faults = differences(out, scene.whole, pictures=False)
    shutil.rmtree(base, ignore_errors=True)
    return 1, [f"{part.name}, no room from call {number} on ({call}): {fault}" for fault in faults]


def _limit(size: int) -> None:
    """No file may grow beyond ``size`` bytes, which a checkpoint would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
