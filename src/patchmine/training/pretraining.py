"""Pre-training: a new run, or one that goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from patchmine.backbones.family import family_of
from patchmine.config.resolve import resolve_size
from patchmine.config.schema import PretrainConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec
from patchmine.data.workers import num_workers
from patchmine.errors import Say, silent
from patchmine.models.lora import merged
from patchmine.report.label_free import LabelFreeMonitor
from patchmine.report.monitor import Monitor, Watched
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder, build_method, write_export
from patchmine.runs.preparing import NO_SOURCES
from patchmine.task import Method
from patchmine.train.checkpoint import Checkpoint
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import Hooks
from patchmine.train.optim import render_groups
from patchmine.training.making import make_run
from patchmine.training.pace import fit_to_budget
from patchmine.training.place import Place, agree, last_files, train_task
from patchmine.types import Batch, Progress

PASS_SECONDS = 15.0  # between two lines about a pass over the whole training set


def pretrain(
    config: PretrainConfig, *, sources: Mapping[str, Spec] = NO_SOURCES, say: Say = silent
) -> RunFolder:
    """Make a run in the new folder ``config.out``.

    Args:
        config: the settings.
        sources: by ``data`` what takes its place: any torch Dataset, say.
        say: hears what happens.

    Returns:
        The run, trained and exported.

    Raises:
        UserError: mistakes in settings, data or folders.
        Interrupted: a SystemExit with the stated code, when it was asked to stop.
    """
    return make_run(config, partial(open_images, sources=sources), train_method, say)


def open_images(
    config: PretrainConfig, place: Place, sources: Mapping[str, Spec]
) -> tuple[Source, PretrainConfig]:
    """Images, and the settings that had to wait for them, alike in all processes."""
    spec = preparing.given_data("data", config.data, sources)
    images = preparing.open_data(config, spec, place.say)
    config = resolve_size(config, len(images), place.say, place.engine.device.type)
    config = preparing.with_statistics(config, images, place.say)
    config = preparing.fit_to_length(config, len(images), place.say)
    config = fit_to_budget(config, place, images, make_first)
    agree(config, place, f"{len(images):,} items with fingerprint {images.fingerprint}")
    return images, config


def make_method(config: PretrainConfig, init: str | None = None, say: Say = silent) -> Method:
    """The method that the settings describe, as the seed draws it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_method(config, start_from=init, say=say)


def make_first(config: PretrainConfig) -> Method:
    """The method as its run begins with it."""
    return make_method(config, config.init)


def train_method(
    config: PretrainConfig, place: Place, images: Source, start: Checkpoint | None
) -> RunFolder:
    """The run with these settings, trained to its end and exported."""
    method = make_method(config, config.init if start is None else None, place.say)
    if config.layer_decay is not None or config.trainable != "all":
        rates = {name: getattr(config, name) for name in ("weight_decay", "blr", "batch_size")}
        place.say(render_groups(method.scaled_groups(), **rates))

    def watch(log: Log) -> Hooks:
        plain_data = PlainData(config, images, place.engine, log.say)
        folder, engine = place.folder, place.engine
        run = Watched(config, config, config, folder, engine, images, method, log)
        monitor, label_free = Monitor(run), LabelFreeMonitor(run, view)

        def evaluate(done: Progress) -> Mapping[str, float] | None:
            label_free.look(done)
            return monitor.evaluate(done)

        return Hooks(
            on_start=label_free.begin,
            before_epoch=lambda now: method.begin_epoch(now, plain_data),
            on_epoch=evaluate,
            on_sample=monitor.draw,
        )

    view = preparing.train_view(config, method)
    bad = train_task(
        method,
        config,
        images,
        view,
        place,
        name=config.method.name,
        start=start,
        watch=watch,
        best_by="top1",
    )
    if place.engine.is_main:
        place.put_back(config)
        _export(config, place.folder, method)
        place.say(_last_words(place.folder, method, bad))
    place.engine.barrier()
    return RunFolder(place.folder)


def _export(config: PretrainConfig, folder: Path, method: Method) -> None:
    run = RunFolder(folder)
    with last_files(folder, "its export"):
        for name, encoder in method.encoders().items():
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                write_export(config, merged(method.used(encoder)), run.export_folder(name))


@dataclass(frozen=True)
class PlainData:
    """This process's share of the training set, squashed to the model's size, at each iteration."""

    config: PretrainConfig
    images: Source
    engine: Engine
    say: Say

    def __iter__(self) -> Iterator[Batch]:
        count, rank, processes = len(self.images), self.engine.rank, self.engine.world_size
        share = range(count * rank // processes, count * (rank + 1) // processes)
        item = preparing.item_of(self.config)
        loaded = plain_batches(
            self.images,
            item.plain_view(self.config, None),
            batch_size=256,
            indices=share,
            workers=num_workers(self.config.workers, self.engine.device, self.engine.local_size),
            read_timeout=self.config.read_timeout,
            bad=BadFiles(None, self.config.max_bad_share, item.noun),
        )
        done, last = 0, time.monotonic()
        for batch in map(preparing.normaliser(self.config, self.engine), loaded):
            yield batch
            done += len(batch)
            if time.monotonic() - last > PASS_SECONDS:
                last = time.monotonic()
                self.say(
                    "Looking at all training images before the epoch: "
                    f"{done:,} of this process's {len(share):,}."
                )


def _last_words(folder: Path, method: Method, bad: BadFiles) -> str:
    opened = f'patchmine.load_encoder("{folder}/export")'
    if family_of(method.encoder).timm_opens(method.encoder):
        opened = f'timm.create_model("local-dir:{folder}/export", pretrained=True)'
    broken = f" {len(bad)} broken {bad.item}s were left out, see {folder / 'bad_files.txt'}."
    return (
        f"Done: {folder}.{broken if len(bad) else ''} Next: `patchmine report {folder} "
        f"out={folder}/report.html`, or {opened}."
    )
