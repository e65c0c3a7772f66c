"""Times our way from bytes to training views in turns with torchvision's on PIL images.

    python benchmarks/data_against_torchvision.py photos/ > data.json

torchvision's chain is what most recipes use: RandomResizedCrop, flip, ToTensor, Normalize; for
several crops DINO's augmentation of the same parts.  Times are the processor's, ratios medians over
turns.
"""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as T

from patchmine.bench import data as ours
from patchmine.cli.program import ended_in_words
from patchmine.data.sources.source import open_source

BICUBIC = T.InterpolationMode.BICUBIC


def torchvision_view(image_size: int) -> Callable[[bytes], Tensor]:
    """The chain of an ImageFolder with MAE's augmentation."""
    parts = [
        T.RandomResizedCrop(image_size, ours.SCALE, interpolation=BICUBIC),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize(ours.MEAN, ours.STD),
    ]
    chain = T.Compose(parts)
    return lambda raw: chain(Image.open(io.BytesIO(raw)).convert("RGB"))


def torchvision_crops(image_size: int, local_size: int) -> Callable[[bytes], list[Tensor]]:
    """DINO's augmentation: one PIL image after the other."""

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> Any:
        def blurred(image: Any) -> Any:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

        parts = [
            T.RandomResizedCrop(size, scale, interpolation=BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.Lambda(blurred)], p=blur),
            *([T.RandomSolarize(128, p=solarize)] if solarize else []),
            T.ToTensor(),
            T.Normalize(ours.MEAN, ours.STD),
        ]
        return T.Compose(parts)

    views = [
        view(image_size, ours.GLOBAL_SCALE, 1.0),
        view(image_size, ours.GLOBAL_SCALE, 0.1, 0.2),
    ]
    views += [view(local_size, ours.LOCAL_SCALE, 0.5)] * ours.NUM_LOCAL

    def chain(raw: bytes) -> list[Tensor]:
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        return [view(image) for view in views]

    return chain


def compare(source: str | Path, *, image_size: int = 224, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds per image of all ways, and how many times as fast as torchvision ours are."""
    opened, local_size = open_source(source), round(image_size * 96 / 224)
    images = ours.encoded_images(opened)
    result: dict[str, Any] = {"image_size": image_size, "repeats": repeats}
    crops = {**ours.crop_ways(image_size, local_size)}
    crops["torchvision"] = torchvision_crops(image_size, local_size)
    views = {**ours.view_ways(image_size), "torchvision": torchvision_view(image_size)}
    with tempfile.TemporaryDirectory() as folder:
        cached = ours.cached_way(opened, images, image_size, Path(folder))
        result["views"] = _compared(ours.in_turn(views) | cached, images, repeats)
    result["crops"] = _compared(ours.in_turn(crops), images[:100], repeats, ours.CROP_TURN)
    return result


def _compared(
    ways: Mapping[str, Any], images: list[ours.Numbered], repeats: int, turn: int = ours.TURN
) -> dict[str, Any]:
    turns = ours.image_turns(ways, images, repeats, turn)
    times = {name: 1e3 * median(sum(t[name]) for t in turns) / len(images) for name in ways}
    ratios = {
        name: median(
            theirs / mine
            for each in turns
            for theirs, mine in zip(each["torchvision"], each[name], strict=True)
        )
        for name in ways
        if name != "torchvision"
    }
    return {"images": len(images), "milliseconds": times, "times_as_fast": ratios}


@click.command(help=__doc__)
@click.argument("source")
def main(source: str) -> None:
    """The comparison as JSON."""
    with ended_in_words():
        print(json.dumps(compare(source), indent=1))


if __name__ == "__main__":
    main()
