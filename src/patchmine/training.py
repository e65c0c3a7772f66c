"""From settings to a finished run: the only place where data, a task and optimizers meet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from patchmine.backbones.family import family_of
from patchmine.config.resolve import changed_results, parse, resolve_size, results_of
from patchmine.config.schema import RunConfig, names_of_a_machine
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches, train_batches
from patchmine.data.sampling import changed_stamps, content_stamps
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec
from patchmine.data.views.images import View
from patchmine.data.workers import num_workers
from patchmine.disk import replacing, sweep
from patchmine.errors import Say, UserError, reason_of, shown_name, silent
from patchmine.report.monitor import Monitor
from patchmine.runs import preparing
from patchmine.runs.folder import (
    RunFolder,
    build_method,
    new_folder,
    refuse_used_folder,
    write_export,
)
from patchmine.runs.lock import HeldLock, lock
from patchmine.task import Method, Task
from patchmine.train.checkpoint import Checkpoint, load_newest, point
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import Hooks, Keeper, refuse_stranger, train
from patchmine.types import Batch

PASS_SECONDS = 15.0  # between two lines about a pass over the whole training set


@dataclass(frozen=True)
class Place:
    """Where a run is made: its folder, this process among its processes, and the folder's lock.

    ``held`` is None in all processes but the first, which stand under its lock.
    """

    folder: Path
    engine: Engine
    say: Say = silent
    held: HeldLock | None = None

    def write_config(self, config: RunConfig) -> None:
        """config.yaml, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "config.yaml") as new:
            new.write_text(config.to_yaml(), encoding="utf-8")

    def put_back(self, config: RunConfig) -> None:
        """What somebody removed from the folder meanwhile, and a run cannot be resumed without."""
        if self.held is not None:
            self.held.renew()
        if not (self.folder / "config.yaml").exists():
            self.write_config(config)


def pretrain(config: RunConfig, *, source: Spec | None = None, say: Say = silent) -> RunFolder:
    """Make a run in the new folder ``config.out``.

    Args:
        config: the settings.
        source: takes the place of ``config.data``: any torch Dataset, say.
        say: hears what happens.

    Returns:
        The run, trained and exported.

    Raises:
        UserError: mistakes in settings, data or folders.
        Interrupted: a SystemExit with the stated code, when it was asked to stop.
    """
    folder = new_folder(config)
    with _place(folder, config, say) as place:
        refuse_used_folder(folder)
        images, config = _open(config, place, source)
        return _pretrain(config, place, images, None)


def resume(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    source: Spec | None = None,
    say: Say = silent,
) -> RunFolder:
    """Go on with a run from its newest readable checkpoint, exactly as if it had never stopped.

    A run that was killed before its first checkpoint starts again.

    Args:
        path: the run's folder.
        overrides: ``key=value`` for settings that do not change results (workers, device, ...), and
            ``data`` where the same images have moved.
        source: as in `pretrain`.
        say: hears what happens.

    Returns:
        The run, trained and exported.

    Raises:
        UserError: other settings or images than the run's own.
        Interrupted: as in `pretrain`.
    """
    run = RunFolder(path)
    config = parse(run.config_file, list(overrides), say)
    with _place(run.path, config, say) as place:
        own, now = results_of(run.config), results_of(config)
        if changed := changed_results(own, now | {"data": own["data"]}):
            raise UserError(
                "a resumed run must keep the settings that decide its weights, but "
                f"{'; '.join(changed)}: leave them out, or start a new run with `patchmine "
                "pretrain` and another out"
            )
        start = load_newest(run.checkpoint_dir, place.say, finite=True) if run.checkpoints else None
        images, config = _open(config, place, source)
        if start is not None:
            _refuse_other_settings(start, config)
        step = 0 if start is None else start.step
        least, most = -place.engine.largest(-step), place.engine.largest(step)
        if least != most:  # a stale list of files on another machine
            raise UserError(
                f"{run.checkpoint_dir} looks different from the machines of this run (steps "
                f"{least} and {most}): wait until its file system has caught up, then resume again"
            )
        from_where = (
            f": going on from step {step}." if start else " has no checkpoint: from the start."
        )
        place.say(f"{run.path}{from_where}")
        return _pretrain(config, place, images, start)


@contextmanager
def _place(folder: Path, config: RunConfig, say: Say) -> Iterator[Place]:
    """The processes of a run, of which the first locks the folder; what ends one ends all."""
    engine = Engine(config.device, config.devices, config.num_nodes, config.precision, say)
    under: AbstractContextManager[HeldLock | None] = nullcontext()
    with engine.together():
        if engine.is_main:
            under = lock(folder, say)
        with under as held:
            yield Place(folder, engine, say if engine.is_main else silent, held)


def _refuse_other_settings(start: Checkpoint, config: RunConfig) -> None:
    """Raise UserError where config.yaml was edited or the checkpoint is another run's."""
    now, then = results_of(config), start.facts.get("settings")
    if not isinstance(then, dict):
        return  # earlier versions kept none
    # Data are known by their fingerprint.
    common = [name for name in then if name in now and name != "data"]
    old, new = ({name: values[name] for name in common} for values in (then, now))
    if changed := changed_results(old, new):
        raise UserError(
            f"{start.path} was written with other settings than config.yaml beside it has now: "
            f"{'; '.join(changed)}. Put these back to go on, remove that file if it is of another "
            "run, or start a new run in another out"
        )


def _open(config: RunConfig, place: Place, source: Spec | None) -> tuple[Source, RunConfig]:
    """Images, and the settings that had to wait for them, alike in all processes."""
    if source is None and str(config.data).startswith("python:"):
        raise UserError(
            f"data={config.data}: this run was made on a torch dataset; go on from Python, with "
            "patchmine.resume(path, data=dataset)"
        )
    images = preparing.open_data(config, source, place.say)
    config = resolve_size(config, len(images), place.say)
    config = preparing.with_statistics(config, images, place.say)
    config = preparing.fit_to_length(config, len(images), place.say)
    settings = config.model_dump(mode="json", exclude=names_of_a_machine())
    found = f"{len(images):,} items with fingerprint {images.fingerprint}"
    place.engine.agree({"data": found} | settings)
    return images, config


def _pretrain(
    config: RunConfig, place: Place, images: Source, start: Checkpoint | None
) -> RunFolder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method = build_method(
            config, start_from=config.init if start is None else None, say=place.say
        )

    def watch(log: Log) -> Hooks:
        plain_data = _PlainData(config, images, place.engine, log.say)
        monitor = Monitor(config, config, config, place.folder, place.engine, images, method, log)
        return Hooks(
            before_epoch=lambda now: method.begin_epoch(now, plain_data),
            on_epoch=monitor.evaluate,
            on_sample=monitor.draw,
        )

    view = preparing.train_view(config, method)
    bad = train_task(method, config, images, view, place, start=start, watch=watch, best_by="top1")
    if place.engine.is_main:
        place.put_back(config)
        _export(config, place.folder, method)
        place.say(_last_words(place.folder, method, bad))
    place.engine.barrier()
    return RunFolder(place.folder)


def train_task(
    task: Task,
    config: RunConfig,
    images: Source,
    view: View,
    place: Place,
    *,
    start: Checkpoint | None = None,
    watch: Callable[[Log], Hooks] = lambda log: Hooks(),
    best_by: str | None = None,
) -> BadFiles:
    """Train any task to the end of the run, which stands in ``place`` then.

    Args:
        task: what is trained.
        config: complete settings, with mean and std.
        images: what is trained on; with targets where the task uses them.
        view: what becomes of one item.
        place: the run's folder and processes.
        start: the checkpoint to go on from.
        watch: what else is done on the way, given the log.
        best_by: the score that chooses the best checkpoint, where the task names none.

    Returns:
        The items that could not be read.

    Raises:
        UserError: data or targets are not those of ``start``, and as `train.loop.train` does.
        Interrupted: as `train.loop.train` does.
    """
    folder, engine, say = place.folder, place.engine, place.say
    task.noise.seed = config.seed
    identity = {"data": images.fingerprint}
    if task.uses_targets:
        identity["targets"] = str(images.target_digest)
    if start is not None:
        refuse_stranger(start, identity)  # before anything in the folder changes
    length = preparing.length_of(config, len(images))
    noted = folder / "bad_files.txt" if engine.is_main else None
    bad = BadFiles(noted, config.max_bad_share, preparing.item_of(config).noun)
    stamps = content_stamps(images) if engine.is_main else []
    if start is not None and (changed := changed_stamps(start.facts.get("contents"), stamps)):
        say(
            f"Beware: {changed} of the {len(stamps)} items looked at in {shown_name(images.name)} "
            f"have other contents than when {start.path} was written, under the same names; the "
            "run goes on with them."
        )
    if engine.is_main:
        # Not before now: a mistake in the settings must not leave a folder that looks like a run.
        for inner in (folder, folder / "checkpoints", folder / "samples"):
            sweep(inner)
        if start is not None:  # a full disk may have kept it at an older one
            point(start.path, "last")
        place.write_config(config)
        say(_summary(config, images, engine))
    engine.advise(f"go on with `patchmine resume {folder}`")
    first = 0 if start is None else start.step
    loaded = train_batches(
        images,
        view,
        config,
        config,
        engine,
        seed=config.seed,
        steps=range(first, length.total_steps),
        steps_per_epoch=length.steps_per_epoch,
        bad=bad,
        targets=task.uses_targets,
    )
    remembered = {"contents": stamps, "settings": results_of(config)}
    keeper = Keeper(folder / "checkpoints", start, identity, remembered, task.metric() or best_by)
    log = Log(
        folder if engine.is_main else None,
        total_steps=length.total_steps,
        first_step=first,
        say=say,
        tensorboard=config.tensorboard,
        wandb=config.wandb,
    )
    with log:
        hooks = replace(
            watch(log),
            before_save=lambda: place.put_back(config),
            on_stop=place.held.stopping if place.held is not None else lambda: None,
        )
        batches = map(preparing.normaliser(config, engine), loaded)
        train(task, batches, engine, config, length, keeper=keeper, log=log, hooks=hooks)
    return bad


def _export(config: RunConfig, folder: Path, method: Method) -> None:
    run = RunFolder(folder)
    try:
        for name, encoder in method.encoders().items():
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                write_export(config, encoder, run.export_folder(name))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} is trained to its end, but its export could not be written "
            f"({reason_of(error)}); make room there, then run `patchmine resume {folder}`, which "
            "has only that left to do"
        ) from error


@dataclass(frozen=True)
class _PlainData:
    """This process's share of the training set, squashed to the model's size, at each iteration."""

    config: RunConfig
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


def _summary(config: RunConfig, images: Source, engine: Engine) -> str:
    (height, width), item = config.image_size, preparing.item_of(config)
    length = preparing.length_of(config, len(images))
    epochs = length.total_steps / length.steps_per_epoch
    return (
        f"{config.method.name} on {len(images):,} {item.noun}s of {shown_name(images.name)}: "
        f"{config.model} at {item.describe(config)}{height}x{width}, "
        f"{length.total_steps:,} steps ({epochs:g} epochs) of {config.batch_size}, "
        f"lr {config.blr:g} x {config.batch_size}/256, "
        f"{engine.precision} on {engine.world_size} x {engine.device.type}"
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
