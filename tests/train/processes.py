"""Trains the toy in two processes; run by test_train_processes.py as `processes.py FOLDER`, also
under torchrun.

Each rank leaves its weights of four runs: plain, accumulating, with bad losses on rank 1, and
stopped by way of rank 1.  Before the last one, the steps of a fifth in which processes spoke with
each other beside exchanging gradients.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from toy import Toy, toy_batches

from patchmine.train import signals
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.loop import Hooks, train
from patchmine.train.settings import TrainSettings
from patchmine.types import Batch, Progress

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter",
    "barrier",
)


def run(
    engine: Engine, folder: Path, method: Toy, batches: Iterator[Batch], accumulate: int = 1
) -> None:
    settings = TrainSettings(
        batch_size=8,
        checkpoint_every=5,
        log_every=4,
        blr=0.5,
        warmup_epochs=1.0,
        accumulate=accumulate,
    )
    say = lambda text: print(text, flush=True)  # noqa: E731, T201
    with Log(folder if engine.is_main else None, total_steps=12, say=say, tensorboard=False) as log:
        train(
            method,
            batches,
            engine,
            settings,
            Progress(0, 12, 5),
            keeper=Keeper(folder / "checkpoints"),
            log=log,
            hooks=Hooks(before_epoch=method.begin_epoch),
        )
    save_file(method.state_dict(), folder / f"rank{engine.rank}.safetensors")


def batches(engine: Engine, accumulate: int = 1) -> Iterator[Batch]:
    return toy_batches(
        0, 12, 8, rank=engine.rank, world_size=engine.world_size, accumulate=accumulate
    )


def count_talks(engine: Engine, folder: Path) -> None:
    """Train, and write after how many batches each collective but DDP's own was begun."""
    drawn, talks = 0, list[int]()

    def counted() -> Iterator[Batch]:
        nonlocal drawn
        for batch in toy_batches(0, 40, 8, rank=engine.rank, world_size=engine.world_size):
            drawn += 1
            yield batch

    def noting(collective: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            talks.append(drawn)
            return collective(*args, **kwargs)

        return noted

    kept = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
    for name, collective in kept.items():
        setattr(torch.distributed, name, noting(collective))
    signals.ASKING_SECONDS = 3600.0
    settings = TrainSettings(batch_size=8, log_every=100, warmup_epochs=1.0)
    with Log(None, total_steps=40, say=print, tensorboard=False) as log:
        keeper = Keeper(folder / "checkpoints")
        train(Toy(), counted(), engine, settings, Progress(0, 40, 40), keeper=keeper, log=log)
    for name, collective in kept.items():
        setattr(torch.distributed, name, collective)
    if engine.is_main:
        (folder / "talks.json").write_text(json.dumps(talks))


def signalled(engine: Engine) -> Iterator[Batch]:
    for step, batch in enumerate(batches(engine)):
        if step == 6 and engine.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def main(folder: Path) -> None:
    engine = Engine(device="cpu", devices=2)
    for name in ("plain", "accumulate", "astray", "stopped", "quiet"):
        (folder / name).mkdir(exist_ok=True)
    run(engine, folder / "plain", Toy(), batches(engine))
    run(engine, folder / "accumulate", Toy(), batches(engine, accumulate=2), accumulate=2)
    run(engine, folder / "astray", Toy(nan_steps=(2, 3), nan_rank=1), batches(engine))
    count_talks(engine, folder / "quiet")
    run(engine, folder / "stopped", Toy(), signalled(engine))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
