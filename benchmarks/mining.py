"""Whether mining hard patches pays: the price of each rung, and what its features are worth.

    python benchmarks/mining.py price model=vit_small_patch16_224 batch_size=8 device=cpu rounds=9
    python benchmarks/mining.py train cifar10/train cifar10/test --out runs/mining --seeds 0,1,2
    python benchmarks/mining.py train cifar10/train cifar10/test --out runs/mining-time --equal time
    python benchmarks/mining.py page runs/mining

``price`` takes the settings of `patchmine bench step`; every rung takes its turn beside MAE.
``train`` makes the runs that are missing or unfinished, one after the other, evaluates them, and
writes the page; killed and started again it goes on.  Rows may be named, as in --rows mae,hpm.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import Contestant, bench_step, build_method, contestants
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.methods.hpm import HPM
from patchmine.task import Method
from patchmine.train.engine import Engine


class Row(NamedTuple):
    """One way to mask.

    Args:
        method: its name.
        options: settings of the method.
        scores: what becomes of the scores (B, units) of which the largest are masked.
    """

    method: str
    options: Mapping[str, Any] = {}
    scores: str = "hardest"


MASKED = {"look": "masked"}
HEAD = {"look": "masked", "predictor": "head"}
OBSERVED = {"look": "masked", "score": "observed", "predictor": "head"}
ORACLE = {"look": "masked", "score": "observed", "num_looks": 8, "prediction": "none"}
ROWS = {
    "mae": Row("mae"),
    "prediction-alone": Row("hpm", {"alpha_end": 0.0}),
    "hpm": Row("hpm"),
    "masked": Row("hpm", MASKED),
    "masked-head": Row("hpm", HEAD),
    "masked-head-2-blocks": Row("hpm", {**HEAD, "predictor_depth": 2}),
    "masked-head-every-2": Row("hpm", {**HEAD, "every": 2}),
    "observed-head": Row("hpm", OBSERVED),
    "memory-head": Row("hpm", {"look": "memory", "predictor": "head"}),
    "memory": Row("hpm", {"look": "memory", "prediction": "none"}),
    "oracle": Row("hpm", ORACLE),
    "oracle-no-ramp": Row("hpm", {**ORACLE, "alpha_start": 0.5}),
    "oracle-quarter": Row("hpm", {**ORACLE, "alpha_end": 0.25}),
    "oracle-three-quarters": Row("hpm", {**ORACLE, "alpha_end": 0.75}),
    "easiest": Row("hpm", ORACLE, "easiest"),
    "position": Row("hpm", ORACLE, "position"),
    "blocks-2": Row("mae", {"mask_unit": 2}),
    "blocks-4": Row("mae", {"mask_unit": 4}),
    "green-noise": Row("mae", {"mask_noise": "green"}),
}
RECIPE = "cifar10-tiny-samples"


# ---- the bound: masks that no user wants ----


def easiest(scores: Tensor) -> Tensor:
    """The other end of the order; what has no score stays last."""
    return (-scores).where(scores.isfinite(), -torch.inf)


def by_position(scores: Tensor) -> Tensor:
    """The mean over the batch of the scores of each position, ordered in each image alike."""
    known = scores.isfinite()
    means = scores.where(known, 0.0).sum(dim=0) / known.sum(dim=0).clamp(min=1)
    return means.expand_as(scores)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"easiest": easiest, "position": by_position}


def bend_scores(how: str) -> None:
    """Let HPM order its units by something else than their difficulty."""
    if how in SCORES:
        own = HPM._unit_scores

        def bent(method: HPM, difficulty: Tensor) -> Tensor:
            return SCORES[how](own(method, difficulty))

        HPM._unit_scores = bent  # type: ignore[method-assign]


# ---- the price of a step ----


def price(words: Sequence[str]) -> dict[str, Any]:
    """Every rung in mid-training against MAE, in turns."""
    given = read_words(BenchStepSettings, list(words), command="bench step")
    settings = given.model_dump(exclude_unset=True)
    shared = settings.pop("method", {})
    shared = {key: value for key, value in shared.items() if key != "name"}

    def rungs(_: Any, config: BenchStepSettings, engine: Engine) -> list[Contestant]:
        return [
            _middle(name, build_method("hpm", {**shared, **row.options}, config), config, engine)
            for name, row in ROWS.items()
            if row.method == "hpm" and "oracle" not in name and row.scores == "hardest"
        ]

    return bench_step(say=print, rivals=rungs, method={"name": "mae", **shared}, **settings)


def _middle(name: str, method: Method, config: BenchStepSettings, engine: Engine) -> Contestant:
    """The method in mid-training, under its row's name."""
    middle = contestants(name, method, config, engine)[0]
    return Contestant(name, middle.step, middle.optimizers, middle.state)


# ---- runs ----


def run_words(row: Row, epochs: float, seed: int, more: Sequence[str]) -> list[str]:
    """The words of `patchmine pretrain` behind data and out."""
    options = [f"method.{key}={value}" for key, value in row.options.items()]
    return [f"method={row.method}", *options, f"epochs={epochs:g}", f"seed={seed}", *more]


def patchmine(*words: str) -> None:
    """One command of patchmine in a process of its own; its failure ends this program."""
    print("patchmine", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "patchmine", *words], check=True)


def make_run(name: str, folder: Path, train: Path, words: Sequence[str]) -> None:
    """The run in ``folder``, begun or taken up where it stopped."""
    if (folder / "export" / "model.safetensors").exists():
        return
    begun = (folder / "config.yaml").exists() and any((folder / "checkpoints").glob("*"))
    command = ["resume", str(folder)] if begun else ["pretrain", RECIPE, f"data={train}", *words]
    command += [] if begun else [f"out={folder}"]
    print("patchmine", shlex.join(command), flush=True)
    child = [sys.executable, __file__, "child", ROWS[name].scores, *command]
    subprocess.run(child, check=True)


def evaluate(folder: Path, train: Path, test: Path) -> None:
    """kNN and linear probe, where they are missing."""
    for kind in ("knn", "linear"):
        if not (folder / "eval" / f"{kind}.json").exists():
            patchmine("eval", kind, str(folder), f"data={train}", f"test={test}")


# ---- the page ----


def found(folder: Path) -> dict[str, float]:
    """What is known of a finished run."""
    scores = {
        kind: json.loads((folder / "eval" / f"{kind}.json").read_text())["top1"]
        for kind in ("knn", "linear")
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-5:]
    for key in ("rank_correlation", "position_share"):
        values = [line[key] for line in last if key in line]
        if values:
            scores[key] = mean(values)
    return scores


def page(out: Path) -> str:
    """A table of all finished runs in a folder: means over seeds, and their deviation."""
    columns = ("knn", "linear", "rank_correlation", "position_share")
    heads = ("kNN, %", "linear, %", "rank correlation", "position share")
    lines = [f"| masks | seeds | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for name in ROWS:
        folders = [each.parent.parent for each in out.glob(f"{name}-seed*/eval/linear.json")]
        runs = [found(folder) for folder in sorted(folders)]
        if not runs:
            continue
        cells = []
        for key in columns:
            values = [run[key] for run in runs if key in run]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}" if values else "")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


@click.group(help=__doc__)
def main() -> None:
    """The four parts."""


@main.command("price")
@click.argument("words", nargs=-1)
def price_command(words: tuple[str, ...]) -> None:
    """What a step of every rung costs."""
    with ended_in_words():
        price(words)


@main.command("train", context_settings={"ignore_unknown_options": True})
@click.argument("train", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--rows", default=",".join(ROWS))
@click.option("--seeds", default="0")
@click.option("--epochs", default=3.0)
@click.option("--labelled", type=click.Path(exists=True, path_type=Path), help="else TRAIN")
@click.argument("more", nargs=-1)
def train_command(
    train: Path,
    test: Path,
    out: Path,
    rows: str,
    seeds: str,
    epochs: float,
    labelled: Path | None,
    more: tuple[str, ...],
) -> None:
    """All runs, their evaluations, the page."""
    for seed in map(int, seeds.split(",")):
        for name in rows.split(","):
            folder = out / f"{name}-seed{seed}"
            make_run(name, folder, train, run_words(ROWS[name], epochs, seed, more))
            evaluate(folder, labelled or train, test)
            print(page(out), flush=True)


@main.command("child", context_settings={"ignore_unknown_options": True})
@click.argument("scores")
@click.argument("words", nargs=-1)
def child_command(scores: str, words: tuple[str, ...]) -> None:
    """A command of patchmine under other scores."""
    from patchmine.cli.app import main as patchmine_main

    bend_scores(scores)
    sys.argv = ["patchmine", *words]
    patchmine_main()


@main.command("page")
@click.argument("out", type=click.Path(exists=True, path_type=Path))
def page_command(out: Path) -> None:
    """The table of what is there."""
    print(page(out))


if __name__ == "__main__":
    main()
