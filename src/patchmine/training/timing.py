"""How fast a run is on this machine: a few of its steps, and once each what is done beside them."""

from __future__ import annotations

import io
import math
import re
import resource
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from patchmine.config.schema import PretrainConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.sources.contract import Source
from patchmine.errors import silent
from patchmine.report.label_free import LabelFreeMonitor
from patchmine.report.monitor import Monitor, Watched
from patchmine.runs import preparing
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.step import Stepper
from patchmine.training.pace import Pace, evaluation_like
from patchmine.training.place import prepared_batches, product_of
from patchmine.training.whole import PLAIN_BATCH, PlainData, write_exports
from patchmine.types import Progress

WARM_UP = 2  # steps that are not timed: they make the optimizer's state, and compile
FEWEST, MOST = 3, 500  # steps that are
_LONG = 10_000  # epochs of a run in which every method does all that it ever does
_PRIVATE = re.compile(r"^Private_(?:Clean|Dirty): *([0-9]+) kB", re.MULTILINE)

Make = Callable[[PretrainConfig], Method]
"""The method that settings describe."""


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
    with _own_randomness(engine):
        return _measure(config, engine, images, make, scratch, limit)


def measure_step(config: PretrainConfig, engine: Engine, images: Source, make: Make) -> float:
    """Seconds of a step, roughly, from the second one; the longest of all processes."""
    with _own_randomness(engine):
        seconds = _Timed(config, engine, images, make, warm_up=1).step(1)
    return engine.largest(math.ceil(seconds * 1e6)) / 1e6


def _own_randomness(engine: Engine) -> AbstractContextManager[None]:
    gpus = [engine.device] if engine.device.type == "cuda" else []
    return torch.random.fork_rng(devices=gpus)


class _Timed:
    """A run's method, some steps of which are made in the middle of the run."""

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        images: Source,
        make: Make,
        warm_up: int = WARM_UP,
    ) -> None:
        began = perf_counter()
        self.method = make(config)
        self.length = preparing.length_of(config, len(images))
        # Where a schedule has begun to ask for work that the first steps lack
        self.now = self.length.at(self.length.total_steps // 2)
        self.method.noise.seed = config.seed
        self.view = preparing.train_view(config, self.method)
        engine.product = product_of(config, engine, None)
        self.stepper = Stepper(self.method, engine, config)
        steps = range(self.now.step, self.now.step + WARM_UP + MOST)
        bad = BadFiles(None, config.max_bad_share, preparing.item_of(config).noun)
        self._batches = prepared_batches(config, images, self.view, engine, steps, bad)
        self.method.train()
        self.step(warm_up)
        self.started = perf_counter() - began

    def step(self, fewest: int, limit: float = 0.0) -> float:
        """Seconds of a step: of so many, or of as many as take so many seconds."""
        engine = self.stepper.engine
        _synchronise(engine)
        began = perf_counter()
        for done in range(1, MOST + 1):
            self.stepper.make(self.now, self._batches)
            _synchronise(engine)
            passed = perf_counter() - began
            # Alike in all processes, which wait for each other's gradients
            if done >= fewest and engine.largest(int(passed >= limit)):
                break
        return passed / done


def _measure(
    config: PretrainConfig, engine: Engine, images: Source, make: Make, scratch: Path, limit: float
) -> Pace:
    timed = _Timed(config, engine, images, make)
    step, workers = timed.step(FEWEST, limit), worker_bytes()
    method, stepper, now = timed.method, timed.stepper, timed.now
    started, view, start = max(0.0, timed.started - WARM_UP * step), timed.view, timed.length.at(0)
    del timed  # which ends its workers
    log = Log(
        scratch if engine.is_main else None,
        total_steps=now.total_steps,
        say=silent,
        tensorboard=config.tensorboard,
        console=Console(file=io.StringIO()),
    )
    with log, stepper.whole():
        whole = _seconds_of_whole(config, engine, images, method)
        run = Watched(config, config, config, scratch, engine, images, method, log)
        monitor, watching = Monitor(run), LabelFreeMonitor(run, view)
        look = _seconds(lambda: watching.begin(start))
        if not engine.largest(int(look > limit)):  # else what is loaded once hardly counts
            look = _seconds(lambda: watching.begin(start))
        picture = export = 0.0
        if engine.is_main:
            monitor.draw(now)  # what the first one loads is not paid again
            picture = _seconds(lambda: monitor.draw(now))
            method.train()
            with engine.undisturbed():
                exports = scratch / "exports"
                export = _seconds(lambda: write_exports(config, method, exports.joinpath))
        # Where it is in parts, all of them go into the first process's folder.
        keeper = Keeper(engine.gather(scratch)[0] / "checkpoints")
        begun = perf_counter()
        keeper.save(stepper, now)
        keeper.wait()
        checkpoint = perf_counter() - begun
    engine.barrier()
    watched = len(watching.part)
    return Pace(
        step=step,
        picture=picture,
        checkpoint=checkpoint,
        export=export,
        look=look,
        evaluation=evaluation_like(look, watched, monitor.labelled_images),
        start=started,
        whole=whole,
        whole_epochs=method.whole_epochs,
        watched=watched,
        checkpoint_bytes=_bytes_of((scratch / "checkpoints").rglob("*.safetensors")),
        export_bytes=_bytes_of((scratch / "exports").glob("*/*")),
        peak_bytes=peak_bytes(engine),
        worker_bytes=workers,
        trained=sum(parameter.numel() for _, parameter in method.learning()),
    )


def _seconds_of_whole(
    config: PretrainConfig, engine: Engine, images: Source, method: Method
) -> float:
    """What a method's look at all training images takes, from one batch of them."""
    steps_per_epoch = preparing.length_of(config, len(images)).steps_per_epoch
    long = Progress(0, _LONG * steps_per_epoch, steps_per_epoch)
    epochs = method.whole_epochs(long)
    if not epochs:
        return 0.0
    data = PlainData(config, images, engine, silent)
    few = list(islice(data, 1))
    seconds = _seconds(lambda: method.begin_epoch(long.at(min(epochs) * steps_per_epoch), few))
    return seconds * max(1.0, len(images) / engine.world_size / PLAIN_BATCH)


def _bytes_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def peak_bytes(engine: Engine) -> int:
    """Most memory until now: of this process on a CPU, of the GPU on one."""
    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(engine.device))
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def worker_bytes() -> int:
    """Memory of this process's children that is not shared; 0 where the system does not tell."""
    found = 0
    for child in active_children():
        with suppress(OSError):
            text = Path(f"/proc/{child.pid}/smaps_rollup").read_text(encoding="ascii")
            found += sum(int(number) for number in _PRIVATE.findall(text)) * 1024
    return found


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _synchronise(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
