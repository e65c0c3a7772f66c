"""`patchmine bench data`: what it costs one worker to turn an encoded image into a view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from patchmine.data.decoding.decode import DecodeError, decode
from patchmine.data.randomness import sample_generator
from patchmine.data.samples import collate
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import Crops, ViewSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import NUM_GLOBAL, MultiCropView, TrainView
from patchmine.data.views.normalise import normalise
from patchmine.errors import Say, UserError, silent

T = TypeVar("T")
Turns = dict[str, list[float]]

# ImageNet's statistics, whose values do not matter here.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, NUM_LOCAL, GLOBAL_SCALE, LOCAL_SCALE = (0.2, 1.0), 8, (0.25, 1.0), (0.05, 0.25)
_IMAGES, _CROP_IMAGES = 500, 100


def bench_data(
    source: str | Path, *, image_size: int = 224, repeats: int = 5, say: Say = silent
) -> dict[str, Any]:
    """Time the making of views on one thread, over up to 500 images of 3 channels.

    Args:
        source: a folder, list or shards of encoded images.
        image_size: side of a view, in pixels.
        repeats: how often all images are read.
        say: hears the result in lines.

    Returns:
        Milliseconds per image, medians over the repeats: ``uint8`` is what a worker does in
        training, ``float`` adds what is the device's (flip, colours, normalisation).  ``crops``
        says the same of 2 global and 8 local crops, with crops ``per_second``.

    Raises:
        UserError: nothing in ``source`` can be decoded.
    """
    opened = open_source(source)
    raws = encoded_images(opened)
    local_size = round(image_size * 96 / 224)
    few = raws[:_CROP_IMAGES]
    costs = _milliseconds(view_ways(image_size), raws, repeats)
    crop_costs = _milliseconds(crop_ways(image_size, local_size), few, repeats)
    number = NUM_GLOBAL + NUM_LOCAL
    rates = {name: 1e3 * number / cost for name, cost in crop_costs.items()}
    say(
        f"{len(raws)} images of {opened.name} to {image_size} pixels, one thread, {repeats} repeats"
    )
    for name, cost in costs.items():
        say(f"{_LABELS[name]:44s}{cost:8.3f} ms per image")
    say(f"2 crops of {image_size} and {NUM_LOCAL} of {local_size} pixels of {len(few)} images")
    for name, rate in rates.items():
        say(f"{_LABELS[name]:44s}{rate:8.0f} crops per second and core")
    crops = {"images": len(few), "local_size": local_size, "milliseconds": crop_costs}
    return {
        "image_size": image_size,
        "repeats": repeats,
        "images": len(raws),
        "milliseconds": costs,
        "crops": {**crops, "per_second": rates},
    }


_LABELS = {"uint8": "uint8 (rest is the device's)", "float": "with flip, colours, normalisation"}


def in_turns(
    ways: Mapping[str, Callable[[T], object]], inputs: Sequence[T], repeats: int, turn: int = 10
) -> list[Turns]:
    """Seconds of every turn of ``turn`` inputs, for each repeat and way, on one thread.

    The ways take turns, so that whatever else the machine does meets them alike.
    """

    def once(some: Sequence[T]) -> Turns:
        turns: Turns = {name: [] for name in ways}
        for start in range(0, len(some), turn):
            for name, way in ways.items():
                begin = time.perf_counter()
                for each in some[start : start + turn]:
                    way(each)
                turns[name].append(time.perf_counter() - begin)
        return turns

    with one_thread():
        once(inputs[:turn])
        return [once(inputs) for _ in range(repeats)]


@contextmanager
def one_thread() -> Any:
    """torch on one thread, as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _milliseconds(
    ways: Mapping[str, Callable[[bytes], object]], raws: list[bytes], repeats: int
) -> dict[str, float]:
    turns = in_turns(ways, raws, repeats)
    return {name: 1e3 * median(sum(t[name]) for t in turns) / len(raws) for name in ways}


def encoded_images(source: Source) -> list[bytes]:
    """The contents of a seeded choice of files; broken ones are left out."""
    raws = []
    for index in spread_indices(len(source), _IMAGES).tolist():
        try:
            raw = source.read(index)
            decode(raw, 3)
        except (OSError, DecodeError):
            continue
        if not isinstance(raw, bytes):
            raise UserError(
                f"{source.name} holds decoded images; give image files or shards, whose decoding "
                "can be timed"
            )
        raws.append(raw)
    if not raws:
        raise UserError(f"none of the images of {source.name} can be decoded; give some that can")
    return raws


def view_ways(image_size: int) -> dict[str, Callable[[bytes], list[Tensor]]]:
    """From bytes to the views of a run on images."""
    return _ways(TrainView(ViewSettings(image_size=(image_size, image_size), crop_scale=SCALE)))


def crop_ways(image_size: int, local_size: int) -> dict[str, Callable[[bytes], list[Tensor]]]:
    """The same for methods with several crops of each image."""
    scales = {"global_scale": GLOBAL_SCALE, "local_scale": LOCAL_SCALE}
    crops = Crops.model_validate({"num_local": NUM_LOCAL, "local_size": local_size, **scales})
    return _ways(MultiCropView(ViewSettings(image_size=(image_size, image_size), crops=crops)))


def _ways(view: Callable[..., Any]) -> dict[str, Callable[[bytes], list[Tensor]]]:
    numbers = iter(range(1 << 62))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def as_bytes(raw: bytes) -> list[Tensor]:
        views: list[Tensor] = view(raw, sample_generator(0, 0, next(numbers))).views
        return views

    def as_float(raw: bytes) -> list[Tensor]:
        batch = collate([view(raw, sample_generator(0, 0, next(numbers)))])
        return [pixels[0] for pixels in normalise(batch, mean, std, "cpu").views]

    return {"uint8": as_bytes, "float": as_float}
