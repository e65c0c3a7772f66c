"""`patchmine bench data`: what it costs one worker to turn an encoded image into a training view,
or into ten crops.

Against the chains that most recipes use: torchvision's ImageFolder with PIL, RandomResizedCrop,
flip, ToTensor and Normalize; and for several crops DINO's augmentation of the same parts.  All
chains get the same bytes and take turns, a few images at a time, so that whatever else the machine
does meets them alike.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from patchmine.data.decoding.decode import DecodeError, decode
from patchmine.data.loader import collate, sample_generator
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import Crops, ViewSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import NUM_GLOBAL, MultiCropView, TrainView
from patchmine.data.views.normalise import normalise
from patchmine.errors import UserError

# torchvision's and everybody's ImageNet statistics; their values do not matter here.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALE = (0.2, 1.0)
_IMAGES = 500
_TURN = 10  # images that one chain reads before the next has its turn
_CROP_IMAGES = 100
_LOCAL, _GLOBAL_SCALE, _LOCAL_SCALE = 8, (0.25, 1.0), (0.05, 0.25)
_Chain = Callable[[bytes], Tensor]
_Crops = Callable[[bytes], list[Tensor]]


def bench_data(
    source: str | Path,
    *,
    image_size: int = 224,
    repeats: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times three chains on one thread over up to 500 images of ``source`` (3 channels),
    ``repeats`` times.

    Milliseconds per image are medians over the repeats; ratios (how many times as fast as
    torchvision) are medians over turns that follow each other.  ``ours``: bytes to a uint8 view,
    flip and normalisation left to the device, as in training.  ``ours_float``: the same with flip,
    float and normalisation done by the worker.  ``crops``: the same of 2 global and 8 local crops
    of up to 100 images, where the device's part includes all changes of colour, and ``per_second``
    counts crops.  UserError when ``source`` has no encoded images.
    """
    opened = open_source(source)
    raws = _encoded(opened)
    chains = {
        "ours": _ours(image_size),
        "ours_float": _ours_float(image_size),
        "torchvision": _torchvision(image_size),
    }
    local_size = round(image_size * 96 / 224)
    crops = {
        "ours": _our_crops(image_size, local_size),
        "ours_float": _our_crops_float(image_size, local_size),
        "torchvision": _torchvision_crops(image_size, local_size),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        result: dict[str, Any] = {
            "image_size": image_size,
            "repeats": repeats,
            **_time(chains, raws, repeats),
        }
        result["crops"] = {"local_size": local_size, **_time(crops, raws[:_CROP_IMAGES], repeats)}
    finally:
        torch.set_num_threads(threads)
    number, times = NUM_GLOBAL + _LOCAL, result["crops"]["milliseconds"]
    result["crops"]["per_second"] = {
        name: 1e3 * number / time_per_image for name, time_per_image in times.items()
    }
    _tell(result, opened.name, say)
    return result


def _time(
    chains: Mapping[str, Callable[[bytes], object]], raws: list[bytes], repeats: int
) -> dict[str, Any]:
    _race(chains, raws[:_TURN])
    turns = [_race(chains, raws) for _ in range(repeats)]
    return {
        "images": len(raws),
        "milliseconds": {
            name: 1e3 * median(sum(turn[name]) for turn in turns) / len(raws) for name in chains
        },
        "ratio": _ratio(turns, "ours"),
        "ratio_float": _ratio(turns, "ours_float"),
    }


def _encoded(source: Source) -> list[bytes]:
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
                f"{source.name} holds decoded images; give image files or shards, whose decoding can be timed"
            )
        raws.append(raw)
    if not raws:
        raise UserError(f"none of the images of {source.name} can be decoded; give some that can")
    return raws


def _race(
    chains: Mapping[str, Callable[[bytes], object]], raws: list[bytes]
) -> dict[str, list[float]]:
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
    return median(
        theirs / ours
        for turn in turns
        for theirs, ours in zip(turn["torchvision"], turn[name], strict=True)
    )


def _ours(image_size: int) -> _Chain:
    view, numbers = _train_view(image_size), iter(range(1 << 62))
    return lambda raw: view(raw, sample_generator(0, 0, next(numbers))).views[0]


def _ours_float(image_size: int) -> _Chain:
    view, numbers = _train_view(image_size), iter(range(1 << 62))
    mean, std = torch.tensor(_MEAN), torch.tensor(_STD)

    def chain(raw: bytes) -> Tensor:
        batch = collate([view(raw, sample_generator(0, 0, next(numbers)))])
        return normalise(batch, mean, std, "cpu").views[0][0]

    return chain


def _torchvision(image_size: int) -> _Chain:
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                image_size, _SCALE, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
    return lambda raw: transform(Image.open(io.BytesIO(raw)).convert("RGB"))


def _our_crops(image_size: int, local_size: int) -> _Crops:
    view, numbers = _multi_crop_view(image_size, local_size), iter(range(1 << 62))
    return lambda raw: view(raw, sample_generator(0, 0, next(numbers))).views


def _our_crops_float(image_size: int, local_size: int) -> _Crops:
    view, numbers = _multi_crop_view(image_size, local_size), iter(range(1 << 62))
    mean, std = torch.tensor(_MEAN), torch.tensor(_STD)

    def chain(raw: bytes) -> list[Tensor]:
        batch = collate([view(raw, sample_generator(0, 0, next(numbers)))])
        return [pixels[0] for pixels in normalise(batch, mean, std, "cpu").views]

    return chain


def _multi_crop_view(image_size: int, local_size: int) -> MultiCropView:
    crops = Crops(
        num_local=_LOCAL,
        local_size=local_size,
        global_scale=_GLOBAL_SCALE,
        local_scale=_LOCAL_SCALE,
    )
    return MultiCropView(ViewSettings(image_size=(image_size, image_size), crops=crops))


def _train_view(image_size: int) -> TrainView:
    return TrainView(ViewSettings(image_size=(image_size, image_size), crop_scale=_SCALE))


def _torchvision_crops(image_size: int, local_size: int) -> _Crops:
    """DINO's augmentation as it is used everywhere: one PIL image after the other through
    torchvision's transforms.
    """
    from torchvision import transforms as T

    def view(
        size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0
    ) -> Callable[[Any], Tensor]:
        def blurred(image: Any) -> Any:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

        parts = [
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.Lambda(blurred)], p=blur),
            *([T.RandomSolarize(128, p=solarize)] if solarize else []),
            T.ToTensor(),
            T.Normalize(_MEAN, _STD),
        ]
        return T.Compose(parts)

    views = [view(image_size, _GLOBAL_SCALE, 1.0), view(image_size, _GLOBAL_SCALE, 0.1, 0.2)]
    views += [view(local_size, _LOCAL_SCALE, 0.5)] * _LOCAL

    def chain(raw: bytes) -> list[Tensor]:
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        return [view(image) for view in views]

    return chain


def _tell(result: dict[str, Any], name: str, say: Callable[[str], None]) -> None:
    times = result["milliseconds"]
    say(
        f"{result['images']} images of {name} to {result['image_size']} pixels, one thread, {result['repeats']} repeats"
    )
    rows = [
        ("torchvision, PIL to normalised float", times["torchvision"], ""),
        (
            "patchmine, uint8 (rest is the device's)",
            times["ours"],
            f", {result['ratio']:.2f} times as fast",
        ),
        (
            "patchmine, normalised float",
            times["ours_float"],
            f", {result['ratio_float']:.2f} times as fast",
        ),
    ]
    for chain, time_per_image, comparison in rows:
        say(f"{chain:42s}{time_per_image:8.3f} ms per image{comparison}")
    crops = result["crops"]
    say(
        f"2 crops of {result['image_size']} and {_LOCAL} of {crops['local_size']} pixels of {crops['images']} images"
    )
    speed = crops["per_second"]
    rows = [
        ("torchvision, DINO's chain with PIL", speed["torchvision"], ""),
        (
            "patchmine, uint8 (rest is the device's)",
            speed["ours"],
            f", {crops['ratio']:.2f} times as fast",
        ),
        (
            "patchmine, with the device's part",
            speed["ours_float"],
            f", {crops['ratio_float']:.2f} times as fast",
        ),
    ]
    for chain, per_second, comparison in rows:
        say(f"{chain:42s}{per_second:8.0f} crops per second and core{comparison}")
    say(
        "uint8: mirroring, colours, float and normalisation happen on the device in training; last lines include them"
    )
