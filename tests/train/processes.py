"""Trains the toy in two processes; run by test_train_processes.py as `processes.py FOLDER`, also
under torchrun.

Each rank leaves its weights of four runs: plain, accumulating, with bad losses on rank 1, and
stopped by way of rank 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from toy import Toy, toy_batches

from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import Hooks, Keeper, train
from patchmine.train.settings import TrainSettings
from patchmine.types import Batch, Progress


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


def signalled(engine: Engine) -> Iterator[Batch]:
    for step, batch in enumerate(batches(engine)):
        if step == 6 and engine.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def main(folder: Path) -> None:
    engine = Engine(device="cpu", devices=2)
    for name in ("plain", "accumulate", "astray", "stopped"):
        (folder / name).mkdir(exist_ok=True)
    run(engine, folder / "plain", Toy(), batches(engine))
    run(engine, folder / "accumulate", Toy(), batches(engine, accumulate=2), accumulate=2)
    run(engine, folder / "astray", Toy(nan_steps=(2, 3), nan_rank=1), batches(engine))
    run(engine, folder / "stopped", Toy(), signalled(engine))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
