"""How fast a run is on this machine, from a few steps of it; and its length for a given time."""

from __future__ import annotations

import io
import math
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from patchmine.config.schema import PretrainConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.sources.contract import Source
from patchmine.errors import silent
from patchmine.report.label_free import LabelFreeMonitor, epochs_between
from patchmine.report.monitor import Monitor, Watched
from patchmine.runs import preparing
from patchmine.runs.known import is_run, settings_of_run
from patchmine.strict import seconds_in
from patchmine.task import Method
from patchmine.train.checkpoint import SCRATCH, list_checkpoints
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import Keeper, num_pictures, save_every
from patchmine.train.step import Stepper
from patchmine.training.place import Place, prepared_batches
from patchmine.types import Batch, Progress

WARM_UP = 2  # steps that are not timed: they make the optimizer's state, and compile
FEWEST, MOST = 3, 500  # steps that are
FEW_STEPS = 50  # with fewer a run has hardly begun
_SHARE, _LONGEST = 0.04, 15.0  # of a budget that the steps may take, in seconds

Make = Callable[[PretrainConfig], Method]
"""The method that settings describe."""


@dataclass(frozen=True)
class Pace:
    """What the parts of a run take on this machine, in seconds.

    Args:
        step: one step, with its wait for data.
        picture: one of ``samples/``.
        checkpoint: writing one.
        look: the numbers without labels, once.
        evaluation: kNN, once.
        watched: images of a look.
        checkpoint_bytes: of one on the disk.
        export_bytes: of the encoders that are exported.
        peak_bytes: most memory until then: of this process on a CPU, of the GPU on one.
        trained: parameters that learn.
    """

    step: float
    picture: float = 0.0
    checkpoint: float = 0.0
    look: float = 0.0
    evaluation: float = 0.0
    watched: int = 0
    checkpoint_bytes: int = 0
    export_bytes: int = 0
    peak_bytes: int = 0
    trained: int = 0

    def beside(self, config: PretrainConfig, length: Progress) -> float:
        """Seconds of a run for all that is no step."""
        epochs = length.total_epochs
        between = epochs_between(config, config, self.watched, length)
        pictures = num_pictures(config, length)
        saved = _times(length.total_steps, save_every(config, length)) + 1  # and its export
        looks = 1 + _times(epochs, between)
        evaluations = _times(epochs, config.eval_every) if config.eval_every else 0
        return (
            pictures * self.picture
            + saved * self.checkpoint
            + looks * self.look
            + evaluations * self.evaluation
        )

    def seconds(self, config: PretrainConfig, length: Progress) -> float:
        """What a run of this length takes."""
        return length.total_steps * self.step + self.beside(config, length)

    def fitting(self, config: PretrainConfig, steps_per_epoch: int, seconds: float) -> int:
        """Steps of the longest run that takes no more; one at least."""
        low, high = 1, max(1, int(seconds / self.step))
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.seconds(config, Progress(0, middle, steps_per_epoch)) <= seconds
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _times(total: int, every: int) -> int:
    """How often something is due that comes at multiples and at the end."""
    return math.ceil(total / every)


def fit_to_budget(
    config: PretrainConfig, place: Place, images: Source, make: Make
) -> PretrainConfig:
    """The settings with the steps that their budget of time allows, alike in all processes.

    Args:
        config: complete settings, their length that of a run without a budget.
        place: of the run.
        images: what is trained on.
        make: builds the method; what is timed is thrown away.

    Returns:
        Settings with ``steps`` in the place of ``epochs`` and ``budget``; the warm-up keeps its
        share of the run.
    """
    if config.budget is None:
        return config
    if place.engine.largest(is_run(place.folder)):  # resume=auto: its steps are chosen
        own = settings_of_run(place.folder).model_dump(include={"steps", "epochs", "warmup_epochs"})
        return config.model_copy(update={"budget": None, **own})
    began, budget = perf_counter(), seconds_in(config.budget)
    place.say(f"budget={config.budget}: a few steps are timed first, and thrown away.")
    with scratch_in(place.folder) as scratch:
        limit = min(_LONGEST, _SHARE * budget)
        pace = measure_pace(config, place.engine, images, make, scratch, limit)
    left = max(0.0, budget - (perf_counter() - began))
    return fitted(config, place, len(images), pace, left)


def fitted(
    config: PretrainConfig, place: Place, images: int, pace: Pace, seconds: float
) -> PretrainConfig:
    """The settings with the steps that fit into the seconds that are left of their budget."""
    planned = preparing.length_of(config, images)
    own_steps = pace.fitting(config, planned.steps_per_epoch, seconds)
    steps = place.engine.largest(own_steps if place.engine.is_main else 0)
    length = Progress(0, steps, planned.steps_per_epoch)
    epochs = steps / length.steps_per_epoch
    place.say(
        f"budget={config.budget}: {steps:,} steps ({epochs:.3g} epochs) at {pace.step:.3g} s a "
        f"step; pictures, checkpoints and monitors take {pace.beside(config, length):.0f} s of it."
    )
    if steps < FEW_STEPS:
        place.say(
            f"warning: in {steps:,} steps next to nothing is learned: give a longer budget, or a "
            "smaller batch_size, image_size or model"
        )
    warmup = config.warmup_epochs * steps / max(1, planned.total_steps)
    chosen = {"budget": None, "steps": steps, "epochs": None, "warmup_epochs": round(warmup, 6)}
    return config.model_copy(update=chosen)


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder in the run's for what is timed, gone afterwards; a run that begins sweeps it."""
    scratch = folder / f"{SCRATCH}.{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def measure_pace(
    config: PretrainConfig, engine: Engine, images: Source, make: Make, scratch: Path, limit: float
) -> Pace:
    """Time steps in the middle of the run, and once each what is done beside them.

    Everything is the run's own: images, loader, method, pictures, checkpoints, monitors.  Neither
    weights nor random numbers of the run change.

    Args:
        config: complete settings.
        engine: the processes that take part.
        images: what is trained on.
        make: builds the method.
        scratch: a folder for pictures and a checkpoint.
        limit: seconds of steps, at least three of them.
    """
    gpus = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        return _measure(config, engine, images, make(config), scratch, limit)


def _measure(
    config: PretrainConfig,
    engine: Engine,
    images: Source,
    method: Method,
    scratch: Path,
    limit: float,
) -> Pace:
    length = preparing.length_of(config, len(images))
    # Where a schedule has begun to ask for work that the first steps lack
    now = length.at(length.total_steps // 2)
    method.noise.seed = config.seed
    view, item = preparing.train_view(config, method), preparing.item_of(config)
    stepper = Stepper(method, engine, config)
    steps = range(now.step, now.step + WARM_UP + MOST)
    bad = BadFiles(None, config.max_bad_share, item.noun)
    batches = prepared_batches(config, images, view, engine, steps, bad)
    method.train()

    _timed_steps(stepper, batches, now, WARM_UP, WARM_UP)
    step = _timed_steps(stepper, batches, now, FEWEST, MOST, limit)
    del batches  # which ends their workers
    log = Log(
        scratch if engine.is_main else None,
        total_steps=length.total_steps,
        say=silent,
        tensorboard=False,
        console=Console(file=io.StringIO()),
    )
    with log:
        run = Watched(config, config, config, scratch, engine, images, method, log)
        monitor, watching = Monitor(run), LabelFreeMonitor(run, view)
        look = _seconds(lambda: watching.begin(length.at(0)))
        if not engine.largest(int(look > limit)):  # else what is loaded once hardly counts
            look = _seconds(lambda: watching.begin(length.at(0)))
        picture = checkpoint = 0.0
        if engine.is_main:
            monitor.draw(now)  # what the first one loads is not paid again
            picture = _seconds(lambda: monitor.draw(now))
            method.train()
            keeper = Keeper(scratch / "checkpoints")
            with engine.undisturbed():
                checkpoint = _seconds(lambda: keeper.save(stepper, now))
    engine.barrier()
    files = list_checkpoints(scratch / "checkpoints")
    watched = len(watching.part)
    return Pace(
        step=step,
        picture=picture,
        checkpoint=checkpoint,
        look=look,
        evaluation=look / max(1, watched) * monitor.labelled_images,
        watched=watched,
        checkpoint_bytes=sum(file.stat().st_size for file in files),
        export_bytes=_exported(method),
        peak_bytes=_peak(engine),
        trained=sum(parameter.numel() for _, parameter in method.learning()),
    )


def _exported(method: Method) -> int:
    """Bytes of the encoders that learn."""
    parameters = [list(encoder.parameters()) for encoder in method.encoders().values()]
    learned = [each for each in parameters if any(weight.requires_grad for weight in each)]
    return sum(weight.nbytes for each in learned for weight in each)


def _peak(engine: Engine) -> int:
    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(engine.device))
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _timed_steps(
    stepper: Stepper,
    batches: Iterator[Batch],
    now: Progress,
    fewest: int,
    most: int,
    limit: float = math.inf,
) -> float:
    """Seconds of a step: of so many, or fewer once the limit is reached."""
    engine = stepper.engine
    _synchronise(engine)
    began = perf_counter()
    for done in range(1, most + 1):
        stepper.make(now, batches)
        _synchronise(engine)
        passed = perf_counter() - began
        # Alike in all processes, which wait for each other's gradients
        if done >= fewest and engine.largest(int(passed >= limit)):
            break
    return passed / done


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _synchronise(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
