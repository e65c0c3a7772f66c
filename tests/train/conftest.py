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

from patchmine.train.checkpoint import Checkpoint
from patchmine.train.engine import Engine
from patchmine.train.keeper import Keeper
from patchmine.train.log import Log
from patchmine.train.loop import Hooks, train
from patchmine.train.settings import TrainSettings
from patchmine.types import Progress

HOOKS = ("on_pace", "on_epoch", "on_sample", "before_save", "on_stop")
KEPT = ("identity", "best_by")


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
        told = {"say": given.pop("say", lambda text: None), "console": given.pop("console", None)}
        kept = {key: given.pop(key) for key in KEPT if key in given}
        length = Progress(0, given.pop("total_steps", 12), 5)
        batches = given.pop("batches", None)
        defaults: dict[str, Any] = dict(batch_size=8, checkpoint_every=5, log_every=4)
        settings = TrainSettings(**{**defaults, "blr": 0.5, "warmup_epochs": 1.0, **given})
        method = Toy() if method is None else method
        first = 0 if start is None else start.step
        batches = batches or toy_batches(
            first, length.total_steps, settings.batch_size, accumulate=settings.accumulate
        )
        folder = tmp_path / name
        with Log(
            folder, total_steps=length.total_steps, first_step=first, tensorboard=False, **told
        ) as log:
            train(
                method,
                batches,
                engine,
                settings,
                length,
                keeper=Keeper(folder / "checkpoints", start, **kept),
                log=log,
                hooks=Hooks(before_epoch=method.begin_epoch, **hooks),
            )
        return method

    return run
