"""budget=: a run is as long as time allows, once; it is the run of that many steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import DECODER, SMALL, VIT

import patchmine
from patchmine.config.resolve import parse
from patchmine.config.schema import PretrainConfig, SizeRow
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.strict import seconds_in
from patchmine.train.engine import Engine
from patchmine.training import budget
from patchmine.training.pace import Pace
from patchmine.training.place import Place
from patchmine.training.pretraining import make_first
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.bitwise

# A warm-up of a fifth of the 100 epochs by default
TINY: dict[str, Any] = SMALL | VIT | DECODER | {"warmup_epochs": 20}


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pace], None]:
    """Sets the pace that is found, in no time."""

    def set_pace(found: Pace) -> None:
        monkeypatch.setattr(budget, "measure_pace", lambda *_: found)
        monkeypatch.setattr(budget, "seconds_left", lambda config, _: seconds_in(config.budget))

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
    monkeypatch.setattr(budget, "measure_pace", lambda *_: pytest.fail("timed again"))
    again = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **settings)
    assert first.config == again.config


ROWS: dict[str, Any] = {
    "by_size": [
        {
            "up_to": None,
            "device": "cpu",
            "use": {"image_size": 32, "epochs": 10},
            "min_epochs": 4,
            "smaller": [
                {"method": {"decoder_embed_dim": 8}},
                {"image_size": 16, "model_args": {"embed_dim": 12, "depth": 1, "num_heads": 2}},
            ],
        }
    ]
}


@pytest.mark.parametrize(
    ("step", "size", "width", "said"),
    [
        (1.0, 32, 16, None),
        (3.0, 32, 8, "method.decoder_embed_dim=8 instead of 16, so that about"),
        (9.0, 16, 16, "image_size=16 instead of 32, model_args.embed_dim=12 instead of "),
    ],
)
def test_with_little_time_a_recipe_takes_smaller_settings_until_images_are_seen_often_enough(
    step: float,
    size: int,
    width: int,
    said: str | None,
    image_folder: Path,
    tmp_path: Path,
    clockless: Callable[[Pace], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clockless(Pace(step=5.0))
    batches = len(list(image_folder.rglob("*.*"))) // 8

    def step_of(config: PretrainConfig, *_: Any) -> float:
        quicker = config.method.decoder_embed_dim == 8, config.image_size == (16, 16)  # type: ignore[attr-defined]
        return step / batches / (1 + 2 * quicker[0] + 7 * quicker[1])

    monkeypatch.setattr(budget, "measure_step", step_of)
    method = {name.removeprefix("method."): value for name, value in DECODER.items()}
    own = {name: value for name, value in VIT.items() if name != "image_size"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**ROWS, **own, "method": method}), encoding="utf-8")
    heard: list[str] = []
    given = SMALL | {"budget": "10s", "say": heard.append, "resume": "auto", "warmup_epochs": 0}
    run = patchmine.pretrain(recipe=recipe, data=image_folder, out=tmp_path / "run", **given)
    config = run.config
    assert isinstance(config, PretrainConfig)
    assert config.image_size == (size, size)
    assert config.method.decoder_embed_dim == width  # type: ignore[attr-defined]
    assert (config.steps, config.epochs, config.by_size) == (2, None, [])
    told = [line for line in heard if " instead of " in line]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
    again = patchmine.pretrain(recipe=recipe, data=image_folder, out=tmp_path / "run", **given)
    assert again.config == config


def test_where_no_settings_are_quick_enough_the_quickest_are_taken(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = itertools.count(20.0, -4.0)  # timing takes time, too
    monkeypatch.setattr(budget, "seconds_left", lambda *_: next(left))
    row = SizeRow.model_validate(ROWS["by_size"][0])
    times = iter([9.0, 5.0, 7.0])
    monkeypatch.setattr(budget, "measure_step", lambda *_: next(times))
    config = PretrainConfig(data="x", image_size=32, patch_size=4, batch_size=8, budget="1s")
    images = open_source(image_folder)
    found = budget.chosen_size(config, row, Place(tmp_path, Engine("cpu")), images, pytest.fail)
    assert found.method.decoder_embed_dim == 8  # type: ignore[attr-defined]


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

    def alone(**part: Any) -> float:
        return Pace(step=0.0, **part).beside(config, length)

    assert alone(picture=1) == 4  # steps 30, 60, 90, 100
    assert alone(checkpoint=1) == 4
    assert alone(export=1) == alone(start=1) == 1
    assert alone(whole=1) == 0
    assert alone(whole=1, whole_epochs=lambda length: range(2, length.total_epochs, 3)) == 3
    assert alone(look=1) == 1 + 5
    assert alone(evaluation=1) == 2


def test_a_method_says_before_which_epochs_it_looks_at_all_images() -> None:
    settings = parse(None, ["data=x", "method=amt", "image_size=32", "patch_size=8", "epochs=30"])
    assert isinstance(settings, PretrainConfig)
    method = make_first(settings)
    length = Progress(0, 30 * 4, 4)
    looked: list[int] = []

    def images(epoch: int) -> Iterator[Batch]:
        looked.append(epoch)
        box, flip = torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool)
        yield Batch([torch.rand(2, 3, 32, 32)], torch.arange(2), box, flip)

    for epoch in range(30):
        method.begin_epoch(length.at(epoch * 4), images(epoch))
    assert list(method.whole_epochs(length)) == looked
    assert looked


def test_a_longer_run_may_be_given_a_time(
    image_folder: Path, tmp_path: Path, clockless: Callable[[Pace], None]
) -> None:
    clockless(Pace(step=10.0))
    own = TINY | {"epochs": 10, "steps": None, "warmup_epochs": 2}
    first = patchmine.pretrain(data=image_folder, out=tmp_path / "first", **own)
    longer = first.extend(tmp_path / "longer", budget="1m", say=lambda _: None)
    config = longer.config
    assert isinstance(config, PretrainConfig)
    assert (config.steps, config.epochs, config.budget) == (6, None, None)
    per_epoch = len(list(image_folder.rglob("*.*"))) // 8
    assert config.warmup_epochs == pytest.approx(0.2 * 6 / per_epoch)
    more = {"steps": 6, "warmup_epochs": config.warmup_epochs, "say": lambda _: None}
    assert same_weights(longer, first.extend(tmp_path / "again", **more))
    with pytest.raises(UserError, match="budget or epochs"):
        first.extend(tmp_path / "neither", budget="1m", epochs=3)


def test_a_budget_counts_from_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, Engine("cpu"), began=100.0)
    monkeypatch.setattr(budget, "perf_counter", lambda: 107.5)
    config = PretrainConfig(data="x", budget="10s")
    assert budget.seconds_left(config, place) == 2.5
    monkeypatch.setattr(budget, "perf_counter", lambda: 200.0)
    assert budget.seconds_left(config, place) == 0.0
