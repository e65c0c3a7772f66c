"""`patchmine bench data`: what it costs one worker to turn an encoded image into a view."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding.decode import DecodeError, decode
from patchmine.data.pixelcache import PixelCache
from patchmine.data.randomness import sample_generator
from patchmine.data.samples import Samples, collate
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import Crops, ViewSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import NUM_GLOBAL, MultiCropView, TrainView
from patchmine.data.views.normalise import normalise
from patchmine.data.workers import Desk
from patchmine.errors import Say, UserError, silent

T = TypeVar("T")
Turns = dict[str, list[float]]

# ImageNet's statistics, whose values do not matter here.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, NUM_LOCAL, GLOBAL_SCALE, LOCAL_SCALE = (0.2, 1.0), 8, (0.25, 1.0), (0.05, 0.25)
_IMAGES, _CROP_IMAGES = 512, 100
_CACHED = 10**10  # bytes, as cache_gb has it
TURN = 256
"""Images of one turn, and of a batch from the cache."""
CROP_TURN = 10
"""Images of one turn, of each of which several crops are made."""

Numbered = tuple[int, bytes]
"""Number and contents of a file."""


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
        training, ``scaled`` the same with ``decode=scaled``, ``cached`` with a ``cache`` that holds
        the images, to the finished batch, ``float`` adds to the first what is the device's (flip,
        colours, normalisation).  ``per_second`` says it in images.  ``crops`` says the same of 2
        global and 8 local crops, with crops ``per_second``.

    Raises:
        UserError: nothing in ``source`` can be decoded.
    """
    opened = open_source(source)
    images = encoded_images(opened)
    local_size = round(image_size * 96 / 224)
    few = images[:_CROP_IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        ways = in_turn(view_ways(image_size)) | cached_way(opened, images, image_size, Path(folder))
        costs = _milliseconds(ways, images, repeats)
    ways = in_turn(crop_ways(image_size, local_size))
    crop_costs = _milliseconds(ways, few, repeats, CROP_TURN)
    number = NUM_GLOBAL + NUM_LOCAL
    rates = {name: 1e3 * number / cost for name, cost in crop_costs.items()}
    say(
        f"{len(images)} images of {opened.name} to {image_size} pixels, processor time of one "
        f"thread, {repeats} repeats"
    )
    for name, cost in costs.items():
        say(f"{_LABELS[name]:44s}{cost:8.3f} ms per image, {1e3 / cost:6.0f} images per second")
    say(f"2 crops of {image_size} and {NUM_LOCAL} of {local_size} pixels of {len(few)} images")
    for name, rate in rates.items():
        say(f"{_LABELS[name]:44s}{rate:8.0f} crops per second and core")
    crops = {"images": len(few), "local_size": local_size, "milliseconds": crop_costs}
    return {
        "image_size": image_size,
        "repeats": repeats,
        "images": len(images),
        "milliseconds": costs,
        "per_second": {name: 1e3 / cost for name, cost in costs.items()},
        "crops": {**crops, "per_second": rates},
    }


_LABELS = {
    "uint8": "uint8 (rest is the device's)",
    "scaled": "uint8, decode=scaled",
    "cached": "uint8, from the cache, as a batch",
    "float": "with flip, colours, normalisation",
}


def in_turns(
    ways: Mapping[str, Callable[[T], object]],
    inputs: Sequence[T],
    repeats: int,
    turn: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Turns]:
    """Seconds of every turn of ``turn`` inputs, for each repeat and way, on one thread.

    The ways take turns, so that whatever else the machine does meets them alike.
    """

    def once(some: Sequence[T]) -> Turns:
        turns: Turns = {name: [] for name in ways}
        for start in range(0, len(some), turn):
            for name, way in ways.items():
                begin = clock()
                for each in some[start : start + turn]:
                    way(each)
                turns[name].append(clock() - begin)
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


def image_turns(
    ways: Mapping[str, Callable[[Sequence[Numbered]], object]],
    images: Sequence[Numbered],
    repeats: int,
    turn: int = TURN,
) -> list[Turns]:
    """`in_turns` of batches of images, by the processor's time, which others do not lengthen."""
    batches = [images[start : start + turn] for start in range(0, len(images), turn)]
    return in_turns(ways, batches, repeats, turn=1, clock=time.process_time)


def in_turn(
    ways: Mapping[str, Callable[[bytes], object]],
) -> dict[str, Callable[[Sequence[Numbered]], object]]:
    """The same ways for one image after the other of a batch."""

    def of_batch(way: Callable[[bytes], object]) -> Callable[[Sequence[Numbered]], object]:
        return lambda images: [way(raw) for _, raw in images]

    return {name: of_batch(way) for name, way in ways.items()}


def _milliseconds(
    ways: Mapping[str, Callable[[Sequence[Numbered]], object]],
    images: Sequence[Numbered],
    repeats: int,
    turn: int = TURN,
) -> dict[str, float]:
    turns = image_turns(ways, images, repeats, turn)
    return {name: 1e3 * median(sum(t[name]) for t in turns) / len(images) for name in ways}


def encoded_images(source: Source) -> list[Numbered]:
    """Numbers and contents of a seeded choice of files; broken ones are left out."""
    images = []
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
        images.append((index, raw))
    if not images:
        raise UserError(f"none of the images of {source.name} can be decoded; give some that can")
    return images


def view_ways(image_size: int) -> dict[str, Callable[[bytes], list[Tensor]]]:
    """From bytes to the views of a run on images."""
    exact = _ways(TrainView(_view_settings(image_size)))
    scaled = _ways(TrainView(_view_settings(image_size, decode="scaled")))
    return {"uint8": exact["uint8"], "scaled": scaled["uint8"], "float": exact["float"]}


def cached_way(
    source: Source, images: Sequence[Numbered], image_size: int, folder: Path
) -> dict[str, Callable[[Sequence[Numbered]], object]]:
    """From a cache in ``folder`` that holds ``images`` to a batch of views, as in a worker."""
    view = TrainView(_view_settings(image_size))
    cache = PixelCache(folder, _CACHED, source, view.settings.channels, view.settings.max_pixels)
    samples = Samples(source, view, Desk(0), 0, False, cache)
    samples[0, np.array([number for number, _ in images])]
    epochs = iter(range(1, 1 << 62))

    def batch(some: Sequence[Numbered]) -> object:
        return samples[next(epochs), np.array([number for number, _ in some])]

    return {"cached": batch}


def _view_settings(image_size: int, **others: Any) -> ViewSettings:
    return ViewSettings(image_size=(image_size, image_size), crop_scale=SCALE, **others)


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
