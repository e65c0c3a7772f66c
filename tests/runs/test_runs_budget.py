"""budget=: a run is as long as time allows, once; it is the run of that many steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import DECODER, SMALL, VIT

import patchmine
from patchmine.config.schema import PretrainConfig
from patchmine.errors import UserError
from patchmine.training import pace
from patchmine.training.pace import Pace
from patchmine.types import Progress

pytestmark = pytest.mark.bitwise

# A warm-up of a fifth of the 100 epochs by default
TINY: dict[str, Any] = SMALL | VIT | DECODER | {"warmup_epochs": 20}


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pace], None]:
    """Sets the pace that is found, in no time."""

    def set_pace(found: Pace) -> None:
        monkeypatch.setattr(pace, "measure_pace", lambda *_: found)
        monkeypatch.setattr(pace, "perf_counter", lambda: 0.0)

    return set_pace


def same_weights(one: patchmine.Run, other: patchmine.Run) -> bool:
    first, second = (load_file(run.export_dir / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def test_a_budget_becomes_steps_and_is_the_run_of_so_many(
    image_folder: Path, tmp_path: Path, clockless: Callable[[Pace], None]
) -> None:
    clockless(Pace(step=10.0))
    said: list[str] = []
    run = patchmine.pretrain(
        data=image_folder, out=tmp_path / "run", **TINY | {"budget": "1m", "say": said.append}
    )
    config = run.config
    assert isinstance(config, PretrainConfig)
    assert (config.steps, config.epochs, config.budget) == (6, None, None)
    per_epoch = len(list(image_folder.rglob("*.*"))) // 8
    assert config.warmup_epochs == pytest.approx(0.2 * 6 / per_epoch)
    assert any(
        line.startswith("budget=1m: 6 steps (") and " at 10 s a step" in line for line in said
    )
    assert any("in 6 steps next to nothing is learned" in line for line in said)
    plain = TINY | {"warmup_epochs": config.warmup_epochs}
    again = patchmine.pretrain(data=image_folder, out=tmp_path / "again", steps=6, **plain)
    assert same_weights(run, again)
    with pytest.raises(UserError, match=r"budget \(was null, now '2h'\)"):
        patchmine.resume(run.path, budget="2h")  # type: ignore[call-arg]


def test_the_same_command_again_goes_on_and_times_nothing(
    image_folder: Path,
    tmp_path: Path,
    clockless: Callable[[Pace], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clockless(Pace(step=10.0))
    settings = TINY | {"budget": "30s", "resume": "auto"}
    first = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **settings)
    monkeypatch.setattr(pace, "measure_pace", lambda *_: pytest.fail("timed again"))
    again = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **settings)
    assert first.config == again.config


def test_what_is_timed_leaves_no_trace(image_folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **TINY | {"budget": "1s"})
    assert torch.equal(torch.get_rng_state(), before)
    own = {name: getattr(run.config, name) for name in ("steps", "warmup_epochs")}
    plain = patchmine.pretrain(data=image_folder, out=tmp_path / "plain", **TINY | own)
    assert same_weights(run, plain)
    names = [sorted(path.name for path in each.path.iterdir()) for each in (run, plain)]
    assert names[0] == names[1]
    assert len(run.metrics()) == len(plain.metrics())


@pytest.mark.parametrize("seconds", [60.0, 600.0, 7200.0])
def test_the_longest_run_that_fits_is_chosen(seconds: float) -> None:
    config = PretrainConfig(data="x", batch_size=8)
    found = Pace(step=0.5, picture=1.0, checkpoint=0.25, look=2.0, watched=100)
    steps = found.fitting(config, 10, seconds)

    def takes(steps: int) -> float:
        return found.seconds(config, Progress(0, steps, 10))

    assert takes(steps) <= seconds < takes(steps + 1) + 2 * found.look
    assert 0.5 * seconds < takes(steps)
    assert found.fitting(config, 10, 0.1) == 1


def test_what_is_done_beside_steps_is_counted_as_often_as_the_loop_does_it() -> None:
    settings = {"monitor_every": 2, "eval_every": 5, "eval_data": "y", "sample_every": 30}
    config = PretrainConfig(data="x", checkpoint_every=25, **settings)
    length = Progress(0, 100, 10)

    def alone(**part: float) -> float:
        return Pace(step=0.0, **part).beside(config, length)  # type: ignore[arg-type]

    assert alone(picture=1) == 4  # steps 30, 60, 90, 100
    assert alone(checkpoint=1) == 4 + 1  # and the export
    assert alone(look=1) == 1 + 5
    assert alone(evaluation=1) == 2
