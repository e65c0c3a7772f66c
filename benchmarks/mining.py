"""Whether mining hard patches pays: the price of each rung, and what its features are worth.

    python benchmarks/mining.py price model=vit_small_patch16_224 batch_size=4 device=cpu rounds=9
    python benchmarks/mining.py train cifar10/train cifar10/test --out runs/mining --seeds 0,1,2
    python benchmarks/mining.py train cifar10/train cifar10/test --out runs/mining-time --equal time
    python benchmarks/mining.py page runs/mining

``price`` takes the settings of `patchmine bench step`; every rung takes its turn beside MAE.
``train`` makes the runs that are missing or unfinished, one after the other, evaluates them, and
writes the page; killed and started again it goes on, on a GPU where there is one.  Settings of
`patchmine pretrain` may follow, and rows be named, as in --rows mae,hpm.  What results.json in the
folder tells already is not run again, so that a table begun on one machine goes on on another.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from mining_rows import CLAIMS, ROWS, Row, bend, bend_look
from scipy.stats import t

from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import Contestant, bench_step, build_method, contestants
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.config.resolve import of_kind, parse
from patchmine.config.schema import PretrainConfig
from patchmine.data.sources.source import open_source
from patchmine.task import Method
from patchmine.train.engine import Engine

LADDER = [
    name
    for name, row in ROWS.items()
    if row.method in ("mae", "hpm") and row.options.get("num_looks") is None
]
RECIPE = "cifar10-tiny-samples"
HALF_SIZE = 16  # of the recipe's 32 pixels
FINETUNE = (
    "shares=1%,10%",
    "steps=400",
    "batch_size=64",
    "warmup_epochs=0",
    "blr=4e-3",
    "layer_decay=0.85",
    "crop_scale=[0.6,1.0]",
)
COLUMNS = {
    "knn": "kNN, %",
    "linear": "linear, %",
    "1%": "1 % of the labels",
    "10%": "10 % of the labels",
    "rank_correlation": "rank correlation",
    "position_share": "position share",
}
SCORES = ("linear", "knn", "1%", "10%")  # of COLUMNS; the linear probe decides
# ---- the price of a step ----


def race(
    settings: BenchStepSettings, rungs: Mapping[str, tuple[BenchStepSettings, dict[str, Any]]]
) -> dict[str, Any]:
    """A step of every rung in mid-training against MAE, in turns; options of methods by row."""

    def rivals(_: Any, config: BenchStepSettings, engine: Engine) -> list[Contestant]:  # noqa: ARG001
        made = []
        for name, (own, options) in rungs.items():
            method = build_method(ROWS[name].method, options, own)
            bend_look(ROWS[name], method)
            made.append(_middle(name, method, own, engine))
        return made

    return bench_step(say=print, rivals=rivals, **settings.model_dump(exclude_unset=True))


def _middle(name: str, method: Method, config: BenchStepSettings, engine: Engine) -> Contestant:
    """The method in mid-training, under its row's name."""
    middle = contestants(name, method, config, engine)[0]
    return Contestant(name, middle.step, middle.optimizers, middle.state)


def price(words: Sequence[str], names: Sequence[str]) -> None:
    """Every rung at sizes of the user's."""
    settings = read_words(BenchStepSettings, list(words), command="bench step")
    shared = settings.method if isinstance(settings.method, dict) else {}
    shared = {key: value for key, value in shared.items() if key != "name"}
    rungs = {name: (settings, {**shared, **ROWS[name].options}) for name in names if name != "mae"}
    race(settings.model_copy(update={"method": {"name": "mae", **shared}}), rungs)


def prices(out: Path, names: Sequence[str], more: Sequence[str]) -> dict[str, float]:
    """What a step of each row costs, MAE's being 1, at the sizes of the runs; measured once."""
    file = out / "prices.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"mae": 1.0}
    missing = [name for name in names if name not in known]
    if missing:
        given = {name: _as_bench(name, more) for name in ("mae", *missing)}
        own, options = given.pop("mae")
        mae = own.model_copy(update={"method": {"name": "mae", **options}, "rounds": 9})
        ratios = race(mae, given)["ratios"]
        known |= {name: 1 / ratios[f"mae / {name}"] for name in missing}
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known


def _as_bench(name: str, more: Sequence[str]) -> tuple[BenchStepSettings, dict[str, Any]]:
    """The sizes and the settings of the method of a row's run, whatever it reads."""
    words = [*run_words(ROWS[name], 1, 0, more), "data=embedded:photos", "out=none"]
    config = of_kind(parse(RECIPE, words), PretrainConfig)
    kept = ("model", "model_args", "image_size", "patch_size", "batch_size", "crops", "device")
    sizes = {key: getattr(config, key) for key in kept}
    options = config.method.model_dump(exclude_unset=True, exclude={"name"})
    return BenchStepSettings(**sizes), options


# ---- runs ----


def run_words(row: Row, steps: int, seed: int, more: Sequence[str]) -> list[str]:
    """The words of `patchmine pretrain` behind data and out."""
    options = [f"method.{key}={value}" for key, value in row.options.items()]
    return [f"method={row.method}", *options, f"steps={steps}", f"seed={seed}", *more]


def steps_per_epoch(train: Path, more: Sequence[str]) -> int:
    """Whole batches of the images."""
    words = [*run_words(ROWS["mae"], 1, 0, more), f"data={train}", "out=none"]
    return len(open_source(train)) // parse(RECIPE, words).batch_size


def patchmine(*words: str) -> None:
    """One command of patchmine in a process of its own; its failure ends this program."""
    print("patchmine", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "patchmine", *words], check=True)


def make_row(
    name: str, folder: Path, train: Path, steps: int, seed: int, more: Sequence[str]
) -> None:
    """The run of a row, after the one at half the size where the row begins with that."""
    row = ROWS[name]
    early = round(row.small_first * steps)
    begin = []
    if early:
        small = folder.with_name(f"{folder.name}-small")
        words = run_words(row, early, seed, [*more, f"image_size={HALF_SIZE}"])
        make_run(name, small, train, words)
        begin = [f"init={small}"]
    make_run(name, folder, train, run_words(row, steps - early, seed, [*more, *begin]))


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


def evaluate(folder: Path, train: Path, test: Path, finetune: bool, seed: int) -> None:
    """kNN and linear probe, and fine-tuning with few labels, where they are missing."""
    data = (f"data={train}", f"test={test}")
    for kind in ("knn", "linear"):
        if not (folder / "eval" / f"{kind}.json").exists():
            patchmine("eval", kind, str(folder), *data)
    if finetune and not (folder / "finetune" / "eval" / "shares.json").exists():
        # The rows of a seed share their drawn labels; each seed has others.
        words = (*FINETUNE, f"seed={seed}", f"out={folder / 'finetune'}")
        patchmine("finetune", str(folder), *data, *words)


# ---- the page ----


def found(folder: Path) -> dict[str, float]:
    """What is known of a finished run."""
    scores = {
        kind: json.loads((folder / "eval" / f"{kind}.json").read_text(encoding="utf-8"))["top1"]
        for kind in ("knn", "linear")
    }
    shares = folder / "finetune" / "eval" / "shares.json"
    if shares.exists():
        entries = json.loads(shares.read_text(encoding="utf-8"))["entries"]
        scores |= {f"{each['share']:.0%}": round(each["top1"], 2) for each in entries}
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for key in ("rank_correlation", "position_share"):
        values = [line[key] for line in lines if key in line]
        if values:
            scores[key] = mean(values[-5:])
    return scores


def results(out: Path) -> dict[str, dict[int, dict[str, float]]]:
    """All finished runs, by row, by seed: those that results.json tells, and those in folders."""
    file = out / "results.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    done = {
        name: {int(seed): run for seed, run in told.get(name, {}).items()}
        | {
            int(folder.name.rpartition("seed")[2]): found(folder)
            for folder in out.glob(f"{name}-seed[0-9]*")
            if (folder / "eval" / "linear.json").exists()
        }
        for name in ROWS
    }
    return {name: dict(sorted(runs.items())) for name, runs in done.items() if runs}


def table(done: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[str]:
    """Means over seeds and their standard deviation."""
    keys = {
        key: head
        for key, head in COLUMNS.items()
        if any(key in run for row in done.values() for run in row.values())
    }
    lines = [f"| masks | seeds | {' | '.join(keys.values())} |", "|---|---|" + "---|" * len(keys)]
    for name, runs in done.items():
        cells = []
        for key in keys:
            values = [run[key] for run in runs.values() if key in run]
            deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{deviation}" if values else "")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def interval(gains: Sequence[float]) -> tuple[float, float]:
    """Of the mean of the seeds' gains, 95 % by Student's t."""
    half = float(t.ppf(0.975, len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
    return mean(gains) - half, mean(gains) + half


def verdicts(done: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[str]:
    """Each claim of which there are runs: mean differences over the seeds that both rows have, with
    their intervals; the linear probe gives the verdict.
    """
    keys = [
        key for key in SCORES if any(key in run for row in done.values() for run in row.values())
    ]
    heads = " | ".join(COLUMNS[key].replace(", %", "") for key in keys)
    lines = [f"| claim | rows | {heads} | verdict |", "|---|---|" + "---|" * len(keys) + "---|"]
    for claim, name, against in CLAIMS:
        one, other = done.get(name, {}), done.get(against, {})
        seeds = sorted(one.keys() & other.keys())
        if not seeds:
            continue
        cells, said = [], "too few seeds"
        for key in keys:
            pairs = [(one[seed], other[seed]) for seed in seeds]
            gains = [a[key] - b[key] for a, b in pairs if key in a and key in b]
            cells.append(f"{mean(gains):+.2f}" if gains else "")
            if len(gains) > 1:
                low, high = interval(gains)
                cells[-1] += f" ({low:+.2f} to {high:+.2f})"
                if key == "linear":
                    said = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
        lines.append(f"| {claim} | {name} over {against} | {' | '.join(cells)} | {said} |")
    return lines


def page(out: Path) -> str:
    """The table and the verdicts of what is there."""
    done = results(out)
    if not done:
        raise click.ClickException(f"{out} holds no finished run of a row: give a folder of train")
    raw = json.dumps(done, indent=1) + "\n"
    (out / "results.json").write_text(raw, encoding="utf-8")
    text = "\n".join([*table(done), "", *verdicts(done)]) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


@click.group(help=__doc__)
def main() -> None:
    """The three parts."""


def _rows(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise click.ClickException(f"no row {unknown[0]}; there are {', '.join(ROWS)}")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise click.ClickException(f"--seeds {text}: give whole numbers, as in 0,1,2") from error


@contextmanager
def _failure_told(folder: Path) -> Iterator[None]:
    """One sentence behind what a failed command has said."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        said = f"{folder}: a command of it failed, see above; the same call takes it up again"
        raise click.ClickException(said) from error


@main.command("price", context_settings={"ignore_unknown_options": True})
@click.option("--rows", default=",".join(LADDER), help="by commas")
@click.argument("words", nargs=-1)
def price_command(rows: str, words: tuple[str, ...]) -> None:
    """What a step of every rung costs."""
    with ended_in_words():
        price(words, _rows(rows))


@main.command("train", context_settings={"ignore_unknown_options": True})
@click.argument("train", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--rows", default=",".join(ROWS), help="by commas; all of them unless given")
@click.option("--seeds", default="0,1,2", help="by commas")
@click.option("--epochs", default=10.0, help="of MAE")
@click.option("--equal", type=click.Choice(["samples", "time"]), default="samples")
@click.option("--labelled", type=click.Path(exists=True, path_type=Path), help="else TRAIN")
@click.option("--finetune/--no-finetune", default=False, help="with 1 % and 10 % of the labels too")
@click.argument("more", nargs=-1)
def train_command(
    train: Path,
    test: Path,
    out: Path,
    rows: str,
    seeds: str,
    epochs: float,
    equal: str,
    labelled: Path | None,
    finetune: bool,
    more: tuple[str, ...],
) -> None:
    """All runs, their evaluations, the page."""
    names, numbers = _rows(rows), _seeds(seeds)
    with ended_in_words():
        whole = epochs * steps_per_epoch(train, more)
        costs = prices(out, names, more) if equal == "time" else dict.fromkeys(names, 1.0)
    out.mkdir(parents=True, exist_ok=True)
    for seed in numbers:
        for name in names:
            told = results(out).get(name, {}).get(seed, {})
            if "linear" not in told or (finetune and "10%" not in told):
                folder = out / f"{name}-seed{seed}"
                with _failure_told(folder):
                    make_row(name, folder, train, round(whole / costs[name]), seed, more)
                    evaluate(folder, labelled or train, test, finetune, seed)
            print(page(out), flush=True)


@main.command("child", context_settings={"ignore_unknown_options": True})
@click.argument("scores")
@click.argument("words", nargs=-1)
def child_command(scores: str, words: tuple[str, ...]) -> None:
    """A command of patchmine under other scores."""
    from patchmine.cli.app import main as patchmine_main

    bend(scores)
    sys.argv = ["patchmine", *words]
    patchmine_main()


@main.command("page")
@click.argument("out", type=click.Path(exists=True, path_type=Path))
def page_command(out: Path) -> None:
    """The table of what is there."""
    print(page(out))


if __name__ == "__main__":
    main()
