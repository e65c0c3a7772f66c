"""Times `patchmine embed` or `predict` in turns with a bare loop over the same files and weights.

    python benchmarks/embed_against_loop.py photos/ mode=embed images=160 rounds=4

The bare loop is torchvision's ImageFolder and a DataLoader, and the export in timm under
`torch.no_grad`; ours reads, decodes and writes its table besides.  The files are the images of a
folder, as JPEGs of 256x256.  What is printed is the median over rounds of (our time) / (theirs),
by the clock and by what the processors did, which other work on the machine disturbs less.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import click
import timm
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from patchmine.backbones.classifier import Head
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import build_encoder
from patchmine.bench.measure import hardware
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.data.settings import IMAGENET_MEAN, IMAGENET_STD
from patchmine.data.sources.source import open_source
from patchmine.evaluate.embed import embed
from patchmine.evaluate.settings import EmbedSettings, PredictSettings
from patchmine.report.predictions import predict
from patchmine.strict import BatchSize, Count, Strict, Text

CLASSES = 100
SIDE = 256  # of the files


class RaceSettings(Strict):
    """What is raced."""

    data: Text = Field(description="folder of images")
    mode: Literal["embed", "predict"] = "embed"
    model: str = "vit_small_patch16_224"
    images: Count = 160
    batch_size: BatchSize = 64
    workers: int = Field(1, ge=0)
    threads: Count = 1
    rounds: Count = 4
    warmup: Count = 1


def write_files(race: RaceSettings, folder: Path) -> None:
    """As many JPEGs as are wanted, in one class."""
    source = open_source(race.data)
    paths = islice(cycle(source.path(place) for place in range(len(source))), race.images)
    folder.mkdir(parents=True)
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05}.jpg", quality=90)


def write_model(race: RaceSettings, folder: Path) -> None:
    """An export with random weights and a head, which both sides open."""
    torch.manual_seed(0)
    encoder, names = build_encoder(race.model), [str(number) for number in range(CLASSES)]
    layer = nn.Linear(encoder.num_features, CLASSES)
    nn.init.normal_(layer.weight, std=0.5)
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)
    export_encoder(encoder, folder, preprocessing, Head(layer, "mean", names))


def ours(race: RaceSettings, work: Path) -> Callable[[], object]:
    """The whole command, from opening the export to the table."""
    reading: Any = dict(batch_size=race.batch_size, workers=race.workers, device="cpu")
    data, out = str(work / "images"), str(work / f"{race.mode}.parquet")
    if race.mode == "predict":
        asked = PredictSettings(run=str(work / "model"), data=data, out=out, **reading)
        return lambda: predict(asked)
    wanted = EmbedSettings(target=str(work / "model"), data=data, out=out, **reading)
    return lambda: embed(wanted)


def theirs(race: RaceSettings, work: Path) -> Callable[[], Tensor]:
    """The class tokens, or the probabilities, of all images: (N, D) or (N, K)."""

    def loop() -> Tensor:
        network = timm.create_model(f"local-dir:{work / 'model'}", pretrained=True).eval()
        taken = network.pretrained_cfg
        size = taken["input_size"][-1]
        parts = [
            T.Resize(round(size / taken["crop_pct"]), interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize(taken["mean"], taken["std"]),
        ]
        files = ImageFolder(str(work / "images"), T.Compose(parts))
        loader = DataLoader(files, race.batch_size, num_workers=race.workers)
        with torch.no_grad():
            if race.mode == "predict":
                return torch.cat([network(images).softmax(1) for images, _ in loader])
            return torch.cat([network.forward_features(images)[:, 0] for images, _ in loader])

    return loop


def spent(way: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of processors with those of the workers, which have then ended."""
    before, start = os.times(), time.perf_counter()
    way()
    taken = time.perf_counter() - start
    return taken, sum(os.times()[:4]) - sum(before[:4])


@click.command(help=__doc__)
@click.argument("words", nargs=-1)
def main(words: tuple[str, ...]) -> None:
    """One race."""
    with ended_in_words(), tempfile.TemporaryDirectory() as temporary:
        race = read_words(
            RaceSettings, list(words), command="embed_against_loop.py", first=("data",)
        )
        torch.set_num_threads(race.threads)
        work = Path(temporary)
        write_files(race, work / "images" / "all")
        write_model(race, work / "model")
        ways = {"patchmine": ours(race, work), "a bare loop": theirs(race, work)}
        turns = [
            {name: spent(way) for name, way in ways.items()}
            for _ in range(race.warmup + race.rounds)
        ][race.warmup :]
        print(hardware(torch.device("cpu")))
        for number, clock in enumerate(("wall clock", "processor")):
            print(f"{clock}, {race.mode} of {race.images} images:")
            for name in ways:
                print(f"  {name}: {statistics.median(turn[name][number] for turn in turns):.1f} s")
            mine, bare = ([turn[name][number] for turn in turns] for name in ways)
            ratios = [a / b for a, b in zip(mine, bare, strict=True)]
            print(
                f"  patchmine / a bare loop, median of {len(ratios)} rounds: "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            )


if __name__ == "__main__":
    main()
