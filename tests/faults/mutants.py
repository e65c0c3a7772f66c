"""The rows of the table that are about damaged files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import campaign
import formats
import seeds
import table
from scene import Scene
from tuned import make_tuned


def rows(scene: Scene, sizes: Any, processes: int, seconds: float) -> list[table.Row]:
    """One row a format; mutants with faults are written to ``sizes.keep``."""
    run = scene.scratch / "damaged" / "run"
    shutil.copytree(scene.whole, run, symlinks=True)
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "knn.json").write_bytes(seeds.EVALUATION)
    make_tuned(run.parent)
    every = formats.all_formats(run)
    scratch = scene.scratch / "mutants"
    tallies = campaign.run(
        every,
        count=sizes.mutants,
        seed=sizes.seed,
        processes=processes,
        seconds=seconds,
        scratch=scratch,
    )
    by_name = {each.name: each for each in every}
    if sizes.keep:
        for tally in tallies.values():
            _keep(tally, by_name, sizes)
    planned = {
        each.name: len(range(place, sizes.mutants, len(every))) for place, each in enumerate(every)
    }
    return [_row(name, tally, planned[name]) for name, tally in tallies.items()]


def _row(name: str, tally: campaign.Tally, planned: int) -> table.Row:
    faults = [
        f"{name}: {fault.kind}, {fault.reason} ({count} such; the first is mutant "
        f"{fault.number}, {fault.mutators})"
        for fault, count in campaign.grouped(tally.faults)
    ]
    return table.Row(
        f"damaged {name}",
        tally.tried,
        len(tally.faults),
        faults,
        planned - tally.tried,
        f"{tally.read} read, {tally.refused} refused",
    )


def _keep(tally: campaign.Tally, by_name: dict[str, formats.Format], sizes: Any) -> None:
    folder = Path(sizes.keep)
    folder.mkdir(parents=True, exist_ok=True)
    for fault, _ in campaign.grouped(tally.faults):
        _, data = by_name[fault.format].mutant(fault.number, sizes.seed)
        name = "".join(
            letter if letter.isalnum() or letter in ".-" else "-" for letter in fault.format
        )
        (folder / f"{name}-{fault.number}").write_bytes(data)
