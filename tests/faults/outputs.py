"""The commands that write something beside a run: each is crashed at, and refused room from, every
call of its own.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import seeds
from crashes import crash_after_checkpoint
from filesystem import CRASHED, NEEDS_ROOM, Action, FileSystem, calls
from scene import Ended, Scene, make_images
from seeing import make_seeing
from spread import Outcome, spread
from tuned import COMPARES, LEARNS, make, make_tuned, run_in
from verdict import body, ended_badly

SLACK = 0.05  # share by which the size of an output may differ: times and paths are in some


@dataclass(frozen=True)
class Command:
    """A command whose words `tuned.run_in` takes, and what it writes below BASE; where this is
    ``exact``, it holds the same to the last bit whenever it is written; where it is ``one``, the
    files of a folder are there together or not at all.
    """

    words: tuple[str, ...]
    outs: tuple[str, ...]
    exact: bool = False
    one: bool = False

    def __str__(self) -> str:
        return f"{' '.join(self.words[:2])} to {self.outs[-1]}"


def _command(line: str, *outs: str, exact: bool = False, one: bool = False) -> Command:
    return Command(tuple(line.split()), outs, exact, one)


COMMANDS = (
    _command("report BASE/run out=BASE/report.html", "report.html"),
    _command("show BASE/run BASE/images/a/00.png out=BASE/panel.png", "panel.png"),
    _command("export BASE/run out=BASE/exported", "exported"),
    _command("export BASE/run what=full out=BASE/full.safetensors", "full.safetensors"),
    _command(
        "import BASE/mae.safetensors out=BASE/imported num_heads=2 decoder_num_heads=2", "imported"
    ),
    _command(
        "embed BASE/run data=BASE/images out=BASE/embedded.parquet workers=0", "embedded.parquet"
    ),
    _command("eval knn BASE/run data=BASE/images workers=0 k=3", "run/eval/knn.json"),
    _command("data shard BASE/images out=BASE/shards", "shards"),
    _command("predict BASE/tuned BASE/images out=BASE/told.csv workers=0", "told.csv"),
    _command("predict BASE/tuned BASE/images out=BASE/told.parquet workers=0", "told.parquet"),
    _command(
        "predict BASE/tuned BASE/images out=BASE/told/ workers=0",
        "told/predictions.csv",
        "told/predictions.png",
    ),
    _command("predict BASE/mapped BASE/asked out=BASE/maps workers=0", "maps", one=True),
    _command(
        "predict BASE/found BASE/asked out=BASE/objects workers=0 score_threshold=0",
        "objects",
        one=True,
    ),
    _command(
        "explore BASE/run data=BASE/images out=BASE/seen.html workers=0", "seen.csv", "seen.html"
    ),
    # The second half of a run that learns labels, its test and its export.
    _command("resume BASE/half workers=0", "half/eval/test.json", "half/export", exact=True),
    # What a comparison has left to do when its runs are made.
    _command(COMPARES, "compared/eval/shares.json", "compared/shares.png"),
    _command("export BASE/tuned to=transformers out=BASE/opened", "opened"),
    _command("export BASE/tuned to=onnx out=BASE/tuned.onnx", "tuned.onnx"),
    _command("export BASE/mapped to=torch out=BASE/mapped.pt2", "mapped.pt2"),
    _command("export BASE/found to=torch out=BASE/finder", "finder", one=True),
)


def output_runs(
    scene: Scene, *, processes: int, seconds: float, most: int | None = None
) -> Outcome:
    """Every call of every command: a crash before, within and after it, and no room from it on."""
    _preload()
    base = _lay_out(scene, "outputs")
    cases = list[tuple[Command, Path, int, str, Action]]()
    for number, command in enumerate(COMMANDS):
        whole = _copy(base, f"output-{number}")
        listing = scene.scratch / f"output-{number}.jsonl"
        ended = _run(command, whole, FileSystem(whole, record=listing).install)
        if ended.code != 0 or not all((whole / out).exists() for out in command.outs):
            raise RuntimeError(f"{command} ended with {ended.code}: {ended.output[-1500:]}")
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


def _preload() -> None:
    """Import what the commands need beside `scene.preload`, and no other campaign does."""
    import faster_coco_eval
    import onnxruntime
    import onnxscript
    import transformers

    import patchmine.report.explore
    import patchmine.report.predictions
    import patchmine.training.shares

    del faster_coco_eval, onnxruntime, onnxscript, patchmine
    assert transformers.AutoModelForImageClassification  # imported when it is asked for


def _lay_out(scene: Scene, name: str) -> Path:
    """A folder with finished runs, labelled images and weights of others."""
    from safetensors.torch import save_file

    base = scene.scratch / name
    base.mkdir()
    shutil.copytree(scene.whole, base / "run", symlinks=True)
    for label in "ab":
        make_images(base / "images" / label)
    save_file(seeds.official_weights(), base / "mae.safetensors")
    make_tuned(base)
    make_seeing(base)
    make(base, f"{LEARNS} out=BASE/half", partial(crash_after_checkpoint, 2), CRASHED)
    shutil.rmtree(base / "compared" / "eval")
    (base / "compared" / "shares.png").unlink()
    return base


def _copy(base: Path, name: str) -> Path:
    copy = base.parent / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy, symlinks=True)
    return copy


def _run(command: Command, base: Path, prepare: Callable[[], None] = lambda: None) -> Ended:
    def begin() -> None:
        os.environ["XDG_CACHE_HOME"] = str(base / "cache")
        prepare()

    return run_in(base, command.words, begin)


def _case(base: Path, case: tuple[Command, Path, int, str, Action]) -> tuple[int, list[str]]:
    command, whole, number, call, action = case
    own = _copy(base, f"own-{os.getpid()}")
    ended = _run(command, own, FileSystem(own, action, number).install)
    faults = ended_badly(ended, 0, 2) if action == "full" else ended_badly(ended, CRASHED)
    faults += _torn(command, own, whole)
    if not faults and ended.code != 0:
        faults = _again(command, own, whole)
    shutil.rmtree(own, ignore_errors=True)
    what = (
        f"no room from call {number} on" if action == "full" else f"crashed {action} call {number}"
    )
    return 1, [f"{command}, {what} ({call}): {fault}" for fault in faults]


def _again(command: Command, own: Path, whole: Path) -> list[str]:
    """The same command once more; where it refuses what is there, it says so, and does it once that
    is removed.
    """
    ended = _run(command, own)
    faults = ended_badly(ended, 0, 2)
    if not faults and ended.code == 2:
        for out in command.outs:
            shutil.rmtree(own / out, ignore_errors=True)
        faults = ended_badly(_run(command, own), 0)
    missing = [out for out in command.outs if not (own / out).exists()]
    if not faults and missing:
        faults = [f"{', '.join(missing)} was not written the second time"]
    return faults or _torn(command, own, whole)


def _torn(command: Command, base: Path, whole: Path) -> list[str]:
    """An output is absent or whole."""
    differing = _other_bytes if command.exact else _other_sizes
    return [
        f"{out} is there in part: {torn}"
        for out in command.outs
        if (base / out).exists()
        and (
            torn := differing(base / out, whole / out) + _missing(command, base / out, whole / out)
        )
    ]


def _missing(command: Command, out: Path, whole: Path) -> list[str]:
    """Files that a folder lacks which is written as one."""
    return sorted(_sizes(whole).keys() - _sizes(out).keys()) if command.one else []


def _other_sizes(out: Path, whole: Path) -> list[str]:
    sizes, others = _sizes(out), _sizes(whole)
    return [
        name
        for name, size in sizes.items()
        if abs(size - others.get(name, size)) > SLACK * others.get(name, size)
    ]


def _other_bytes(out: Path, whole: Path) -> list[str]:
    return [name for name in _sizes(out) if _content(out / name) != _content(whole / name)]


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    return body(data) if path.suffix == ".safetensors" else data


def _sizes(out: Path) -> dict[str, int]:
    paths: Sequence[Path] = (
        [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    )
    return {str(path.relative_to(out)): path.stat().st_size for path in paths}
