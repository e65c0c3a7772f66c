"""Labelled items, changed as timm changes images: RandAugment, and a box to erase."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from patchmine.data.settings import SupervisedSettings
from patchmine.data.views.clips import LabelledClips, clip_sample
from patchmine.data.views.images import View
from patchmine.errors import UserError
from patchmine.types import Sample

_ERASE_TRIES = 10
_ERASED_AREA = (0.02, 1 / 3)  # share of the view
_ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
_GREY = 0.5  # what fills an image that was moved, where the settings name no mean; timm's 128
_TRANSLATED = 0.45  # most that an image moves, as a share of its shorter side


@dataclass(frozen=True)
class SupervisedView:
    """What ``crop`` makes of an image, under RandAugment, and with the box that is to be erased.

    RandAugment comes before the mirroring, which is left to the device; targets are of the whole
    view (classes, numbers), which no augmentation moves.
    """

    settings: SupervisedSettings
    crop: View
    repeats: ClassVar[int] = 1

    def __call__(self, raw: Any, generator: np.random.Generator, target: Any = None) -> Sample:
        sample = self.crop(raw, generator, target)
        policy_seed, erase_seed = _two_seeds(generator)
        if self.settings.auto_augment is not None:
            (view,) = sample.views
            view = rand_augmented(view[None], self.settings, policy_seed)[0]
            sample = replace(sample, views=[view])
        return _with_box_to_erase(sample, self.settings, erase_seed)


@dataclass(frozen=True)
class SupervisedClips:
    """The same of a clip, but for the order, VideoMAE's: whole frames are changed, then cropped.

    All frames are changed alike.
    """

    settings: SupervisedSettings
    crop: LabelledClips

    @property
    def repeats(self) -> int:
        return self.crop.repeats

    def __call__(self, raw: Any, generator: np.random.Generator, target: Any = None) -> Sample:
        frames, geometry = self.crop.drawn(raw, generator)
        policy_seed, erase_seed = _two_seeds(generator)
        if self.settings.auto_augment is not None:
            frames = rand_augmented(frames, self.settings, policy_seed)
        sample = clip_sample(frames, geometry, self.settings.interpolation, target)
        return _with_box_to_erase(sample, self.settings, erase_seed)


def _two_seeds(generator: np.random.Generator) -> tuple[int, int]:
    """For RandAugment and for erasing: drawn always, so that one does not change the other."""
    policy_seed, erase_seed = generator.integers(2**32, size=2).tolist()
    return policy_seed, erase_seed


def _with_box_to_erase(sample: Sample, settings: SupervisedSettings, seed: int) -> Sample:
    if not settings.erase_prob:
        return sample
    box = erase_box(*settings.image_size, settings.erase_prob, random.Random(seed))
    return replace(sample, erase=torch.tensor(box))


def erase_box(
    height: int, width: int, probability: float, draws: random.Random
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels, all 0 where nothing is to be erased.

    timm's RandomErasing with one box: ten tries of an area and a shape.
    """
    if draws.random() > probability:
        return 0, 0, 0, 0
    low, high = map(math.log, _ERASED_ASPECT)
    for _ in range(_ERASE_TRIES):
        area = height * width * draws.uniform(*_ERASED_AREA)
        aspect = math.exp(draws.uniform(low, high))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top = draws.randint(0, height - box_height)
            return top, draws.randint(0, width - box_width), box_height, box_width
    return 0, 0, 0, 0


def rand_augmented(images: Tensor, settings: SupervisedSettings, seed: int) -> Tensor:
    """Images (N, C, H, W) uint8 of 1 or 3 channels, all changed alike by timm's RandAugment.

    ``seed`` of 32 bits decides on the operations.  UserError for images of more than 8 bits.
    """
    assert settings.auto_augment is not None
    if images.dtype != torch.uint8:
        raise UserError(
            f"auto_augment={settings.auto_augment} changes images of 8 bits, and this data holds "
            "deeper ones: set auto_augment=null, or convert them to 8 bits"
        )
    mean = settings.mean or [_GREY] * settings.channels
    fill = tuple(min(255, round(255 * value)) for value in mean)
    transform = _transform(
        settings.auto_augment, min(settings.image_size), fill, settings.interpolation
    )
    changed = []
    with _global_states_kept():
        for image in images:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - where timm draws from
            changed.append(_as_tensor(transform(_as_picture(image))))
    return torch.stack(changed)


@cache
def _transform(
    policy: str, side: int, fill: tuple[int, ...], interpolation: str
) -> Callable[[Image.Image], Image.Image]:
    """RandAugment as timm.data.create_transform makes it."""
    from timm.data.auto_augment import rand_augment_transform

    hints = {
        "translate_const": int(side * _TRANSLATED),
        "img_mean": fill if len(fill) > 1 else fill[0],
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    made = rand_augment_transform(policy, hints)
    for operation in made.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    augmented: Callable[[Image.Image], Image.Image] = made
    return augmented


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's; magnitude 10 keeps no bit at all, which is black; Pillow 13 refuses that."""
    if bits >= 8:
        return picture
    return ImageOps.posterize(picture, bits) if bits > 0 else picture.point(lambda _: 0)


@contextmanager
def _global_states_kept() -> Iterator[None]:
    """Python's and numpy's global generators are afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _as_picture(pixels: Tensor) -> Image.Image:
    """Of (1, H, W) or (3, H, W) uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _as_tensor(picture: Image.Image) -> Tensor:
    """(C, H, W) uint8 in one piece."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
