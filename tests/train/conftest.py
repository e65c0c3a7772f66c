"""What the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(
    0, str(Path(__file__).parent)
)  # toy.py is also imported by scripts that the tests start

from patchmine.ops.schedules import LrSchedule
from patchmine.train.checkpoint import Checkpoint
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import train
from patchmine.train.step import TrainSettings

HOOKS = ("on_epoch", "on_sample", "identity", "batches", "before_save", "on_stop")


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture
def run_toy(engine: Engine, tmp_path: Path) -> Callable[..., Any]:
    """Train a toy method in ``tmp_path / name``; returns it."""
    from toy import Toy, toy_batches

    def run(
        name: str = "run", method: Any = None, start: Checkpoint | None = None, **given: Any
    ) -> Any:
        hooks = {key: given.pop(key) for key in HOOKS if key in given}
        say = given.pop("say", lambda text: None)
        defaults: dict[str, Any] = dict(
            total_steps=12, steps_per_epoch=5, batch_size=8, checkpoint_every=5, log_every=4
        )
        settings = TrainSettings(
            **{**defaults, "blr": 0.5, "schedule": LrSchedule(warmup_epochs=1.0), **given}
        )
        method = Toy() if method is None else method
        first = 0 if start is None else start.step
        batches = hooks.pop("batches", None) or toy_batches(
            first, settings.total_steps, settings.batch_size, accumulate=settings.accumulate
        )
        folder = tmp_path / name
        with Log(
            folder, total_steps=settings.total_steps, first_step=first, say=say, tensorboard=False
        ) as log:
            train(
                method,
                batches,
                engine,
                settings,
                folder=folder / "checkpoints",
                log=log,
                start=start,
                before_epoch=getattr(method, "begin_epoch", lambda now: None),
                **hooks,
            )
        return method

    return run
