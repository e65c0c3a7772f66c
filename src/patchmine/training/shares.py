"""Did it help?  Runs with parts of the labels, from several starts, at equal settings."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchmine.config.overrides import exists
from patchmine.config.resolve import changed_results, of_kind, results_of
from patchmine.config.schema import AnyConfig, FinetuneConfig
from patchmine.data.sources.source import Spec
from patchmine.errors import Say, UserError, foreign_parser, shown_name, silent
from patchmine.evaluate.measure import write_result
from patchmine.report.reading import SHARES
from patchmine.report.series import finite_number
from patchmine.report.verdict import draw_verdict, read_verdict
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.runs.preparing import NO_SOURCES
from patchmine.system.disk import output
from patchmine.tasks.classify import SCORE
from patchmine.tasks.settings import ShareSettings
from patchmine.train.engine import Engine
from patchmine.train.launch import read_launch
from patchmine.training import finetuning
from patchmine.training.labels import Parts, divide, open_parts
from patchmine.training.place import Place, open_place
from patchmine.training.resuming import resume
from patchmine.training.starting import settings_of_start
from patchmine.training.supervised import TEST

PRETRAINED, RANDOM = "pretrained", "random_init"
_EQUAL = (
    "All starts have the settings of the first; random weights often want more epochs and "
    "layer_decay=1."
)
_OF_THE_DATA = ("image_size", "channels", "interpolation", "crop_pct", "clip")
_TESTED = ("test", "crop_pct")  # these decide no weights, but the numbers


def settings_of_starts(start: str, wanted: ShareSettings) -> dict[str, dict[str, Any]]:
    """The settings that each start stands for, by its name in the result; the given one first.

    Images are prepared as for the given one; mean and deviation are those of each network.

    Args:
        start: as in `settings_of_start`.
        wanted: ``baselines`` and ``compare``.

    Raises:
        UserError: there is no such start, or a random one is to be compared with itself.
    """
    base = settings_of_start(start)
    if wanted.baselines and "init" not in base:
        raise UserError(
            f"baselines=true, but {shown_name(start)} is an architecture, whose weights are random "
            "already: start from a run, an export or a file, or leave baselines out"
        )
    starts = {PRETRAINED if "init" in base else RANDOM: base}
    if wanted.baselines:
        starts[RANDOM] = {name: value for name, value in base.items() if name != "init"}
    equal = {name: base[name] for name in _OF_THE_DATA if name in base}
    compared = [wanted.compare] if isinstance(wanted.compare, str) else wanted.compare
    for number, name in enumerate(compared, 1):
        label = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem if exists(name) else name)
        label = label if label not in starts else f"{label}-{number}"
        starts[label] = settings_of_start(name) | equal
    return starts


def configs_of_starts(
    start: str,
    wanted: ShareSettings,
    read: Callable[[dict[str, Any], Say], AnyConfig],
    say: Say = silent,
) -> dict[str, FinetuneConfig]:
    """Complete settings of each start, by its name in the result.

    Args:
        start: see `settings_of_starts`, as ``wanted``.
        read: makes a run's settings of those that a start stands for and of the user's own.
        say: hears what ``read`` decides for the given start; for the others it decides it again.
    """
    configs: dict[str, FinetuneConfig] = {}
    for name, base in settings_of_starts(start, wanted).items():
        configs[name] = of_kind(read(base, silent if configs else say), FinetuneConfig)
    return configs


@dataclass(frozen=True, eq=False)
class Planned:
    """A run that is to be made: its complete settings, and how many images and steps it has."""

    start: str
    config: FinetuneConfig
    images: int
    tested: int
    steps: int

    @property
    def folder(self) -> Path:
        """Where it stands."""
        return Path(str(self.config.out))

    @property
    def tests(self) -> Path:
        """The file of its result."""
        return self.folder / "eval" / f"{TEST}.json"

    def is_finished(self) -> bool:
        """Whether it has been tested."""
        return self.tests.is_file()

    def result(self) -> dict[str, Any]:
        """What its test found.  Raises UserError for a damaged file."""

        def refuse(reason: str) -> UserError:
            named = shown_name(self.tests)
            return UserError(f"{named} is no result of a test ({reason}): remove it to test again")

        with foreign_parser(refuse):
            found: dict[str, Any] = json.loads(self.tests.read_text(encoding="utf-8"))
            if not all(type(found["images"][part]) is int for part in ("train", "test")):
                raise TypeError("images does not count them")
        return found


def check_shares(
    starts: Mapping[str, FinetuneConfig], wanted: ShareSettings, *, say: Say = silent
) -> None:
    """Look whether all runs can be made; nothing is trained.  Raises as `compare_shares` does."""
    planned, _ = _plan(starts, wanted, NO_SOURCES, say)
    say(f"Settings and labels fit: {_counted(planned)}.")


def compare_shares(
    starts: Mapping[str, FinetuneConfig],
    wanted: ShareSettings,
    *,
    sources: Mapping[str, Spec] = NO_SOURCES,
    say: Say = silent,
) -> dict[str, Any]:
    """Make a run for each start, share and seed below ``out``, and put their results together.

    A run that is finished is not made again, and one that was interrupted goes on.

    Args:
        starts: settings of each start, by its name; all have the same ``out``.
        wanted: shares and seeds.
        sources: as in `finetuning.finetune`.
        say: hears what happens.

    Returns:
        What ``eval/shares.json`` holds; a picture stands beside it in ``shares.png``.

    Raises:
        UserError: mistakes in settings, labels or folders, all before anything is trained.
        Interrupted: as `finetuning.finetune`.
    """
    planned, parts = _plan(starts, wanted, sources, say)
    say(f"{_counted(planned)}; after an interruption the same command goes on with them.")
    say = _once(say)
    for number, run in enumerate(planned, 1):
        config, start = run.config, run.start
        told = f"{number} of {len(planned)}: {start}, {100 * config.share:g} % of the labels"
        told += f" ({run.images:,} to train on), seed {config.seed}"
        if run.is_finished():
            say(f"{told}: done before.")
            continue
        say(f"{told}: {run.folder}")
        _make(run, parts, sources, say)
    result = _put_together(planned, how=parts[-1])
    folder = _folder_of(starts)
    write_result(folder / "eval" / f"{SHARES}.json", result)
    with output(folder / f"{SHARES}.png") as new:
        draw_verdict(read_verdict(result)).save(new)
    say(f"Done: {folder}/{SHARES}.png. Next: `patchmine report {shown_name(folder)}`.")
    return result


def _make(run: Planned, parts: Parts, sources: Mapping[str, Spec], say: Say) -> None:
    """Train and test one of the runs, from where it stands."""
    if (run.folder / "config.yaml").exists():
        resume(run.folder, sources=sources, say=say)
        return
    with open_place(run.folder, run.config, say) as place:
        refuse_used_folder(run.folder)
        finetuning.train_classifier(run.config, place, divide(parts, run.config), None)


def _once(say: Say) -> Say:
    """Says no text twice: the table of rates of a start, what became of its tensors."""
    said: set[str] = set()

    def hear(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return hear


def _folder_of(starts: Mapping[str, FinetuneConfig]) -> Path:
    return new_folder(next(iter(starts.values())))


def _counted(planned: Sequence[Planned]) -> str:
    starts, shares, seeds = (
        len(set(each))
        for each in zip(*((p.start, p.config.share, p.config.seed) for p in planned), strict=True)
    )
    return (
        f"{len(planned)} runs (shares: {shares}, starts: {starts}, seeds: {seeds}), "
        f"{sum(run.steps for run in planned):,} steps in all"
    )


def _plan(
    starts: Mapping[str, FinetuneConfig],
    wanted: ShareSettings,
    sources: Mapping[str, Spec],
    say: Say,
) -> tuple[list[Planned], Parts]:
    """Every run, and all labelled images; seed by seed, so that whole tables are finished first."""
    first, folder = next(iter(starts.values())), _folder_of(starts)
    refuse_used_folder(folder)
    _refuse_misfits(starts, wanted)
    shares, item = sorted(set(wanted.shares)) or [first.share], preparing.item_of(first)
    parts = open_parts(first, item, sources)
    say(parts[-1])
    engine, hear = Engine(first.device, 1, 1, first.precision, say), _once(say)
    planned = []
    for seed in range(first.seed, first.seed + wanted.seeds):
        for share in shares:
            own = {"share": share, "seed": seed}
            labelled = divide(parts, first.model_copy(update=own))
            images, tested = len(labelled.train), len(labelled.test)
            for name, given in starts.items():
                place = folder / "runs" / f"{name}-{100 * share:g}pct-seed{seed}"
                config = given.model_copy(update={**own, "out": str(place)})
                # Few images are fewer than a batch: it is lowered, for all starts alike.
                config.model_fields_set.discard("batch_size")
                config = finetuning.fit_to_labels(config, Place(place, engine, hear), labelled)
                steps = preparing.length_of(config, images).total_steps
                planned.append(Planned(name, config, images, tested, steps))
    for run in planned:
        _refuse_another(run)
    return planned, parts


def _refuse_misfits(starts: Mapping[str, FinetuneConfig], wanted: ShareSettings) -> None:
    """UserError for settings that are right for one run, and not for a comparison."""
    first = next(iter(starts.values()))
    if read_launch(os.environ, first.devices, first.num_nodes).world_size > 1:
        raise UserError(
            f"devices={first.devices} and num_nodes={first.num_nodes}: the runs of a comparison "
            "are made one after the other by one process: leave these settings and launchers out"
        )
    if wanted.shares and first.share < 1:
        raise UserError(f"share={100 * first.share:g}% beside shares: give one of the two")
    item = preparing.item_of(first)
    for name, config in starts.items():
        if preparing.item_of(config) is not item:
            raise UserError(
                f"compare: {name} takes no {item.noun}s, as the others do: leave it out"
            )


def _refuse_another(run: Planned) -> None:
    """UserError where a run stands already that was made otherwise, or on other images."""
    if not (run.folder / "config.yaml").exists():
        return
    if run.is_finished():
        images = run.result()["images"]
        if (images["train"], images["test"]) != (run.images, run.tested):
            raise UserError(
                f"{run.folder} was trained on {images['train']:,} images and tested on "
                f"{images['test']:,}, but data and test give {run.images:,} and {run.tested:,} "
                "now: choose another out"
            )
    before, now = (
        results_of(config) | {name: getattr(config, name) for name in _TESTED}
        for config in (RunFolder(run.folder).config, run.config)
    )
    if changed := changed_results(before, now):
        raise UserError(
            f"{run.folder} was made with other settings: {'; '.join(changed)}: give those to go "
            "on, or choose another out"
        )


def _put_together(planned: Sequence[Planned], how: str) -> dict[str, Any]:
    """The result from those of the runs."""
    metric = SCORE[planned[0].config.loss]
    found = {run: run.result() for run in planned}
    entries = []
    for share, start in dict.fromkeys((run.config.share, run.start) for run in planned):
        own = [run for run in planned if (run.config.share, run.start) == (share, start)]
        scores = [_score(run, found[run], metric) for run in own]
        entries.append(
            {
                "share": share,
                "start": start,
                "images": own[0].images,
                "steps": own[0].steps,
                "batch_size": own[0].config.batch_size,
                metric: statistics.fmean(scores),
                "std": statistics.stdev(scores) if len(scores) > 1 else None,
                "scores": scores,
                "seeds": [run.config.seed for run in own],
                "runs": [f"runs/{run.folder.name}" for run in own],
            }
        )
    settings = {run: results_of(run.config) for run in planned}
    every = list(settings.values())
    varied = {"share", "seed", "batch_size"}
    equal = {k: v for k, v in every[0].items() if all(k in s and s[k] == v for s in every)}
    first = {run.start: settings[run] for run in reversed(planned)}
    return {
        "name": SHARES,
        "protocol": "finetune",
        "metric": metric,
        "entries": entries,
        "settings": equal,
        "starts": {
            run: {k: v for k, v in own.items() if k not in equal and k not in varied}
            for run, own in reversed(first.items())
        },
        "images": found[max(planned, key=lambda run: run.config.share)]["images"] | {"how": how},
        "notes": [_EQUAL] if RANDOM in first else [],
    }


def _score(run: Planned, result: Mapping[str, Any], metric: str) -> float:
    value = finite_number(result.get(metric))
    if value is None:
        raise UserError(
            f"{shown_name(run.tests)} has no {metric} that is a number: give more images to test "
            "on, or remove the file to test again"
        )
    return value
