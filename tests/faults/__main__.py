"""`make faults`: all campaigns, and one table of what was tried, what survived and what did not.

    python tests/faults [MUTANTS=10000] [KILLS=100] [SEED=0] [MINUTES=15] [ONLY=mutants,...]
    [MARKDOWN=file] [KEEP=dir]

Exit code 1 when anything did what nothing may.  docs/faults.md says what that is.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import scene as scenes
import table

GROUPS = ("mutants", "kills", "crashes", "full-disk", "outputs", "shared-folder", "killed-rank")


@dataclass(frozen=True)
class Sizes:
    """How much is tried; ``crashes``, ``full_disk`` and ``outputs`` 0: at every call."""

    mutants: int = 10_000
    kills: int = 100
    crashes: int = 0
    full_disk: int = 0
    outputs: int = 0
    shared: int = 4
    ranks: int = 4
    seed: int = 0
    processes: int = 0
    minutes: float = 15.0
    only: str = ",".join(GROUPS)
    markdown: str = ""
    keep: str = ""


def main(words: list[str]) -> int:
    """Run the groups that are asked for; 0 when there was no fault."""
    sizes = _sizes(words)
    began = time.monotonic()
    scenes.preload()
    room = Path(tempfile.mkdtemp(prefix="patchmine-faults-"))
    try:
        rows, faults = _campaigns(sizes, room)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    seconds = time.monotonic() - began
    print(table.as_text(rows, faults, sizes, seconds))
    if sizes.markdown:
        Path(sizes.markdown).write_text(table.as_markdown(rows, sizes, seconds), encoding="utf-8")
    return int(any(row.faults for row in rows))


def _sizes(words: list[str]) -> Sizes:
    """From the environment and from KEY=VALUE words, which overrule it."""
    given = {
        name: os.environ[name.upper()]
        for name in Sizes.__dataclass_fields__
        if name.upper() in os.environ
    }
    for word in words:
        key, mark, value = word.partition("=")
        if not mark or key.lower() not in Sizes.__dataclass_fields__:
            raise SystemExit(
                f"{word} is none of "
                f"{', '.join(f'{name.upper()}=' for name in Sizes.__dataclass_fields__)}"
            )
        given[key.lower()] = value
    kinds = {name: type(getattr(Sizes, name)) for name in Sizes.__dataclass_fields__}
    sizes = Sizes(**{name: kinds[name](value) for name, value in given.items()})
    unknown = set(sizes.only.split(",")) - set(GROUPS)
    if unknown:
        raise SystemExit(
            f"ONLY={sizes.only}: {', '.join(sorted(unknown))} is none of {', '.join(GROUPS)}"
        )
    return sizes


def _campaigns(sizes: Sizes, room: Path) -> tuple[list[table.Row], list[str]]:
    import crashes
    import mutants
    import outputs
    import together

    runs = scenes.scenes_of(room, sizes.seed)
    scene = runs[0]
    processes = sizes.processes or len(os.sched_getaffinity(0))
    share = 60 * sizes.minutes
    groups: dict[str, Callable[[], list[table.Row]]] = {
        "mutants": lambda: mutants.rows(scene, sizes, processes, 0.3 * share),
        "kills": lambda: _kills(runs, sizes.kills, processes, 0.2 * share),
        "crashes": lambda: [
            table.row(
                "crash at a file-system call",
                crashes.crash_runs(
                    scene, processes=processes, seconds=0.35 * share, most=sizes.crashes or None
                ),
            )
        ],
        "full-disk": lambda: [
            table.row(
                "disk full from a call on",
                crashes.full_disk_runs(
                    scene, processes=processes, seconds=0.12 * share, most=sizes.full_disk or None
                ),
            )
        ],
        "outputs": lambda: [
            table.row(
                "other commands, crashed or full",
                outputs.output_runs(
                    scene, processes=processes, seconds=0.15 * share, most=sizes.outputs or None
                ),
            )
        ],
        "shared-folder": lambda: [
            table.row(
                "two processes in one folder",
                together.shared_folder_runs(
                    scene, count=sizes.shared, processes=1, seconds=0.05 * share
                ),
            )
        ],
        "killed-rank": lambda: [
            table.row(
                "one of two ranks killed",
                together.killed_rank_runs(scene, count=sizes.ranks, seconds=0.08 * share),
            )
        ],
    }
    rows = list[table.Row]()
    for name in sizes.only.split(","):
        began = time.monotonic()
        try:
            rows += groups[name]()
        except Exception as error:  # noqa: BLE001, the other groups have something to say all the same
            rows.append(
                table.Row(
                    name,
                    1,
                    1,
                    [f"{name} could not be tried: {' '.join(str(error).split())[-300:]}"],
                )
            )
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return rows, [fault for row in rows for fault in row.faults]


def _kills(runs: list[scenes.Scene], count: int, processes: int, seconds: float) -> list[table.Row]:
    """A row a kind of run; what one leaves of its time goes to the next."""
    import kills

    rows, end = list[table.Row](), time.monotonic() + seconds
    for place, each in enumerate(runs):
        time_left = (end - time.monotonic()) / (len(runs) - place)
        number = -(-count // len(runs))
        outcome = kills.kill_runs(each, kills=number, processes=processes, seconds=time_left)
        rows.append(table.row(f"killed: {each.name}", outcome))
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
