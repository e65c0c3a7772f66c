"""Three processes of which one ends: `ending.py FOLDER CASE`; run by test_train_ending.py.

What two cases raise in all processes is left in FOLDER; then the last rank makes a mistake, is
killed, or waits for the first one to be killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from toy import Toy, toy_batches

from patchmine.errors import UserError
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.loop import train
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, Progress

PROCESSES = 3
SETTINGS = TrainSettings(batch_size=6, checkpoint_every=5, log_every=4, warmup_epochs=0)


def refused(engine: Engine, folder: Path) -> None:
    """The sentences of processes that differ, and of a batch that cannot be shared out."""
    said = []
    for attempt in (
        lambda: engine.agree({"data": "3 items" if engine.rank == 2 else "4 items", "blr": 0.1}),
        lambda: Stepper(Toy(), engine, TrainSettings(batch_size=8)),
    ):
        try:
            attempt()
        except UserError as error:
            said.append(str(error))
    (folder / f"said{engine.rank}.txt").write_text("\n".join(said))


def batches(engine: Engine, case: str) -> Iterator[Batch]:
    for step, batch in enumerate(toy_batches(0, 4000, 6, rank=engine.rank, world_size=PROCESSES)):
        if step == 12 and case == "killed" and engine.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 12 and case == "first" and engine.is_main:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def main(folder: Path, case: str) -> None:
    engine = Engine(device="cpu", devices=PROCESSES)
    refused(engine, folder)
    (folder / f"process{engine.rank}").write_text(str(os.getpid()))
    with engine.together():
        engine.advise("go on with `patchmine resume r`")
        if case == "mistake" and engine.rank == 2:
            raise UserError("data=photos does not exist")
        say = lambda text: None  # noqa: E731
        with Log(
            folder if engine.is_main else None, total_steps=4000, say=say, tensorboard=False
        ) as log:
            train(
                Toy(),
                batches(engine, case),
                engine,
                SETTINGS,
                Progress(0, 4000, 50),
                keeper=Keeper(folder / "checkpoints"),
                log=log,
            )


def as_the_command_line(folder: Path, case: str) -> int:
    try:
        main(folder, case)
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(as_the_command_line(Path(sys.argv[1]), sys.argv[2]))
