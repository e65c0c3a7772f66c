"""What it is worth that a processor's memory is kept from step to step: both ways in turns.

    python benchmarks/kept_memory.py method=mae batch_size=16 rounds=9

Takes the settings of `patchmine bench step`, and one method.  Each round makes steps in two
processes one after the other, of which one leaves memory to glibc's own rules.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from resource import RUSAGE_SELF, getrusage
from statistics import median

import click
import torch

from patchmine.bench.measure import hardware, seconds
from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import build_method, contestants, engine_of, methods_asked
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.errors import UserError
from patchmine.task import Method

# Says what holds anyway; that it is said leaves the memory to glibc.
ENVIRONMENTS = {"given back": {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, "kept": {}}
WARM_UP, TIMED = 3, 6


def method_of(config: BenchStepSettings) -> Method:
    """The one method that is meant."""
    names, options = methods_asked(config)
    if len(names) > 1:
        raise UserError(f"method={','.join(names)}: give one method")
    return build_method(names[0], options[names[0]], config)


def made_here(config: BenchStepSettings) -> tuple[float, float]:
    """(seconds, new pages) of a step of this process."""
    engine, method = engine_of(config), method_of(config)
    step = contestants("it", method, config, engine)[0].step
    for _ in range(WARM_UP):
        step()
    before = getrusage(RUSAGE_SELF).ru_minflt
    took = [seconds(step, engine.device) for _ in range(TIMED)]
    return median(took), (getrusage(RUSAGE_SELF).ru_minflt - before) / TIMED


def made_in_a_process(words: list[str], variables: dict[str, str]) -> tuple[float, float]:
    """The same of another process."""
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(
        command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True
    )
    took, pages = json.loads(done.stdout.splitlines()[-1])
    return took, pages


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option("--child", is_flag=True, hidden=True)
@click.argument("words", nargs=-1)
def main(child: bool, words: tuple[str, ...]) -> None:
    """Two lines and a ratio."""
    with ended_in_words():
        config = read_words(BenchStepSettings, [*words, "device=cpu"], command="bench step")
        if child:
            print(json.dumps(made_here(config)))
            return
        method_of(config)  # mistakes are told before any process is started
    machine = hardware(torch.device("cpu"))
    print(f"{machine['cpu']}, {machine['threads']} threads, {config.rounds} rounds")
    rounds = [
        {way: made_in_a_process(list(words), variables) for way, variables in ENVIRONMENTS.items()}
        for _ in range(config.rounds)
    ]
    for way in ENVIRONMENTS:
        took, pages = (median(numbers) for numbers in zip(*[r[way] for r in rounds], strict=True))
        print(f"{way}: {took * 1e3:,.0f} ms and {pages:,.0f} new pages a step")
    ratios = [r["kept"][0] / r["given back"][0] for r in rounds]
    print(f"kept / given back: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
