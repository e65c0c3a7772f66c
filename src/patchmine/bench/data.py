"""`patchmine bench data`: what it costs one worker to turn an encoded image into a training view.

Against the chain that most recipes use: torchvision's ImageFolder with PIL, RandomResizedCrop, flip, ToTensor and
Normalize.  All chains get the same bytes and take turns, a few images at a time, so that whatever else the machine does
meets them alike.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchmine.data.contract import Source
from patchmine.data.decode import DecodeError, decode
from patchmine.data.loader import normalise, sample_generator
from patchmine.data.source import open_source
from patchmine.data.views import TrainView
from patchmine.errors import UserError
from patchmine.types import Batch

# torchvision's and everybody's ImageNet statistics; their values do not matter here.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALE = (0.2, 1.0)
_IMAGES = 500
_TURN = 10  # images that one chain reads before the next has its turn
_Chain = Callable[[bytes], Tensor]


def bench_data(
    source: str | Path, *, image_size: int = 224, repeats: int = 5, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Times three chains on one thread over up to 500 images of ``source`` (3 channels), ``repeats`` times.

    Milliseconds per image are medians over the repeats; ratios (how many times as fast as torchvision) are medians over
    turns that follow each other.  ``ours``: bytes to a uint8 view, flip and normalisation left to the device, as in
    training.  ``ours_float``: the same with flip, float and normalisation done by the worker.  UserError when
    ``source`` has no encoded images.
    """
    opened = open_source(source)
    raws = _encoded(opened)
    chains = {
        "ours": _ours(image_size),
        "ours_float": _ours_float(image_size),
        "torchvision": _torchvision(image_size),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        _race(chains, raws[:_TURN])
        turns = [_race(chains, raws) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    milliseconds = {name: 1e3 * median(sum(turn[name]) for turn in turns) / len(raws) for name in chains}
    result = {
        "images": len(raws),
        "image_size": image_size,
        "repeats": repeats,
        "milliseconds": milliseconds,
        "ratio": _ratio(turns, "ours"),
        "ratio_float": _ratio(turns, "ours_float"),
    }
    _tell(result, opened.name, say)
    return result


def _encoded(source: Source) -> list[bytes]:
    """The contents of evenly spaced files; broken ones are left out."""
    raws = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(_IMAGES, len(source))).astype(int)).tolist():
        try:
            raw = source.read(index)
            decode(raw, 3)
        except (OSError, DecodeError):
            continue
        if not isinstance(raw, bytes):
            raise UserError(
                f"{source.name} holds decoded images; give image files or shards, whose decoding can be timed"
            )
        raws.append(raw)
    if not raws:
        raise UserError(f"none of the images of {source.name} can be decoded; give some that can")
    return raws


def _race(chains: dict[str, _Chain], raws: list[bytes]) -> dict[str, list[float]]:
    """Seconds of every turn of every chain."""
    turns: dict[str, list[float]] = {name: [] for name in chains}
    for start in range(0, len(raws), _TURN):
        for name, chain in chains.items():
            begin = time.perf_counter()
            for raw in raws[start : start + _TURN]:
                chain(raw)
            turns[name].append(time.perf_counter() - begin)
    return turns


def _ratio(turns: list[dict[str, list[float]]], name: str) -> float:
    """How many times faster than torchvision: the median over all turns."""
    return median(theirs / ours for turn in turns for theirs, ours in zip(turn["torchvision"], turn[name], strict=True))


def _ours(image_size: int) -> _Chain:
    view, numbers = TrainView((image_size, image_size), scale=_SCALE), iter(range(1 << 62))
    return lambda raw: view(raw, 3, sample_generator(0, 0, next(numbers)))[0]


def _ours_float(image_size: int) -> _Chain:
    view, numbers = TrainView((image_size, image_size), scale=_SCALE), iter(range(1 << 62))
    mean, std = torch.tensor(_MEAN), torch.tensor(_STD)

    def chain(raw: bytes) -> Tensor:
        pixels, box, flip = view(raw, 3, sample_generator(0, 0, next(numbers)))
        batch = Batch([pixels[None]], torch.zeros(1, dtype=torch.int64), box[None], torch.tensor([flip]))
        return normalise(batch, mean, std, "cpu").views[0][0]

    return chain


def _torchvision(image_size: int) -> _Chain:
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, _SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
    return lambda raw: transform(Image.open(io.BytesIO(raw)).convert("RGB"))


def _tell(result: dict[str, Any], name: str, say: Callable[[str], None]) -> None:
    times = result["milliseconds"]
    say(
        f"{result['images']} images of {name} to {result['image_size']} pixels, one thread, {result['repeats']} repeats"
    )
    rows = [
        ("torchvision, PIL to normalised float", times["torchvision"], ""),
        ("patchmine, uint8 (rest is the device's)", times["ours"], f", {result['ratio']:.2f} times as fast"),
        ("patchmine, normalised float", times["ours_float"], f", {result['ratio_float']:.2f} times as fast"),
    ]
    for chain, time_per_image, comparison in rows:
        say(f"{chain:42s}{time_per_image:8.3f} ms per image{comparison}")
    say("uint8: mirroring, float and normalisation happen on the device in training; the last line includes them")
