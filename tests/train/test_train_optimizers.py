"""The optimizers by their promises: formulas, what trains what, skipped steps, exact resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from patchmine.config.schema import PretrainConfig, names_of
from patchmine.errors import UserError
from patchmine.ops.schedules import LrSchedule
from patchmine.train.engine import Engine
from patchmine.train.optim import (
    Optimizers,
    build_optimizers,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_rates,
    update,
)
from patchmine.train.settings import TrainSettings
from patchmine.types import ParamGroup, Progress

START = Progress(0, 10, 5)
KINDS = ("adamw", "sgd", "lars", "nadamw", "muon")
OF_A_RUN = ("nadamw", "muon")  # in the place of AdamW
SETTINGS: dict[str, Any] = dict(weight_decay=0.05, blr=1e-2, betas=(0.9, 0.95))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"encoder.blocks.0.{name}", each) for name, each in module.named_parameters()]


def fill_gradients(module: nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def build(module: nn.Module, name: str, **group: Any) -> Optimizers:
    run: Any = name if name in OF_A_RUN else "adamw"
    own = "adamw" if name in OF_A_RUN else name
    groups = [ParamGroup(named(module), optimizer=own, **group)]
    return build_optimizers(groups, optimizer=run, **SETTINGS)


def make_step(optimizers: Optimizers, progress: Progress = START) -> float:
    """One, without warm-up; gives its rate."""
    schedule = LrSchedule(warmup_epochs=0, min_lr=0.0)
    rates = set_rates(optimizers, progress, batch_size=256, schedule=schedule)
    update(optimizers, torch.zeros(()))
    return rates["lr"]


def test_nadamw_equals_its_formula() -> None:
    module = nn.Linear(3, 2, bias=False)
    weight = module.weight.detach().double().clone()
    optimizers = build(module, "nadamw")
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        module.weight.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        grad = module.weight.grad.double()
        lr = make_step(optimizers)
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        ahead = 0.9 * first + 0.1 * grad
        weight -= lr * 0.05 * weight
        weight -= lr * ahead / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        assert torch.allclose(module.weight.detach().double(), weight, atol=1e-6)


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of Newton and Schulz, as Muon's author gives them, in float64."""
    found = matrix / matrix.norm()
    for _ in range(5):
        gram = found @ found.T
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found


def test_muon_equals_its_formula_with_steps_as_large_as_adamws() -> None:
    module = nn.Sequential(nn.Linear(24, 16, bias=False))
    (matrix,) = module.parameters()
    weight, momentum = matrix.detach().double().clone(), torch.zeros(16, 24).double()
    optimizers = build(module, "muon")
    for step in range(1, 4):
        before = weight.clone()
        matrix.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        grad = matrix.grad.double()
        lr = make_step(optimizers)
        momentum = 0.95 * momentum + 0.05 * grad
        moved = orthogonal(0.95 * momentum + 0.05 * grad) * 0.2 * math.sqrt(24)
        weight = weight - lr * 0.05 * weight - lr * moved
        found = matrix.detach().double()
        assert (found - weight).norm() < 0.03 * (weight - before).norm()  # it computes in bfloat16
        assert moved.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)  # AdamW's, about
        weight = found.clone()


def names_by_optimizer(optimizers: Optimizers) -> dict[str, set[str]]:
    names = {parameter: name for name, parameter in optimizers.params.items()}
    return {
        kind: {names[p] for group in optimizer.param_groups for p in group["params"]}
        for kind, optimizer in optimizers.by_name.items()
    }


def test_muon_turns_the_matrices_of_blocks_and_adamw_trains_all_else() -> None:
    method = sharded.build("mae")
    found = names_by_optimizer(
        build_optimizers(method.param_groups(), optimizer="muon", **SETTINGS)
    )
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert found["muon"] == {
        f"{part}.blocks.{number}.{name}"
        for part in ("encoder", "decoder")
        for number in range(2)
        for name in matrices
    }
    assert found["adamw"] == {name for name, _ in method.learning()} - found["muon"]
    tables = [("blocks.0.attn.relative_position_bias_table", nn.Parameter(torch.ones(9, 2)))]
    with pytest.raises(UserError, match="is for the matrices of transformer blocks"):
        build_optimizers([ParamGroup(tables)], optimizer="muon", **SETTINGS)


def test_a_method_of_two_optimizers_keeps_the_other() -> None:
    groups = sharded.build("mokd").param_groups()
    usual = names_by_optimizer(build_optimizers(groups, **SETTINGS))
    for name in OF_A_RUN:
        found = names_by_optimizer(build_optimizers(groups, optimizer=name, **SETTINGS))  # type: ignore[arg-type]
        assert found["sgd"] == usual["sgd"]
        assert found[name] | found.get("adamw", set()) == usual["adamw"]
        assert all("blocks" in each for each in found[name]) == (name == "muon")


def test_rates_decay_and_clipping_are_those_of_the_group() -> None:
    first, second = network(), network()
    fill_gradients(first, 10.0)
    fill_gradients(second, 1.0)
    groups = [
        ParamGroup(named(first), clip_norm=1.0, scale=0.5),
        ParamGroup([(f"head.{name}", p) for name, p in second.named_parameters()], "sgd"),
    ]
    optimizers = build_optimizers(groups, optimizer="muon", **SETTINGS)
    make_step(optimizers)
    for name in ("muon", "adamw"):
        for group in optimizers.by_name[name].param_groups:
            assert group["lr"] == 0.5e-2
            assert all(
                group["weight_decay"] == (0.05 if each.ndim == 2 else 0.0)
                for each in group["params"]
            )
    fill_gradients(first, 10.0)
    clip_gradients(optimizers, START)
    gradients = [p.grad.flatten() for p in first.parameters() if p.grad is not None]
    assert torch.cat(gradients).norm().item() == pytest.approx(1, rel=1e-4)


def test_an_optimizer_that_would_train_nothing_is_refused() -> None:
    for name, words in (
        ("nadamw", "optimizer=nadamw takes AdamW's place, and here sgd trains everything"),
        ("muon", "optimizer=muon is for the matrices of transformer blocks, and here none of them"),
    ):
        with pytest.raises(UserError, match=words):
            build_optimizers(
                [ParamGroup(named(network()), "sgd")],
                optimizer=name,  # type: ignore[arg-type]
                **SETTINGS,
            )


def test_muon_is_refused_where_it_cannot_be_right() -> None:
    for sharding in ("fsdp", "hybrid"):
        with pytest.raises(ValueError, match=f"sharding={sharding} leaves each .*set sharding=ddp"):
            TrainSettings(optimizer="muon", sharding=sharding)  # type: ignore[arg-type]


def test_the_optimizer_is_no_setting_that_a_resumed_run_may_change() -> None:
    assert "optimizer" in names_of(PretrainConfig, decide_weights=True)


@pytest.mark.bitwise
@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_run_that_was_stopped_goes_on_bit_by_bit(
    engine: Engine, tmp_path: Path, name: str
) -> None:
    for folder, ends in (("whole", (4,)), ("parts", (1, 3, 4))):
        for last in ends:
            sharded.train_case(engine, tmp_path / folder, "mae", last, optimizer=name)
    whole, parts = (load_file(tmp_path / f / "mae/weights.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


@pytest.mark.parametrize("name", KINDS)
def test_a_frozen_group_does_not_move_until_its_epoch(name: str) -> None:
    """Not by weight decay either."""
    module = network()
    optimizers = build(module, name, frozen_until=1, weight_decay=0.5, decay_all=True)
    before = copy.deepcopy(module.state_dict())
    for step in range(6):
        progress = Progress(step, 10, 5)
        fill_gradients(module)
        set_rates(
            optimizers, progress, batch_size=256, schedule=LrSchedule(warmup_epochs=0, min_lr=0.0)
        )
        clip_gradients(optimizers, progress)
        update(optimizers, torch.zeros(()))
        still = all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert still == (step < 5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_skipped_step_leaves_no_trace(name: str, bad_step: int) -> None:
    def run(steps: list[int]) -> dict[str, Tensor]:
        module = network()
        optimizers = build(module, name)
        for step in steps:
            fill_gradients(module, math.nan if step < 0 else step + 1.0)
            set_rates(
                optimizers,
                Progress(1, 10, 5),
                batch_size=256,
                schedule=LrSchedule(warmup_epochs=0, min_lr=0.0),
            )
            bad = clip_gradients(optimizers, START).isfinite().logical_not().float()
            update(optimizers, bad)
        return {**module.state_dict(), **optimizer_tensors(optimizers)}

    clean, spoilt = [0, 1, 2], [0, 1, 2]
    spoilt.insert(bad_step, -1)
    expected, found = run(clean), run(spoilt)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", KINDS)
def test_optimizer_state_survives_by_parameter_name(name: str) -> None:
    def steps(module: nn.Module, optimizers: object, count: int) -> None:
        for _ in range(count):
            fill_gradients(module)
            set_rates(
                optimizers,
                Progress(1, 10, 5),
                batch_size=256,
                schedule=LrSchedule(warmup_epochs=0, min_lr=0.0),
            )
            update(optimizers, torch.zeros(()))

    module = network()
    optimizers = build(module, name)
    steps(module, optimizers, 3)
    state = {key: value.clone() for key, value in optimizer_tensors(optimizers).items()}
    assert all(
        any(key.startswith(f"{parameter}.") for parameter, _ in named(module)) for key in state
    )
    other = copy.deepcopy(module)
    steps(module, optimizers, 2)
    resumed = build(other, name)
    load_optimizer_tensors(resumed, state)
    steps(other, resumed, 2)
    for key, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
