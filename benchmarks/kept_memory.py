"""What it is worth that a processor's memory is kept from step to step: both ways in turns.

    python benchmarks/kept_memory.py method=mae batch_size=16 rounds=9

Takes the settings of `patchmine bench step`.  Each round makes steps of every method with the
memory given back as glibc does by itself, and with it kept; the first ones of each way are not
timed.
"""

from __future__ import annotations

from resource import RUSAGE_SELF, getrusage
from statistics import median

import click
import torch

from patchmine.bench.measure import hardware, seconds
from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import Contestant, build_method, contestants
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.models.onednn import measured_product
from patchmine.system.heap import give_back_freed, keep_freed
from patchmine.train.engine import Engine

WAYS = {"given back": give_back_freed, "kept": keep_freed}
WARM_UP, TIMED = 2, 2


def race(contestant: Contestant, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, new pages) of a step, by way, one of each round."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, begin in WAYS.items():
            begin()
            for _ in range(WARM_UP):
                contestant.step()
            before = getrusage(RUSAGE_SELF).ru_minflt
            took = seconds(contestant.step, torch.device("cpu"), TIMED)
            found[way].append((took, (getrusage(RUSAGE_SELF).ru_minflt - before) / TIMED))
    return found


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1)
def main(words: tuple[str, ...]) -> None:
    """A line for each method."""
    with ended_in_words():
        config = read_words(BenchStepSettings, [*words, "device=cpu"], command="bench step")
        given = dict(config.method) if isinstance(config.method, dict) else {"name": config.method}
        engine = Engine("cpu", precision="fp32")
        engine.product = measured_product()
        names = str(given.pop("name")).split(",")
        rivals = [contestants(n, build_method(n, given, config), config, engine)[0] for n in names]
    machine = hardware(engine.device)
    print(f"{machine['cpu']}, {machine['threads']} threads, {config.rounds} rounds")
    for contestant in rivals:
        found = race(contestant, config.rounds)
        (slow, pages), (fast, left) = (
            [median(numbers) for numbers in zip(*found[way], strict=True)] for way in WAYS
        )
        pairs = zip(found["kept"], found["given back"], strict=True)
        ratio = median(kept[0] / other[0] for kept, other in pairs)
        print(
            f"{contestant.name}: {slow * 1e3:,.0f} ms and {pages:,.0f} new pages a step, kept "
            f"{fast * 1e3:,.0f} ms and {left:,.0f}; ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
