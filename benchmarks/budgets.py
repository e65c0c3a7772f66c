"""Compares what `budget=` asks for and `patchmine plan` foresees with what whole commands took.

    python benchmarks/budgets.py "my-images data=photos/ budget=3m" "photos-demo budget=2m"

Each argument holds the words of `patchmine pretrain`, a budget among them, without out.  First they
are planned, then the run is made, both as commands of their own, from the start of Python to its
end.  The memory of the run is the most that its main process had in RAM, as the system tells it.
Nothing else may be at work on the machine meanwhile.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import click

from patchmine.strict import seconds_in

_HEAD = ("run", "budget", "took", "ratio", "memory", "peak", "ratio")


class Spent(NamedTuple):
    """What a command took.

    Args:
        seconds: from its start to its end.
        peak: most memory of its largest process, in GiB.
        output: all that it printed.
    """

    seconds: float
    peak: float
    output: str


def spent(words: Sequence[str]) -> Spent:
    """Make a command of patchmine; it ends the program where it fails."""
    with tempfile.TemporaryFile("w+") as printed:
        began = time.perf_counter()
        command = [sys.executable, "-m", "patchmine", *words]
        started = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(started.pid, 0)
        seconds = time.perf_counter() - began
        started.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        output = printed.read()
    if started.returncode:
        raise click.ClickException(f"{shlex.join(words)} failed:\n{output[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return Spent(seconds, usage.ru_maxrss * unit / 2**30, output)


def compared(words: Sequence[str]) -> tuple[str, ...]:
    """A row of the table."""
    budget = next((word.partition("=")[2] for word in words if word.startswith("budget=")), None)
    if budget is None:
        raise click.ClickException(f"{shlex.join(words)} has no budget=")
    planned = spent(["plan", *words]).output
    memory = re.search(r"^memory +([\d.]+) GiB", planned, re.MULTILINE)
    assert memory is not None, planned
    with tempfile.TemporaryDirectory() as folder:
        run = spent(["pretrain", *words, f"out={folder}/run"])
    print("\n".join(line for line in run.output.splitlines() if line.startswith("budget=")))
    foreseen = float(memory[1])
    return (
        " ".join(word for word in words if not word.startswith("budget=")),
        budget,
        f"{run.seconds:.0f} s",
        f"{run.seconds / seconds_in(budget):.2f}",
        f"{foreseen:.2f} GiB",
        f"{run.peak:.2f} GiB",
        f"{foreseen / run.peak:.2f}",
    )


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True)
def main(runs: tuple[str, ...]) -> None:
    """A table, row by row."""
    rows = [compared(shlex.split(run)) for run in runs]
    for row in (_HEAD, ["---"] * len(_HEAD), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
