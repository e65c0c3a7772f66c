"""Rates against a slow loop, clipping against torch, skipped steps against doing nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from patchmine.ops.schedules import LrSchedule, learning_rate
from patchmine.train.optim import (
    build_optimizers,
    clip_gradients,
    decay_strength,
    is_decayed,
    load_optimizer_tensors,
    optimizer_tensors,
    render_groups,
    set_rates,
    update,
)
from patchmine.types import ParamGroup, Progress

START = Progress(0, 10, 5)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


def fill_gradients(module: nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def build(module: nn.Module, **group: object):
    return build_optimizers(
        [ParamGroup(named(module), **group)], weight_decay=0.05, blr=1e-2, betas=(0.9, 0.95)
    )


@pytest.mark.parametrize(("warmup", "min_lr"), [(0, 0.0), (3, 1e-6), (2.5, 1e-5)])
def test_rates_follow_the_reference_loop(warmup: float, min_lr: float) -> None:
    epochs, steps_per_epoch, peak = 8, 4, 2.4e-3
    step = 0
    for epoch in range(epochs):
        for inner in range(steps_per_epoch):
            now = epoch + inner / steps_per_epoch
            if now < warmup:
                expected = peak * now / warmup
            else:
                expected = min_lr + (peak - min_lr) * 0.5 * (
                    1 + math.cos(math.pi * (now - warmup) / (epochs - warmup))
                )
            progress = Progress(step, epochs * steps_per_epoch, steps_per_epoch)
            assert (
                learning_rate(progress, peak, LrSchedule(warmup_epochs=warmup, min_lr=min_lr))
                == expected
            )
            step += 1


def test_a_run_shorter_than_its_warmup_only_warms_up() -> None:
    rates = [
        learning_rate(Progress(step, 4, 2), 1.0, LrSchedule(warmup_epochs=4, min_lr=0.0))
        for step in range(5)
    ]
    assert rates == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert learning_rate(Progress(4, 4, 2), 1.0, LrSchedule(warmup_epochs=2, min_lr=0.0)) == 1.0


def test_peak_rate_is_base_rate_times_batch_over_256() -> None:
    first, second = network(), network()
    optimizers = build_optimizers(
        [
            ParamGroup([(f"a.{name}", p) for name, p in named(first)]),
            ParamGroup([(f"b.{name}", p) for name, p in named(second)], optimizer="sgd", blr=0.3),
        ],
        weight_decay=0.05,
        blr=1.5e-4,
        betas=(0.9, 0.95),
    )
    rates = set_rates(
        optimizers, START, batch_size=4096, schedule=LrSchedule(warmup_epochs=0, min_lr=0.0)
    )
    assert rates == {"lr": pytest.approx(2.4e-3), "lr_sgd": pytest.approx(4.8)}
    assert {group["lr"] for group in optimizers.by_name["adamw"].param_groups} == {rates["lr"]}


def test_a_group_may_end_at_a_rate_of_its_own() -> None:
    first, second = network(), network()
    groups = [
        ParamGroup([(f"a.{name}", p) for name, p in named(first)]),
        ParamGroup(
            [(f"b.{name}", p) for name, p in named(second)], optimizer="sgd", blr=0.1, min_lr=0.0048
        ),
    ]
    optimizers = build_optimizers(groups, weight_decay=0.05, blr=1e-3, betas=(0.9, 0.95))
    for step in (0, 3, 10, 37, 40):
        now = Progress(step, 40, 4)
        found = set_rates(
            optimizers, now, batch_size=512, schedule=LrSchedule(warmup_epochs=2, min_lr=1e-5)
        )
        assert found["lr"] == learning_rate(now, 2e-3, LrSchedule(warmup_epochs=2, min_lr=1e-5))
        assert found["lr_sgd"] == learning_rate(
            now, 0.2, LrSchedule(warmup_epochs=2, min_lr=0.0048)
        )
    assert found == {
        "lr": pytest.approx(1e-5),
        "lr_sgd": pytest.approx(0.0048),
    }  # absolute, whatever the batch


def test_weight_decay_follows_the_reference_loop() -> None:
    total, start, end = 24, 0.04, 0.4
    expected = [
        end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total)) for step in range(total)
    ]
    assert [
        decay_strength(Progress(step, total, 5), start, end) for step in range(total)
    ] == pytest.approx(expected)
    module = network()
    optimizers = build(module, weight_decay=start, weight_decay_end=end)
    for step, strength in enumerate(expected):
        set_rates(
            optimizers,
            Progress(step, total, 5),
            batch_size=256,
            schedule=LrSchedule(warmup_epochs=0, min_lr=0.0),
        )
        for group in optimizers.by_name["adamw"].param_groups:
            assert group["weight_decay"] == pytest.approx(
                strength if group["params"][0].ndim == 2 else 0.0
            )


def test_a_constant_decay_stays_the_very_number() -> None:
    optimizers = build(network(), weight_decay=0.1)
    for step in range(7):
        set_rates(
            optimizers,
            Progress(step, 7, 5),
            batch_size=256,
            schedule=LrSchedule(warmup_epochs=0, min_lr=0.0),
        )
        assert {group["weight_decay"] for group in optimizers.by_name["adamw"].param_groups} == {
            0.0,
            0.1,
        }


def test_sgd_that_decays_all_equals_its_formula() -> None:
    """Coupled decay, momentum 0.9, on matrices, biases and norms alike (MOKD's CNN transformer
    head).
    """
    module = network()
    slow = {name: p.detach().double().clone() for name, p in named(module)}
    speed = {name: torch.zeros_like(value) for name, value in slow.items()}
    optimizers = build(
        module, optimizer="sgd", weight_decay=0.04, weight_decay_end=0.4, decay_all=True
    )
    for step in range(4):
        progress = Progress(step, 10, 5)
        fill_gradients(module)
        lr = set_rates(
            optimizers, progress, batch_size=256, schedule=LrSchedule(warmup_epochs=0, min_lr=0.0)
        )["lr"]
        update(optimizers, torch.zeros(()))
        for name, parameter in named(module):
            grad = parameter.grad.double() + decay_strength(progress, 0.04, 0.4) * slow[name]
            speed[name] = 0.9 * speed[name] + grad
            slow[name] -= lr * speed[name]
            torch.testing.assert_close(
                parameter.detach().double(), slow[name], atol=1e-6, rtol=1e-5
            )


def test_two_optimizers_of_a_kind_are_kept_apart_by_name() -> None:
    first, second = network(), network()
    fill_gradients(first, 10.0)
    fill_gradients(second, 1.0)
    groups = [
        ParamGroup([(f"a.{name}", p) for name, p in named(first)], clip_norm=1.0, blr=0.1),
        ParamGroup(
            [(f"b.{name}", p) for name, p in named(second)], clip_norm=1.0, blr=0.2, name="partner"
        ),
    ]
    optimizers = build_optimizers(groups, weight_decay=0, blr=1.0, betas=(0.9, 0.95))
    rates = set_rates(
        optimizers, START, batch_size=256, schedule=LrSchedule(warmup_epochs=0, min_lr=0.0)
    )
    assert rates == {"lr": pytest.approx(0.1), "lr_partner": pytest.approx(0.2)}
    clip_gradients(optimizers, START)
    for module in (first, second):
        assert torch.cat(
            [p.grad.flatten() for p in module.parameters()]
        ).norm().item() == pytest.approx(1, rel=1e-4)
    update(optimizers, torch.zeros(()))
    state = optimizer_tensors(optimizers)
    assert {"a.0.weight.exp_avg", "b.0.weight.exp_avg"} <= state.keys()
    load_optimizer_tensors(optimizers, state)


def test_tokens_are_decayed_and_vectors_and_biases_are_not() -> None:
    assert is_decayed("cls_token", torch.zeros(1, 1, 8))
    assert is_decayed("blocks.0.attn.qkv.weight", torch.zeros(8, 8))
    assert not is_decayed("norm.weight", torch.zeros(8))
    assert not is_decayed("odd.bias", torch.zeros(8, 8))
    groups = build(network()).by_name["adamw"].param_groups
    assert {
        p.ndim for group in groups if group["weight_decay"] == 0.05 for p in group["params"]
    } == {2}
    assert {
        p.ndim for group in groups if group["weight_decay"] == 0.0 for p in group["params"]
    } == {1}


def test_adamw_equals_the_formula_of_its_paper() -> None:
    module = nn.Linear(3, 2, bias=False)
    weight = module.weight.detach().double().clone()
    optimizers = build(module)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        module.weight.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        grad = module.weight.grad.double()
        lr = set_rates(
            optimizers,
            Progress(step, 10, 5),
            batch_size=256,
            schedule=LrSchedule(warmup_epochs=0, min_lr=0.0),
        )["lr"]
        update(optimizers, torch.zeros(()))
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        weight = weight * (1 - lr * 0.05)
        weight -= lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(module.weight.detach().double(), weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_clipping_equals_torchs(scale: float) -> None:
    module = network()
    twin = copy.deepcopy(module)
    fill_gradients(module, scale)
    fill_gradients(twin, scale)
    norm = clip_gradients(build(module, clip_norm=1.5), START)
    expected = nn.utils.clip_grad_norm_(twin.parameters(), 1.5)
    assert torch.equal(norm, expected)
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_clipping_each_parameter_equals_torchs_on_each() -> None:
    module = network()
    twin = copy.deepcopy(module)
    fill_gradients(module)
    fill_gradients(twin)
    clip_gradients(build(module, clip_norm=1.0, clip_each=True), START)
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        nn.utils.clip_grad_norm_([theirs], 1.0)
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_groups_are_clipped_by_themselves() -> None:
    first, second = network(), network()
    fill_gradients(first, 10.0)
    fill_gradients(second, 10.0)
    groups = [
        ParamGroup([(f"a.{name}", p) for name, p in named(first)], clip_norm=1.0),
        ParamGroup([(f"b.{name}", p) for name, p in named(second)], optimizer="sgd"),
    ]
    clip_gradients(build_optimizers(groups, weight_decay=0, blr=1.0, betas=(0.9, 0.95)), START)
    norm = lambda module: torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()  # noqa: E731
    assert norm(first) == pytest.approx(1.0, rel=1e-4)
    assert norm(second) > 10


def test_mistakes_of_a_method_are_named() -> None:
    module = network()
    settings = dict(weight_decay=0.0, blr=1.0, betas=(0.9, 0.95))
    with pytest.raises(ValueError, match=r"'0\.weight' twice"):
        build_optimizers([ParamGroup(named(module)), ParamGroup(named(module)[:1])], **settings)
    with pytest.raises(ValueError, match="unknown optimizer 'adam'; there are adamw, sgd, lars"):
        build_optimizers([ParamGroup(named(module), optimizer="adam")], **settings)
    kinds = [
        ParamGroup(named(module)[:1], "adamw", name="one"),
        ParamGroup(named(module)[1:], "sgd", name="one"),
    ]
    with pytest.raises(ValueError, match="asks for adamw and sgd under one name, 'one'"):
        build_optimizers(kinds, **settings)
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizers([], **settings)
    with pytest.raises(ValueError, match="'gone', which is not trained"):
        load_optimizer_tensors(build(module), {"gone.exp_avg": torch.zeros(1)})
    optimizers = build(module)
    module(torch.ones(1, 4)).sum().backward()
    set_rates(optimizers, START, batch_size=256, schedule=LrSchedule())
    update(optimizers, torch.zeros(()))
    state = optimizer_tensors(optimizers)
    del state["0.weight.exp_avg"]
    with pytest.raises(ValueError, match="optimizer state of some parameters is incomplete"):
        load_optimizer_tensors(build(module), state)


def test_the_table_of_groups_counts_what_is_trained_at_each_rate() -> None:
    layers = dict(network().named_children())
    groups = [
        ParamGroup(named(layers["2"])),  # 6 * 2 + 2
        ParamGroup(named(layers["0"]), scale=0.25),  # 4 * 6 + 6
        ParamGroup(named(layers["1"]), scale=0.25, weight_decay=0.0),  # 6 + 6
    ]
    text = render_groups(groups, weight_decay=0.05, blr=1e-3, batch_size=512)
    assert [line.split() for line in text.splitlines()] == [
        ["rate", "scale", "tensors", "parameters", "decayed"],
        ["5.00e-04", "0.2500", "4", "42", "24"],
        ["2.00e-03", "1.0000", "2", "14", "12"],
        ["all", "6", "56", "36"],
    ]
    spared = [ParamGroup(named(layers["2"]), weight_decay=0.0, blr=1e-2)]
    row = render_groups(spared, weight_decay=0.05, blr=1e-3, batch_size=256).splitlines()[1]
    assert row.split() == ["1.00e-02", "1.0000", "2", "14", "0"]
