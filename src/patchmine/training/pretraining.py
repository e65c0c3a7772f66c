"""Pre-training: a new run, or one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from patchmine.backbones.family import family_of
from patchmine.config.resolve import resolve_size, row_of
from patchmine.config.schema import PretrainConfig, SizeRow
from patchmine.data.badfiles import BadFiles
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec
from patchmine.errors import Say, silent
from patchmine.report.label_free import LabelFreeMonitor
from patchmine.report.monitor import Monitor, Watched
from patchmine.runs import preparing
from patchmine.runs.folder import RunFolder, build_method
from patchmine.runs.preparing import NO_SOURCES
from patchmine.task import Method
from patchmine.train.checkpoint import Checkpoint
from patchmine.train.log import Log
from patchmine.train.loop import Hooks
from patchmine.train.optim import render_groups
from patchmine.training.budget import fit_to_budget
from patchmine.training.first_steps import FirstSteps
from patchmine.training.making import make_run
from patchmine.training.place import Place, agree, last_files, train_task
from patchmine.training.whole import PlainData, write_exports
from patchmine.types import Progress


def pretrain(
    config: PretrainConfig,
    *,
    sources: Mapping[str, Spec] = NO_SOURCES,
    say: Say = silent,
    began: float | None = None,
) -> RunFolder:
    """Make a run in the new folder ``config.out``.

    Args:
        config: the settings.
        sources: by ``data`` what takes its place: any torch Dataset, say.
        say: hears what happens.
        began: the time of `perf_counter` from which a budget counts; None: now.

    Returns:
        The run, trained and exported.

    Raises:
        UserError: mistakes in settings, data or folders.
        Interrupted: a SystemExit with the stated code, when it was asked to stop.
    """
    opened = partial(open_images, sources=sources)
    return make_run(config, opened, train_method, say, began)


def open_images(
    config: PretrainConfig, place: Place, sources: Mapping[str, Spec]
) -> tuple[Source, PretrainConfig]:
    """Images, and the settings that had to wait for them, alike in all processes."""
    images, config, row = find_images(config, place, sources)
    config = fit_to_budget(config, row, place, images, make_first)
    agree(config, place, f"{len(images):,} items with fingerprint {images.fingerprint}")
    return images, config


def find_images(
    config: PretrainConfig, place: Place, sources: Mapping[str, Spec]
) -> tuple[Source, PretrainConfig, SizeRow | None]:
    """Images, the settings complete but for a budget, and the row of ``by_size`` in them."""
    spec = preparing.given_data("data", config.data, sources)
    images = preparing.open_data(config, spec, place.say)
    on = place.engine.device.type
    row = row_of(config, len(images), on)
    config = resolve_size(config, len(images), place.say, on)
    config = preparing.with_statistics(config, images, place.say)
    return images, preparing.fit_to_length(config, len(images), place.say), row


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
        watched, labelled = len(label_free.part), monitor.labelled_images
        first_steps = FirstSteps(config, method, engine, log, watched, labelled)

        def evaluate(done: Progress) -> Mapping[str, float] | None:
            label_free.look(done)
            return monitor.evaluate(done)

        return Hooks(
            on_start=first_steps.noted("look", label_free.begin),
            on_pace=first_steps.tell,
            before_epoch=lambda now: method.begin_epoch(now, plain_data),
            on_epoch=evaluate,
            on_sample=first_steps.noted("picture", monitor.draw),
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
        with last_files(place.folder, "its export"):
            write_exports(config, method, RunFolder(place.folder).export_folder)
        place.say(_last_words(place.folder, method, bad))
    place.engine.barrier()
    return RunFolder(place.folder)


def _last_words(folder: Path, method: Method, bad: BadFiles) -> str:
    opened = f'patchmine.load_encoder("{folder}/export")'
    if family_of(method.encoder).timm_opens(method.encoder):
        opened = f'timm.create_model("local-dir:{folder}/export", pretrained=True)'
    broken = f" {len(bad)} broken {bad.item}s were left out, see {folder / 'bad_files.txt'}."
    return (
        f"Done: {folder}.{broken if len(bad) else ''} Next: `patchmine report {folder} "
        f"out={folder}/report.html`, or {opened}."
    )
