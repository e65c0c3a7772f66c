"""From settings to a finished run: the only place where data, method and optimizer meet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from patchmine.backbones.family import family_of
from patchmine.config.resolve import (
    changed_results,
    fit_batch,
    parse,
    resolve_size,
    results_of,
    silent,
)
from patchmine.config.schema import RunConfig, names_of_a_machine
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches, train_batches
from patchmine.data.sampling import changed_stamps, content_stamps
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec
from patchmine.data.views.images import View
from patchmine.data.workers import num_workers
from patchmine.disk import replacing, sweep
from patchmine.errors import UserError, reason_of, shown_name
from patchmine.lock import HeldLock, lock
from patchmine.report.monitor import Monitor
from patchmine.runs.preparing import (
    item_of,
    lr_schedule,
    normaliser,
    open_data,
    train_view,
    with_statistics,
)
from patchmine.runs.run import Run, build_method, new_folder, refuse_used_folder, write_export
from patchmine.task import Method
from patchmine.train.checkpoint import Checkpoint, load_newest_finite, point_last
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import refuse_stranger, train
from patchmine.train.step import TrainSettings
from patchmine.types import Batch

Say = Callable[[str], None]

PASS_SECONDS = 15.0  # between two lines about a pass over the whole training set


def pretrain(config: RunConfig, *, source: Spec | None = None, say: Say = silent) -> Run:
    """Make the run that ``config`` describes in the new folder ``config.out``; returns it, trained
    and exported.

    ``source`` takes the place of ``config.data``: any torch Dataset, say.  Raises UserError for
    mistakes in settings, data or folders, and `train.signals.Interrupted`, a SystemExit with the
    stated code, when it was asked to stop.
    """
    folder = new_folder(config)
    with _processes(config, say) as engine, _lock_of(folder, engine, say) as held:
        say = say if engine.is_main else silent
        refuse_used_folder(folder)
        images, config = _open(config, engine, source, say)
        return _train(config, folder, engine, images, None, say, held)


def resume(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    source: Spec | None = None,
    say: Say = silent,
) -> Run:
    """Go on with the run in ``path`` from its newest readable checkpoint, exactly as if it had not
    been interrupted.

    ``overrides``: ``key=value`` words for settings that do not change results (workers, device,
    ...), and ``data`` where the same images have moved.  A run that was killed before its first
    checkpoint starts again.  Raises UserError for other settings or images.
    """
    run = Run(path)
    config = parse(run.config_file, list(overrides), say)
    with _processes(config, say) as engine, _lock_of(run.path, engine, say) as held:
        return _resume(run, config, engine, source, say if engine.is_main else silent, held)


def _resume(
    run: Run,
    config: RunConfig,
    engine: Engine,
    source: Spec | None,
    say: Say,
    held: HeldLock | None,
) -> Run:
    changed = changed_results(
        results_of(run.config), results_of(config) | {"data": results_of(run.config)["data"]}
    )
    if changed:
        raise UserError(
            f"a resumed run must keep the settings that decide its weights, but {'; '.join(changed)}: "
            "leave them out, or start a new run with `patchmine pretrain` and another out"
        )
    start = load_newest_finite(run.checkpoint_dir, say) if run.checkpoints else None
    images, config = _open(config, engine, source, say)
    if start is not None:
        _refuse_other_settings(start, config)
    _agree_on_start(engine, 0 if start is None else start.step, run)
    say(
        f"{run.path}: going on from step {start.step}."
        if start
        else f"{run.path} has no checkpoint: from the start."
    )
    return _train(config, run.path, engine, images, start, say, held)


@contextmanager
def _processes(config: RunConfig, say: Say) -> Iterator[Engine]:
    """The processes of a run; what ends one of them ends all."""
    engine = Engine(config.device, config.devices, config.num_nodes, config.precision, say)
    with engine.together():
        yield engine


def _lock_of(folder: Path, engine: Engine, say: Say) -> AbstractContextManager[HeldLock | None]:
    """The lock of a run folder in the first process; the others of the run stand under it."""
    return lock(folder, say) if engine.is_main else nullcontext()


def _refuse_other_settings(start: Checkpoint, config: RunConfig) -> None:
    """Raise UserError where config.yaml was edited or the checkpoint is another run's: the weights
    would differ.
    """
    now, then = results_of(config), start.facts.get("settings")
    if not isinstance(then, dict):
        return  # earlier versions kept none
    common = [
        name for name in then if name in now and name != "data"
    ]  # data are known by their fingerprint
    if changed := changed_results(
        {name: then[name] for name in common}, {name: now[name] for name in common}
    ):
        raise UserError(
            f"{start.path} was written with other settings than config.yaml beside it has now: {'; '.join(changed)}."
            " Put these back to go on, remove that file if it is of another run, or start a new run in another out"
        )


def _agree_on_start(engine: Engine, step: int, run: Run) -> None:
    """Raise UserError where processes would go on from different steps: a stale list of files on
    another machine.
    """
    steps = engine.largest(step), -engine.largest(-step)
    if steps[0] != steps[1]:
        raise UserError(
            f"{run.checkpoint_dir} looks different from the machines of this run (steps {steps[1]} and {steps[0]}):"
            " wait until its file system has caught up, then resume again"
        )


def _open(
    config: RunConfig, engine: Engine, source: Spec | None, say: Say
) -> tuple[Source, RunConfig]:
    """Images, and the settings that had to wait for them, alike in all processes."""
    if source is None and str(config.data).startswith("python:"):
        raise UserError(
            f"data={config.data}: this run was made on a torch dataset; go on from Python, with "
            "patchmine.resume(path, data=dataset)"
        )
    images = open_data(config, source, say)
    config = resolve_size(config, len(images), say)
    config = with_statistics(config, images, say)
    config = _fit_to_length(config, len(images), say)
    settings = config.model_dump(mode="json", exclude=names_of_a_machine())
    engine.agree(
        {"data": f"{len(images):,} items with fingerprint {images.fingerprint}"} | settings
    )
    return images, config


def _fit_to_length(config: RunConfig, num_images: int, say: Say) -> RunConfig:
    """Fits the batch to the data, and shortens a warm-up that would outlast half of a run given in
    steps.
    """
    item = item_of(config)
    samples = num_images * item.samples(config)
    times = (
        f" (clip.repeats={config.clip.repeats} times {num_images:,})"
        if samples > num_images
        else ""
    )
    config = fit_batch(
        config, samples, f"{item.noun}s of data={shown_name(str(config.data))}{times}", say
    )
    if config.steps is None:
        return config
    epochs = config.steps / (samples // config.batch_size)
    if config.warmup_epochs <= epochs / 2:
        return config
    shorter = round(epochs / 10, 6)
    say(
        f"warmup_epochs={config.warmup_epochs:g} is shortened to {shorter:g}, a tenth of the {config.steps} steps."
    )
    return config.model_copy(update={"warmup_epochs": shorter})


def _write_config(config: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.yaml") as new:
        new.write_text(config.to_yaml(), encoding="utf-8")


def _put_back(config: RunConfig, folder: Path, held: HeldLock | None) -> None:
    """What somebody removed from the folder meanwhile, without which it could not be resumed."""
    if held is not None:
        held.renew()
    if not (folder / "config.yaml").exists():
        _write_config(config, folder)


def _train(
    config: RunConfig,
    folder: Path,
    engine: Engine,
    images: Source,
    start: Checkpoint | None,
    say: Say,
    held: HeldLock | None,
) -> Run:
    settings = _settings(config, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method = build_method(
            config,
            start_from=config.init if start is None else None,
            say=say if engine.is_main else silent,
        )
    method.noise.seed = config.seed
    view = train_view(config, method)
    identity = {"data": images.fingerprint}
    if start is not None:
        refuse_stranger(start, identity)  # before anything in the folder changes
    first_step = 0 if start is None else start.step
    bad = BadFiles(
        folder / "bad_files.txt" if engine.is_main else None,
        config.max_bad_share,
        item_of(config).noun,
    )
    stamps = content_stamps(images) if engine.is_main else []
    if start is not None:
        _tell_replaced(start, stamps, images, say)
    if engine.is_main:
        # Not before now: a mistake in the settings must not leave a folder that looks like a run.
        for place in (folder, folder / "checkpoints", folder / "samples"):
            sweep(place)
        if start is not None:  # a full disk may have kept it at an older one
            point_last(start.path)
        _write_config(config, folder)
        say(_summary(config, settings, images, engine))
    engine.advise(f"go on with `patchmine resume {folder}`")
    run_folder = folder if engine.is_main else None
    log = Log(
        run_folder,
        total_steps=settings.total_steps,
        first_step=first_step,
        say=say,
        tensorboard=config.tensorboard,
        wandb=config.wandb,
    )
    with log:
        plain_data = _PlainData(config, images, engine, log.say)
        monitor = Monitor(
            config,
            config,
            folder,
            engine,
            images,
            method,
            log,
            seed=config.seed,
            workers=config.workers,
        )
        train(
            method,
            _batches(config, settings, engine, images, view, first_step, bad),
            engine,
            settings,
            folder=folder / "checkpoints",
            log=log,
            start=start,
            identity=identity,
            remembered={"contents": stamps, "settings": results_of(config)},
            before_epoch=lambda now: method.begin_epoch(now, plain_data),
            on_epoch=monitor.evaluate if config.eval_every else None,
            on_sample=monitor.draw,
            before_save=lambda: _put_back(config, folder, held),
            on_stop=held.stopping if held is not None else lambda: None,
        )
    if engine.is_main:
        _put_back(config, folder, held)
        _export(config, folder, method)
        say(_last_words(folder, method.encoder, bad))
    engine.barrier()
    return Run(folder)


def _tell_replaced(start: Checkpoint, stamps: list[str], images: Source, say: Say) -> None:
    """A resume goes on with images of equal names whose contents were replaced, but not without a
    word.
    """
    changed = changed_stamps(start.facts.get("contents"), stamps)
    if changed:
        say(
            f"Beware: {changed} of the {len(stamps)} items looked at in {shown_name(images.name)} have other contents "
            f"than when {start.path} was written, under the same names; the run goes on with them."
        )


def _export(config: RunConfig, folder: Path, method: Method) -> None:
    run = Run(folder)
    try:
        for name, encoder in method.encoders().items():
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                write_export(config, encoder, run.export_folder(name))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} is trained to its end, but its export could not be written ({reason_of(error)}); make room"
            f" there, then run `patchmine resume {folder}`, which has only that left to do"
        ) from error


def _settings(config: RunConfig, images: Source) -> TrainSettings:
    samples = len(images) * item_of(config).samples(config)
    steps_per_epoch = samples // config.batch_size
    total_steps = (
        config.steps if config.steps is not None else (config.epochs or 0) * steps_per_epoch
    )
    return TrainSettings(
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.batch_size,
        # Once an epoch, but epochs of a few steps do not deserve a file each.
        checkpoint_every=config.checkpoint_every or max(steps_per_epoch, min(100, total_steps)),
        accumulate=config.accumulate,
        blr=config.blr,
        schedule=lr_schedule(config),
        weight_decay=config.weight_decay,
        betas=config.betas,
        keep_checkpoints=config.keep_checkpoints,
        log_every=config.log_every,
        sample_every=config.sample_every or max(1, total_steps // 10),
        compile=config.compile,
    )


def _batches(
    config: RunConfig,
    settings: TrainSettings,
    engine: Engine,
    images: Source,
    view: View,
    first_step: int,
    bad: BadFiles,
) -> Iterator[Batch]:
    """This process's micro-batches from ``first_step`` on, normalised and on the device."""
    loaded = train_batches(
        images,
        view,
        config,
        config,
        engine,
        seed=config.seed,
        steps=range(first_step, settings.total_steps),
        steps_per_epoch=settings.steps_per_epoch,
        bad=bad,
    )
    return map(normaliser(config, engine), loaded)


@dataclass(frozen=True)
class _PlainData:
    """This process's share of the training set without crops, as often as it is iterated.

    Each image is squashed to the model's size.
    """

    config: RunConfig
    images: Source
    engine: Engine
    say: Say

    def __iter__(self) -> Iterator[Batch]:
        count, rank, processes = len(self.images), self.engine.rank, self.engine.world_size
        share = range(count * rank // processes, count * (rank + 1) // processes)
        loaded = plain_batches(
            self.images,
            item_of(self.config).plain_view(self.config, None),
            batch_size=256,
            indices=share,
            workers=num_workers(self.config.workers, self.engine.device, self.engine.local_size),
            read_timeout=self.config.read_timeout,
            bad=BadFiles(None, self.config.max_bad_share, item_of(self.config).noun),
        )
        return self._told(map(normaliser(self.config, self.engine), loaded), len(share))

    def _told(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        """Says now and then how far a long pass is."""
        done, last = 0, time.monotonic()
        for batch in batches:
            yield batch
            done += len(batch)
            if time.monotonic() - last > PASS_SECONDS:
                last = time.monotonic()
                self.say(
                    f"Looking at all training images before the epoch: {done:,} of this process's {total:,}."
                )


def _summary(config: RunConfig, settings: TrainSettings, images: Source, engine: Engine) -> str:
    height, width = config.image_size
    epochs = settings.total_steps / settings.steps_per_epoch
    item = item_of(config)
    return (
        f"{config.method.name} on {len(images):,} {item.noun}s of {shown_name(images.name)}: {config.model} at "
        f"{item.describe(config)}{height}x{width}, "
        f"{settings.total_steps:,} steps ({epochs:g} epochs) of {config.batch_size}, lr {config.blr:g} x "
        f"{config.batch_size}/256, {engine.precision} on {engine.world_size} x {engine.device.type}"
    )


def _last_words(folder: Path, encoder: nn.Module, bad: BadFiles) -> str:
    opened = f'timm.create_model("local-dir:{folder}/export", pretrained=True)'
    if not family_of(encoder).timm_opens(encoder):
        opened = f'patchmine.load_encoder("{folder}/export")'
    broken = (
        f" {len(bad)} broken {bad.item}s were left out, see {folder / 'bad_files.txt'}."
        if len(bad)
        else ""
    )
    return f"Done: {folder}.{broken} Next: `patchmine report {folder} out={folder}/report.html`, or {opened}."
