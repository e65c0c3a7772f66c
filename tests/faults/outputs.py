"""The commands that write something beside a run: each is crashed at, and refused room from, every
call of its own.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import seeds
from filesystem import CRASHED, NEEDS_ROOM, Action, FileSystem, calls
from scene import WAIT, Child, Ended, Scene, make_images
from spread import Outcome, spread
from verdict import ended_badly

SLACK = 0.05  # share by which the size of an output may differ: times and paths are in some


@dataclass(frozen=True)
class Command:
    """A command whose words name the folder BASE, and what it writes below it."""

    words: tuple[str, ...]
    out: str


COMMANDS = (
    Command(("report", "BASE/run", "out=BASE/report.html"), "report.html"),
    Command(("show", "BASE/run", "BASE/images/a/00.png", "out=BASE/panel.png"), "panel.png"),
    Command(("export", "BASE/run", "out=BASE/exported"), "exported"),
    Command(("export", "BASE/run", "what=full", "out=BASE/full.safetensors"), "full.safetensors"),
    Command(
        (
            "import",
            "BASE/mae.safetensors",
            "out=BASE/imported",
            "num_heads=2",
            "decoder_num_heads=2",
        ),
        "imported",
    ),
    Command(
        ("embed", "BASE/run", "data=BASE/images", "out=BASE/embedded.parquet", "workers=0"),
        "embedded.parquet",
    ),
    Command(
        ("eval", "knn", "BASE/run", "data=BASE/images", "workers=0", "k=3"), "run/eval/knn.json"
    ),
    Command(("data", "shard", "BASE/images", "out=BASE/shards"), "shards"),
)


def output_runs(
    scene: Scene, *, processes: int, seconds: float, most: int | None = None
) -> Outcome:
    """Every call of every command: a crash before, within and after it, and no room from it on."""
    base = _lay_out(scene, "outputs")
    cases = list[tuple[Command, Path, int, str, Action]]()
    for number, command in enumerate(COMMANDS):
        whole = _copy(base, f"output-{number}")
        listing = scene.scratch / f"output-{number}.jsonl"
        ended = _run(command, whole, FileSystem(whole, record=listing))
        if ended.code != 0 or not (whole / command.out).exists():
            raise RuntimeError(
                f"{' '.join(command.words[:2])} ended with {ended.code}: {ended.output[-1500:]}"
            )
        for place, (name, file) in enumerate(calls(listing)):
            actions: list[Action] = (
                ["before", "half", "after"] if name in ("write", "save") else ["before", "after"]
            )
            actions += ["full"] if name in NEEDS_ROOM else []
            cases += [(command, whole, place, f"{name} {file}", action) for action in actions]
    random.Random(f"{scene.seed}/outputs").shuffle(cases)
    outcome = spread(partial(_case, base), cases[:most], processes=processes, seconds=seconds)
    outcome.remark = f"{len(COMMANDS)} commands, {len({case[1:4] for case in cases})} calls"
    return outcome


def _lay_out(scene: Scene, name: str) -> Path:
    """A folder with a finished run, labelled images and weights of others."""
    from safetensors.torch import save_file

    base = scene.scratch / name
    base.mkdir()
    shutil.copytree(scene.whole, base / "run", symlinks=True)
    for label in "ab":
        make_images(base / "images" / label)
    save_file(seeds.official_weights(), base / "mae.safetensors")
    return base


def _copy(base: Path, name: str) -> Path:
    copy = base.parent / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy, symlinks=True)
    return copy


def _run(command: Command, base: Path, system: FileSystem | None = None) -> Ended:
    def prepare() -> None:
        os.environ["XDG_CACHE_HOME"] = str(base / "cache")
        if system is not None:
            system.install()

    log = base.with_suffix(".log")
    log.unlink(missing_ok=True)
    return Child(
        [word.replace("BASE", str(base)) for word in command.words], log, prepare=prepare
    ).wait(WAIT)


def _case(base: Path, case: tuple[Command, Path, int, str, Action]) -> tuple[int, list[str]]:
    command, whole, number, call, action = case
    own = _copy(base, f"own-{os.getpid()}")
    ended = _run(command, own, FileSystem(own, action, number))
    faults = ended_badly(ended, 0, 2) if action == "full" else ended_badly(ended, CRASHED)
    faults += _torn(own / command.out, whole / command.out)
    if not faults and ended.code != 0:
        faults = _again(command, own, whole)
    shutil.rmtree(own, ignore_errors=True)
    what = (
        f"no room from call {number} on" if action == "full" else f"crashed {action} call {number}"
    )
    return 1, [f"{' '.join(command.words[:2])}, {what} ({call}): {fault}" for fault in faults]


def _again(command: Command, own: Path, whole: Path) -> list[str]:
    """The same command once more; where it refuses what is there, it says so, and does it once that
    is removed.
    """
    ended = _run(command, own)
    faults = ended_badly(ended, 0, 2)
    if not faults and ended.code == 2:
        shutil.rmtree(own / command.out, ignore_errors=True)
        faults = ended_badly(_run(command, own), 0)
    if not faults and not (own / command.out).exists():
        faults = [f"{command.out} was not written the second time"]
    return faults or _torn(own / command.out, whole / command.out)


def _torn(out: Path, whole: Path) -> list[str]:
    """An output is absent or whole."""
    if not out.exists():
        return []
    sizes, others = _sizes(out), _sizes(whole)
    torn = [
        name
        for name, size in sizes.items()
        if abs(size - others.get(name, size)) > SLACK * others.get(name, size)
    ]
    return [f"{out.name} is there in part: {torn}"] if torn else []


def _sizes(out: Path) -> dict[str, int]:
    paths: Sequence[Path] = (
        [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    )
    return {str(path.relative_to(out)): path.stat().st_size for path in paths}
