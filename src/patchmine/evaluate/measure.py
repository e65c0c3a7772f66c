"""What all protocols share: open target and data, read features once, score, compare with baselines,
file the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from patchmine.disk import refusal, replacing
from patchmine.errors import UserError
from patchmine.evaluate.features import Features, Reader, Reading, extract_all
from patchmine.evaluate.labelled import LabelledData, open_labelled
from patchmine.evaluate.progress import Say
from patchmine.evaluate.settings import ProtocolSettings, ReadSettings
from patchmine.evaluate.targets import Target, open_target, random_twin, raw_pixels
from patchmine.models.onednn import fast_linear
from patchmine.runs.run import Run

Result = dict[str, Any]
Score = Callable[[Reader, Features, Features, int], Result]
"""(reader, train, test, number of classes) -> ``top1`` and ``top5`` in percent, and what else there
is to tell.
"""


def reading_of(settings: ReadSettings) -> Reading:
    """The part of the settings that concerns reading images."""
    return Reading(settings.batch_size, settings.workers, settings.device, settings.max_bad_share)


def opened(settings: ReadSettings) -> Target:
    """The target, prepared as the settings say."""
    target = open_target(
        settings.target,
        image_size=settings.image_size,
        channels=settings.channels,
        weights=settings.weights,
        seed=settings.seed,
    )
    if settings.crop_pct is not None:
        target = replace(target, crop_pct=settings.crop_pct)
    if settings.stride is None:
        return target
    if target.clip is None:
        raise UserError(
            f"stride={settings.stride} is for clips, but {target.name} takes images: leave the setting out"
        )
    return replace(target, clip=target.clip.model_copy(update={"stride": settings.stride}))


def measure(
    settings: ProtocolSettings,
    protocol: str,
    score: Score,
    say: Say,
    *,
    blocks: int = 1,
    pooling: str = "cls",
) -> Result:
    """Run a protocol on the target and, with ``baselines``, on its random twin and the raw pixels.

    All of them see the same images, read in one pass.  The result is written to eval/NAME.json
    where the target is a run.
    """
    start = time.monotonic()
    target = opened(settings)
    readers = readers_of(settings, target, blocks)
    readers[""].choose(pooling)  # a mistake is told before images are read
    data = labelled_for(settings, target, say)
    with fast_linear():
        train = extract_all(
            readers, data.train, reading_of(settings), title=f"train {target.kind}s", say=say
        )
        test = extract_all(
            readers, data.test, reading_of(settings), title=f"test {target.kind}s", say=say
        )
        extracted = time.monotonic()
        scores = {}
        for name, reader in readers.items():
            scores[name] = score(reader, train.pop(name), test[name], len(data.classes))
            if name:
                say(f"baseline {name}: top-1 {scores[name]['top1']:.2f}")
    spent = {"features": round(extracted - start, 1), "all": round(time.monotonic() - start, 1)}
    return file_result(
        {
            "name": settings.name or protocol,
            "protocol": protocol,
            **with_baselines(scores),
            "target": {"name": target.name, "weights": settings.weights, "note": target.note},
            "images": images_of(target, data, len(test[""])),
            "seconds_spent": spent,
            "notes": notes_of(target, data),
        },
        target,
    )


def readers_of(settings: ProtocolSettings, target: Target, blocks: int) -> dict[str, Reader]:
    """The target's reader under the name "" and, with ``baselines``, those of its random twin and of
    the raw pixels.
    """
    targets = {"": target}
    if settings.baselines and target.encoder is not None:
        targets |= {
            "random_init": random_twin(target, settings.seed),
            "raw_pixels": raw_pixels(target),
        }
    return {name: Reader(each, blocks) for name, each in targets.items()}


def labelled_for(settings: ProtocolSettings, target: Target, say: Say) -> LabelledData:
    """The images, or videos, that the settings name; ``say`` hears what a reader of the numbers
    must know.
    """
    data = open_labelled(settings.data, settings.test, video=target.clip is not None)
    for line in filter(None, (target.note, data.how)):
        say(line)
    return data


def with_baselines(scores: Mapping[str, Result]) -> Result:
    """The target's own scores, which have the name "", with those of the baselines inside."""
    baselines = {name: found for name, found in scores.items() if name}
    return {**scores[""], "baselines": baselines} if baselines else dict(scores[""])


def images_of(target: Target, data: LabelledData, tested: int) -> Result:
    """What was learnt from and tested on, and how it was prepared; ``tested``: items that could be
    read.
    """
    clip = target.clip
    return {
        "how": data.how,
        "train": len(data.train),
        "test": len(data.test),
        "test_read": tested,
        "classes": len(data.classes),
        "image_size": list(target.image_size),
        "crop_pct": target.crop_pct,
        "mean": list(target.mean),
        "std": list(target.std),
        **(
            {}
            if clip is None
            else {"clip": {"frames": clip.frames, "stride": clip.stride, "short": clip.short}}
        ),
    }


def notes_of(target: Target, data: LabelledData) -> list[str]:
    """Sentences that belong to the numbers."""
    notes = [target.note] if target.note else []
    if len(data.classes) <= 5:
        notes.append(f"top-5 is 100 by definition: there are only {len(data.classes)} classes")
    return notes


def file_result(result: Result, target: Target) -> Result:
    """The same result, written to eval/NAME.json where the target is a run.

    Raises UserError where it cannot be written, with the accuracy, which took its time.
    """
    if target.folder is None:
        return result
    try:
        write_result(Run(target.folder).eval_dir / f"{result['name']}.json", result)
    except OSError as error:
        raise UserError(
            f"{refusal(error, 'cannot be written')}.  What was measured: top-1 {result['top1']:.2f}, "
            f"top-5 {result['top5']:.2f}"
        ) from error
    return result


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show_result(result: Mapping[str, Any], console: Console) -> None:
    """A small table for people: the target first, then the baselines."""
    print_line = partial(console.print, markup=False)  # names may hold brackets
    table = Table(title=Text(f"{result['protocol']}: {result['target']['name']}"))
    for column in ("", "top-1", "top-5"):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "this target": result,
        **{k.replace("_", " "): v for k, v in result.get("baselines", {}).items()},
    }
    for name, scores in rows.items():
        table.add_row(name, f"{scores['top1']:.2f}", f"{scores['top5']:.2f}")
    console.print(table)
    images = result["images"]
    kind = "videos" if "clip" in images else "images"
    print_line(
        f"{images['train']:,} training and {images['test']:,} test {kind}, {images['classes']} classes: {images['how']}"
    )
    if "one_view" in result:
        views = result["settings"]
        print_line(
            f"scores averaged over {views['segments']} x {views['crops']} clips of each video; "
            f"the middle one alone: top-1 {result['one_view']['top1']:.2f}"
        )
    if "by_k" in result:
        print_line(
            "top-1 by k: "
            + ", ".join(f"{k}: {scores['top1']:.2f}" for k, scores in result["by_k"].items())
        )
    if "chosen" in result:
        best = result["chosen"]
        print_line(
            f"chosen: {best['pooling']}, rate {best['rate']:g} ({best['held_out_top1']:.2f} on held-out images)"
        )
    for note in result["notes"]:
        print_line(note)
