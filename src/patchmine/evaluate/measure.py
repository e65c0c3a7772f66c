"""What all protocols share: open target and data, read features once, score, compare with floors, file the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from patchmine.evaluate.features import Features, Reader, Reading, extract_all
from patchmine.evaluate.labelled import LabelledData, open_labelled
from patchmine.evaluate.progress import Say
from patchmine.evaluate.targets import Target, open_target, random_twin, raw_pixels
from patchmine.ops.linear import fast_linear
from patchmine.run import Run
from patchmine.settings import Size

Result = dict[str, Any]
Score = Callable[[Reader, Features, Features, int], Result]
"""(reader, train, test, number of classes) -> ``top1`` and ``top5`` in percent, and what else there is to tell."""


class ReadSettings(BaseModel):
    """What is read, with which weights, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(description="a run, an export, a timm architecture, random-init:RUN or raw-pixels")
    data: str | list[str] = Field(description="folder, list file, tar shards or embedded:photos")
    weights: str = Field(
        "student", description="of a run student, teacher, partner or partner-teacher; a file for a timm architecture"
    )
    image_size: Size | None = Field(None, description="pixels; null: the target's own")
    channels: int | None = Field(None, gt=0, description="null: the target's own")
    crop_pct: float | None = Field(
        None, gt=0, le=1, description="centre crop, share of the shorter side; null: the target's own"
    )
    batch_size: int = Field(256, gt=0, description="images that are encoded at once; changes no result")
    workers: int | Literal["auto"] = Field("auto", description="processes that decode images")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="share of broken images above which to stop")
    seed: int = Field(0, ge=0, description="decides random weights and the order of training")

    def reading(self) -> Reading:
        """The part that concerns reading images."""
        return Reading(self.batch_size, self.workers, self.device, self.max_bad_share)

    def open(self) -> Target:
        """The target, prepared as the settings say."""
        target = open_target(
            self.target, image_size=self.image_size, channels=self.channels, weights=self.weights, seed=self.seed
        )
        return target if self.crop_pct is None else replace(target, crop_pct=self.crop_pct)


class EvalSettings(ReadSettings):
    """What the protocols share."""

    test: str | list[str] | None = Field(None, description="images to test on; null: a part of data")
    floors: bool = Field(False, description="also measure a random twin of the encoder and the raw pixels")
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="of the result's file; null: the protocol's")


def measure(
    settings: EvalSettings, protocol: str, score: Score, say: Say, *, blocks: int = 1, pooling: str = "cls"
) -> Result:
    """Run a protocol on the target and, with ``floors``, on its random twin and the raw pixels.

    All of them see the same images, read in one pass.  The result is written to eval/NAME.json where the target is a
    run.
    """
    start = time.monotonic()
    target = settings.open()
    data = open_labelled(settings.data, settings.test)
    for line in filter(None, (target.note, data.how)):
        say(line)
    targets = {"": target}
    if settings.floors and target.encoder is not None:
        targets |= {"random_init": random_twin(target, settings.seed), "raw_pixels": raw_pixels(target)}
    readers = {name: Reader(each, blocks) for name, each in targets.items()}
    readers[""].choose(pooling)  # a mistake is told before images are read
    with fast_linear():
        train = extract_all(readers, data.train, settings.reading(), title="train images", say=say)
        test = extract_all(readers, data.test, settings.reading(), title="test images", say=say)
        extracted = time.monotonic()
        scores = {}
        for name, reader in readers.items():
            scores[name] = score(reader, train.pop(name), test[name], len(data.classes))
            if name:
                say(f"floor {name}: top-1 {scores[name]['top1']:.2f}")
    name = settings.name or protocol
    result = {"name": name, "protocol": protocol, **scores.pop("")}
    if scores:
        result["floors"] = scores
    result["target"] = {"name": target.name, "weights": settings.weights, "note": target.note}
    result["images"] = _images(target, data, test[""])
    result["seconds_spent"] = {"features": round(extracted - start, 1), "all": round(time.monotonic() - start, 1)}
    result["notes"] = _notes(target, data)
    if target.folder is not None:
        write_result(Run(target.folder).eval_dir / f"{name}.json", result)
    return result


def _images(target: Target, data: LabelledData, test: Features) -> Result:
    return {
        "how": data.how,
        "train": len(data.train),
        "test": len(data.test),
        "test_read": len(test),
        "classes": len(data.classes),
        "image_size": list(target.image_size),
        "crop_pct": target.crop_pct,
        "mean": list(target.mean),
        "std": list(target.std),
    }


def _notes(target: Target, data: LabelledData) -> list[str]:
    notes = [target.note] if target.note else []
    if len(data.classes) <= 5:
        notes.append(f"top-5 is 100 by definition: there are only {len(data.classes)} classes")
    return notes


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def show_result(result: Mapping[str, Any], console: Console) -> None:
    """A small table for people: the target first, then the floors."""
    table = Table(title=f"{result['protocol']}: {result['target']['name']}")
    for column in ("", "top-1", "top-5"):
        table.add_column(column, justify="right" if column else "left")
    rows = {"this target": result, **{k.replace("_", " "): v for k, v in result.get("floors", {}).items()}}
    for name, scores in rows.items():
        table.add_row(name, f"{scores['top1']:.2f}", f"{scores['top5']:.2f}")
    console.print(table)
    images = result["images"]
    console.print(
        f"{images['train']:,} training and {images['test']:,} test images, {images['classes']} classes: {images['how']}"
    )
    if "by_k" in result:
        console.print("top-1 by k: " + ", ".join(f"{k}: {scores['top1']:.2f}" for k, scores in result["by_k"].items()))
    if "chosen" in result:
        best = result["chosen"]
        console.print(
            f"chosen: {best['pooling']}, rate {best['rate']:g} ({best['held_out_top1']:.2f} on held-out images)"
        )
    for note in result["notes"]:
        console.print(note)
