"""From the settings of a run to its data and to what becomes of one item of it: images, or clips of
videos.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial

import torch

from patchmine.backbones.video import is_video
from patchmine.backbones.vit import Encoder, smallest_side
from patchmine.config.schema import RunConfig
from patchmine.data.decoding.decode import decode
from patchmine.data.loader import data_statistics
from patchmine.data.sources.contract import Source, notes_of
from patchmine.data.sources.source import Spec, default_cache_dir, open_source
from patchmine.data.sources.video_sources import decoder_of, open_videos
from patchmine.data.views.clips import PlainClips, TrainClips, middle_frame
from patchmine.data.views.crops import MultiCropView
from patchmine.data.views.images import PlainView, TrainView, View
from patchmine.data.views.normalise import normalise
from patchmine.errors import UserError
from patchmine.ops.schedules import LrSchedule
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.types import Batch

Say = Callable[[str], None]


def item_of(config: RunConfig) -> str:
    """What an item of the data is, for messages: "image" or "video"."""
    return "video" if is_video(config.model) else "image"


def samples_per_epoch(config: RunConfig, items: int) -> int:
    """How often a pass over ``items`` items looks at one: several clips may come of a video."""
    return items * (config.clip.repeats if is_video(config.model) else 1)


def open_data(config: RunConfig, source: Spec | None, say: Say) -> Source:
    """What the run trains on, ``source`` in the place of ``config.data`` where it is given.

    ``say`` hears what is wrong with it and what decodes videos.  Raises UserError as `open_source`
    does.
    """
    spec = config.data if source is None else source
    if not is_video(config.model):
        opened = open_source(spec, cache_dir=default_cache_dir())
    else:
        opened = open_videos(spec, cache_dir=default_cache_dir())
        decoder = decoder_of(opened)
        say(
            f"Videos are decoded by {decoder}."
            if decoder
            else "Frames are read as they are: no video to decode."
        )
    for note in notes_of(opened):
        say(note)
    return opened


def with_statistics(config: RunConfig, source: Source, say: Say) -> RunConfig:
    """The settings with mean and deviation of the data, where they name none."""
    if config.mean is not None:
        return config
    if is_video(config.model):
        look = partial(middle_frame, max_pixels=config.max_pixels)
    else:
        look = partial(decode, max_pixels=config.max_pixels)
    mean, std = data_statistics(source, config.channels, look=look)
    rounded = [[round(float(value), 4) for value in values] for values in (mean, std)]
    say(f"Normalising with the data's own mean {rounded[0]} and std {rounded[1]}.")
    return config.model_copy(update={"mean": rounded[0], "std": rounded[1]})


def train_view(config: RunConfig, method: Method) -> TrainView | MultiCropView | TrainClips:
    """What becomes of an item in training.  Raises UserError for local crops that patches do not
    fill.
    """
    # Of all backbones
    patches = [smallest_side(part) for part in method.modules() if isinstance(part, Encoder)]
    size, ratio, flip, interpolation = (
        config.image_size,
        config.crop_ratio,
        config.flip,
        config.interpolation,
    )
    bound = config.max_pixels
    if is_video(config.model):
        clip = config.clip
        window = (clip.frames, clip.stride, clip.short)
        return TrainClips(
            size, *window, tuple(clip.scales), flip, interpolation, max(patches), bound
        )
    if not method.multi_crop:
        return TrainView(size, config.crop_scale, ratio, flip, interpolation, max(patches), bound)
    crops = config.crops
    step = math.lcm(*patches)
    if crops.num_local and crops.local_size % step:
        near = max(step, round(crops.local_size / step) * step)
        raise UserError(
            f"crops.local_size={crops.local_size} is not a multiple of {step}, as the patches of the backbones of "
            f"method={config.method.name} ask for: set crops.local_size={near}"
        )
    local = (crops.num_local, crops.local_size)
    scales = (crops.global_scale, crops.local_scale)
    return MultiCropView(size, *local, *scales, ratio, flip, interpolation, max(patches), bound)


def lr_schedule(config: RunConfig) -> LrSchedule:
    """How the run's learning rates move."""
    return LrSchedule(
        kind=config.lr_schedule,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        warmup_prefix=config.warmup_prefix,
        min_lr=config.min_lr,
        milestones=tuple(config.lr_milestones),
        gamma=config.lr_gamma,
    )


def plain_view(config: RunConfig, crop_pct: float | None) -> View:
    """What becomes of an item where nothing is random; ``crop_pct=None``: all of it, squashed to
    the model's size.

    Squashed images are those that AMT's maps are made of, which its authors resize bilinearly
    (torchvision's default, main_pretrain.py).
    """
    if not is_video(config.model):
        interpolation = "bilinear" if crop_pct is None else "bicubic"
        return PlainView(config.image_size, crop_pct, interpolation, max_pixels=config.max_pixels)
    window = (config.clip.frames, config.clip.stride, config.clip.short)
    return PlainClips(config.image_size, *window, crop_pct, max_pixels=config.max_pixels)


def num_workers(config: RunConfig, engine: Engine) -> int:
    """Processes that read images for one training process."""
    if config.workers != "auto":
        return config.workers
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if engine.device.type == "cpu":
        # The cores are needed for arithmetic; one worker overlaps reading with it
        return min(1, cores - 1)
    return max(1, min(16, cores // engine.local_size))


def normaliser(config: RunConfig, engine: Engine) -> Callable[[Batch], Batch]:
    """Moves batches to the device and normalises them."""
    mean, std = (torch.tensor(values, device=engine.device) for values in (config.mean, config.std))
    return partial(normalise, mean=mean, std=std, device=engine.device)
