"""From the settings of a run to its data, and to what becomes of one item of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from patchmine.backbones.family import family_of, is_encoder
from patchmine.backbones.settings import ModelSettings
from patchmine.config.resolve import Config, fit_batch
from patchmine.config.schema import PretrainConfig, RunConfig
from patchmine.data.items import Item
from patchmine.data.loader import data_statistics
from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec, default_cache_dir
from patchmine.data.views.images import View
from patchmine.data.views.normalise import normalise
from patchmine.errors import Say, UserError, shown_name
from patchmine.task import Method, Task
from patchmine.train.engine import Engine
from patchmine.types import Batch, Progress


def item_of(config: ModelSettings) -> Item:
    """What an item of the data is."""
    return family_of(config.model).item


NO_SOURCES: Mapping[str, Spec] = MappingProxyType({})
"""All data are named by the settings."""


def given_data(name: str, value: Any, sources: Mapping[str, Spec]) -> Any:
    """The data of a setting: those given from Python, else its ``value``.

    Raises UserError where the settings name data that only Python has, and they are not given.
    """
    if name not in sources and str(value).startswith("python:"):
        raise UserError(
            f"{name}={value}: this run was made on a dataset of Python's; give it again, as in "
            f"patchmine.resume(path, {name}=dataset)"
        )
    return sources.get(name, value)


def open_data(config: RunConfig, spec: Spec, say: Say) -> Source:
    """What the run trains on; ``say`` hears what is wrong with it and what decodes videos."""
    item = item_of(config)
    opened = item.open(spec, cache_dir=default_cache_dir(), remote_gb=config.remote_gb)
    for note in item.notes(opened):
        say(note)
    return opened


def with_statistics(config: Config, source: Source, say: Say) -> Config:
    """The settings with mean and deviation of the data, where they name none."""
    if config.mean is not None:
        return config
    mean, std = data_statistics(source, config, item_of(config).pixels)
    rounded = [[round(float(value), 4) for value in values] for values in (mean, std)]
    say(f"Normalising with the data's own mean {rounded[0]} and std {rounded[1]}.")
    return config.model_copy(update={"mean": rounded[0], "std": rounded[1]})


def fit_to_length(config: Config, num_items: int, say: Say) -> Config:
    """Fits the batch to the data, and shortens a warm-up that would outlast half of the steps."""
    item = item_of(config)
    samples = num_items * item.samples(config)
    what = f"{item.noun}s of data={shown_name(str(config.data))}"
    if samples > num_items:
        what += f" (clip.repeats={config.clip.repeats} times {num_items:,})"
    config = fit_batch(config, samples, what, say)
    if config.steps is None:
        return config
    epochs = config.steps / (samples // config.batch_size)
    if config.warmup_epochs <= epochs / 2:
        return config
    shorter = round(epochs / 10, 6)
    if "warmup_epochs" in config.model_fields_set:
        say(
            f"warmup_epochs={config.warmup_epochs:g} is shortened to {shorter:g}, a tenth of the "
            f"{config.steps} steps."
        )
    return config.model_copy(update={"warmup_epochs": shorter})


def length_of(config: RunConfig, num_items: int) -> Progress:
    """How long a run on so many items is, at its beginning."""
    steps_per_epoch = num_items * item_of(config).samples(config) // config.batch_size
    epochs = config.epochs or 0
    total = config.steps if config.steps is not None else epochs * steps_per_epoch
    return Progress(0, total, steps_per_epoch)


def train_view(config: PretrainConfig, method: Method) -> View:
    """What becomes of an item in training.  UserError for local crops that patches do not fill."""
    patches = _smallest_sides(method)
    _refuse_relative(config, method)
    size, step = config.crops.local_size, math.lcm(*patches)
    multi_crop = method.config.multi_crop
    if multi_crop and config.crops.num_local and size % step:
        near = max(step, round(size / step) * step)
        raise UserError(
            f"crops.local_size={size} is not a multiple of {step}, as the patches of the backbones "
            f"of method={config.method.name} ask for: set crops.local_size={near}"
        )
    return item_of(config).train_view(config, max(patches), multi_crop)


def _refuse_relative(config: PretrainConfig, method: Method) -> None:
    """UserError for crops of two sizes where positions are relative, to those of one size."""
    crops, encoder = config.crops, method.encoder
    if not method.config.multi_crop or not crops.num_local:
        return
    if (crops.local_size, crops.local_size) == tuple(config.image_size):
        return
    if family_of(encoder).relative_positions(encoder):
        raise UserError(
            f"method={config.method.name} compares global with local crops, and an encoder with "
            "relative positions takes images of one size: set model_args.use_rel_pos_bias=false "
            "model_args.use_abs_pos_emb=true, or choose vit_small_patch16_224"
        )


def smallest_side(task: Task) -> int:
    """Pixels of the smallest image that is of use to a task."""
    return max(_smallest_sides(task))


def _smallest_sides(task: Task) -> list[int]:
    """Of all its backbones."""
    return [family_of(part).smallest_side(part) for part in task.modules() if is_encoder(part)]


def normaliser(config: InputSettings, engine: Engine) -> Callable[[Batch], Batch]:
    """Moves batches to the device and normalises them."""
    mean, std = (torch.tensor(values, device=engine.device) for values in (config.mean, config.std))
    return partial(normalise, mean=mean, std=std, device=engine.device)
