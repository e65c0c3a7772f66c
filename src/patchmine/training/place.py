"""Where a run is made, and how any task is trained there to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import cast, get_args

from safetensors import SafetensorError

from patchmine.config.resolve import results_of
from patchmine.config.schema import RunConfig, names_of_a_machine
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import train_batches
from patchmine.data.sampling import changed_stamps, content_stamps
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import View
from patchmine.errors import Say, UserError, reason_of, shown_name, silent
from patchmine.models.onednn import Product, measured_product, usual_product
from patchmine.runs import preparing
from patchmine.runs.lock import HeldLock, lock
from patchmine.system.disk import replacing, sweep
from patchmine.task import Task
from patchmine.train.checkpoint import Checkpoint, point_again
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper, refuse_stranger
from patchmine.train.log import Log
from patchmine.train.loop import Hooks, train
from patchmine.train.settings import rows_of_part
from patchmine.training.origin import fingerprints_of_code, note_origin
from patchmine.types import Batch


@dataclass(frozen=True)
class Place:
    """Where a run is made: its folder, this process among its processes, and the folder's lock.

    ``held`` is None in all processes but the first, which stand under its lock.  ``began`` is the
    time of `perf_counter` from which a budget counts.
    """

    folder: Path
    engine: Engine
    say: Say = silent
    held: HeldLock | None = None
    began: float = field(default_factory=perf_counter)

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


@contextmanager
def open_place(
    folder: Path, config: RunConfig, say: Say, began: float | None = None
) -> Iterator[Place]:
    """The processes of a run, of which the first locks the folder; what ends one ends all."""
    began = perf_counter() if began is None else began
    engine = Engine(
        config.device, config.devices, config.num_nodes, config.precision, say, config.sharding
    )
    under: AbstractContextManager[HeldLock | None] = nullcontext()
    with engine.together():
        _agree_on_start(config, engine)
        if engine.is_main:
            under = lock(folder, say)
        with under as held:
            yield Place(folder, engine, say if engine.is_main else silent, held, began)


@contextmanager
def last_files(folder: Path, what: str) -> Iterator[None]:
    """Around what is written when a run is trained to its end: a UserError says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} is trained to its end, but {what} could not be written "
            f"({reason_of(error)}); make room there, then run `patchmine resume {folder}`, which "
            "has only that left to do"
        ) from error


def agree(config: RunConfig, place: Place, found: str) -> None:
    """Settings and data (``found`` says which) are alike in all processes, or a UserError."""
    place.engine.agree({"data": found} | _common_settings(config))


def _agree_on_start(config: RunConfig, engine: Engine) -> None:
    """Code and given settings are alike, or a UserError.

    Before anything else: processes that go different ways would wait for each other for ever.
    """
    if engine.world_size > 1:
        where = {"device": engine.device.type, "precision": engine.precision}
        engine.agree(fingerprints_of_code() | where | _common_settings(config))


def _common_settings(config: RunConfig) -> dict[str, object]:
    return config.model_dump(mode="json", exclude=names_of_a_machine())


def identity_of(task: Task, images: Source) -> dict[str, str]:
    """The fingerprints that a run on these images must find again when it is resumed."""
    identity = {"data": images.fingerprint}
    if task.uses_targets:
        identity["targets"] = str(images.target_digest)
    return identity


def train_task(
    task: Task,
    config: RunConfig,
    images: Source,
    view: View,
    place: Place,
    *,
    name: str = "A task",
    start: Checkpoint | None = None,
    watch: Callable[[Log], Hooks] = lambda log: Hooks(),
    best_by: str | None = None,
    patience: int | None = None,
) -> BadFiles:
    """Train any task to the end of the run, which stands in ``place`` then.

    Args:
        task: what is trained.
        config: complete settings, with mean and std.
        images: what is trained on; with targets where the task uses them.
        view: what becomes of one item.
        place: the run's folder and processes.
        name: of the task, for people.
        start: the checkpoint to go on from.
        watch: what else is done on the way, given the log.
        best_by: the score that chooses the best checkpoint, where the task names none.
        patience: epochs without a better score after which training ends early.

    Returns:
        The items that could not be read.

    Raises:
        UserError: data or targets are not those of ``start``, and as `train.loop.train` does.
        Interrupted: as `train.loop.train` does.
    """
    folder, engine, say = place.folder, place.engine, place.say
    task.noise.seed = config.seed
    identity = identity_of(task, images)
    # Before anything in the folder changes:
    rows_of_part(config, engine.world_size, view.repeats)
    if start is not None:
        refuse_stranger(start, identity)
    engine.product = product_of(config, engine, start)
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
        for inner in (folder, *(folder / name for name in ("checkpoints", "samples", "monitor"))):
            sweep(inner)
        if start is not None:
            point_again(start)
        place.write_config(config)
        say(_summary(name, task, config, images, engine))
        note_origin(folder, engine, len(images), 0 if start is None else start.step)
    engine.advise(f"go on with `patchmine resume {folder}`")
    first = 0 if start is None else start.step
    steps = range(first, length.total_steps)
    batches = prepared_batches(config, images, view, engine, steps, bad, task.uses_targets)
    remembered = {"contents": stamps, "settings": results_of(config), "product": engine.product}
    best_by = task.metric() or best_by
    keeper = Keeper(folder / "checkpoints", start, identity, remembered, best_by, patience)
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
        train(task, batches, engine, config, length, keeper=keeper, log=log, hooks=hooks)
    return bad


def product_of(config: RunConfig, engine: Engine, start: Checkpoint | None) -> Product:
    """How a run multiplies matrices: measured where it begins, and the same ever after."""
    if engine.device.type != "cpu" or config.compile:
        return "torch"
    exact = engine.precision == "fp32"
    if start is not None and start.step > 0:
        if (stored := start.facts.get("product")) in get_args(Product):
            return cast(Product, stored)
        return usual_product() if exact else "torch"  # earlier versions kept none
    return engine.gather(measured_product())[0] if exact else usual_product(engine.precision)


def prepared_batches(
    config: RunConfig,
    images: Source,
    view: View,
    engine: Engine,
    steps: range,
    bad: BadFiles,
    targets: bool = False,
) -> Iterator[Batch]:
    """This process's micro-batches of these steps of a run, normalised and on the device."""
    loaded = train_batches(
        images,
        view,
        config,
        config,
        engine,
        seed=config.seed,
        steps=steps,
        steps_per_epoch=preparing.length_of(config, len(images)).steps_per_epoch,
        bad=bad,
        targets=targets,
    )
    return map(preparing.normaliser(config, engine), loaded)


def _summary(name: str, task: Task, config: RunConfig, images: Source, engine: Engine) -> str:
    (height, width), item = config.image_size, preparing.item_of(config)
    length = preparing.length_of(config, len(images))
    epochs = length.total_steps / length.steps_per_epoch
    millions = sum(parameter.numel() for _, parameter in task.learning()) / 1e6
    return (
        f"{name} on {len(images):,} {item.noun}s of {shown_name(images.name)}: "
        f"{config.model} at {item.describe(config)}{height}x{width}, "
        f"{millions:,.1f} million parameters learn, "
        f"{length.total_steps:,} steps ({epochs:g} epochs) of {config.batch_size}, "
        f"lr {config.blr:g} x {config.batch_size}/256, "
        f"{engine.precision} on {engine.world_size} x {engine.device.type}"
        f"{', matrices by oneDNN' if engine.product == 'onednn' else ''}"
    )
