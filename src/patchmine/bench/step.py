"""`patchmine bench step`: what a training step costs, methods against each other.

Contestants take turns, step by step, so that whatever else the machine does meets all of them
alike.  Reported are medians over the rounds, of ratios the median of the rounds' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from statistics import median
from typing import Any

import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder, family_of
from patchmine.bench import measure
from patchmine.bench.profile import time_by_kind
from patchmine.bench.settings import BenchStepSettings
from patchmine.config.explain import did_you_mean, shown, validate
from patchmine.data.items import CLIP
from patchmine.data.views.images import NUM_GLOBAL
from patchmine.errors import Say, UserError
from patchmine.methods import METHODS, method_class
from patchmine.models.onednn import measured_product
from patchmine.models.settings import MethodSettings
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.optim import Optimizers, optimizer_tensors
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, Progress

# A long imaginary run, so that its first step is as early as can be whatever a schedule counts in.
RUN_LENGTH = 1000


@dataclass(frozen=True)
class Contestant:
    """Something that trains: ``step`` is one whole step, ``state`` what stays in memory."""

    name: str
    step: Callable[[], object]
    optimizers: Optimizers
    state: Sequence[Tensor]


Rivals = Callable[[Mapping[str, Method], BenchStepSettings, Engine], list[Contestant]]
"""What else takes part, given the methods by name (see the scripts in benchmarks/)."""


def bench_step(*, say: Say, rivals: Rivals = lambda *_: [], **settings: Any) -> dict[str, Any]:
    """Time whole training steps on random images: forward, backward, update, what comes then.

    A method whose first step does other work than one in mid-training (nothing hard to look for
    yet) is timed at both.

    Args:
        say: hears the result in lines.
        rivals: makes further contestants, by which every method is divided too.
        settings: those of `BenchStepSettings`.

    Returns:
        What is also written to ``out``: settings, hardware, the rate of a large matrix product
        measured between the steps, and for each contestant time, memory, work, rate and share of
        that product's rate; with ``profile`` also the shares of its time by kind of operator.

    Raises:
        UserError: settings that are wrong.
    """
    config = validate(BenchStepSettings, settings, where="the settings of bench step")
    names, options = methods_asked(config)
    engine = engine_of(config)
    torch.manual_seed(0)
    methods = {name: build_method(name, options[name], config) for name in names}
    others = rivals(methods, config, engine)
    own = [each for name in names for each in contestants(name, methods[name], config, engine)]
    taking_part = [*own, *others]
    say(f"{len(taking_part)} contestants, {config.rounds} rounds of one turn each, after a few.")
    facts = {contestant.name: _facts(contestant, engine.device) for contestant in taking_part}
    race = _race(taking_part, engine, config.rounds)
    if config.profile:
        for each in taking_part:
            shares = time_by_kind(each.step, engine.device)
            facts[each.name]["time_by_kind"] = {kind: _round(s) for kind, s in shares.items()}
    by_product = {name: _round(median(rates) / 1e9) for name, rates in race.rates_by.items()}
    used = {"device": engine.device.type, "precision": engine.precision}
    used["product"] = engine.product if engine.device.type == "cpu" else "torch"
    result = {
        "command": _command(config),
        "hardware": measure.hardware(engine.device),
        "settings": {**config.model_dump(mode="json", exclude={"out"}), **used},
        "matmul": {
            "side": measure.matmul_side(engine.device),
            "gflops": _round(median(race.rates) / 1e9),
            "gflops_by": by_product,
        },
        "contestants": [_row(name, facts[name], race, config.batch_size) for name in facts],
        "ratios": _ratios(race.times, [each.name for each in others]),
    }
    for line in as_lines(result):
        say(line)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"Written to {config.out}")
    return result


# ---- who takes part ----


def size_of(config: BenchStepSettings) -> tuple[int, int]:
    """(height, width) in pixels."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else size


def random_images(
    config: BenchStepSettings, count: int, size: tuple[int, ...], engine: Engine
) -> list[Tensor]:
    """Random crops or clips, (B, C, *size) each."""
    shape = (config.batch_size, config.channels, *size)
    return [torch.randn(shape, device=engine.device) for _ in range(count)]


def engine_of(config: BenchStepSettings) -> Engine:
    """Where it is computed; on a processor by the product that a run would begin with."""
    engine = Engine(config.device, precision=config.precision)
    if engine.device.type == "cpu" and engine.precision == "fp32":
        engine.product = measured_product()
    return engine


def methods_asked(config: BenchStepSettings) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names of the methods in order, and for each the given settings that it has; UserError for
    names and settings that none has.
    """
    given = dict(config.method) if isinstance(config.method, dict) else {"name": config.method}
    names = given.pop("name", "mae")
    names = names.split(",") if isinstance(names, str) else [str(name) for name in names]
    names = list(dict.fromkeys(name.strip() for name in names))
    fields = {name: _settings_of(name).model_fields for name in names}
    everything = [field for own in fields.values() for field in own]
    for key, value in given.items():
        if key not in everything:
            near = did_you_mean(key, everything)
            none = f"no such setting of {' or '.join(names)}"
            raise UserError(f"method.{key}={shown(value)}: {none}{near}")
    return names, {
        name: {key: value for key, value in given.items() if key in fields[name]} for name in names
    }


def _settings_of(name: str) -> type[MethodSettings]:
    """The settings of a method; UserError where there is none of that name."""
    if name not in METHODS:
        near = did_you_mean(name, METHODS)
        raise UserError(f"method={name}: there is no such method, only {', '.join(METHODS)}{near}")
    return METHODS[name]


def build_method(name: str, options: Mapping[str, Any], config: BenchStepSettings) -> Method:
    """A method of these sizes, in training mode; UserError where there is none of that name."""
    settings = validate(_settings_of(name), options, where=f"the settings of method {name}")
    encoder = build_encoder(
        config.model,
        image_size=size_of(config),
        patch_size=config.patch_size,
        channels=config.channels,
        model_args=config.model_args,
        clip=(config.frames, config.tubelet),
    )
    method: Method = method_class(settings)(settings, encoder).train()
    return method


def contestants(
    name: str, method: Method, config: BenchStepSettings, engine: Engine
) -> list[Contestant]:
    """The method in mid-training, and at its first step where that does other work."""
    settings = TrainSettings.model_validate({"batch_size": config.batch_size, "warmup_epochs": 0})
    stepper = Stepper(method, engine, settings)
    clips = family_of(config.model).item is CLIP
    size = (config.frames, *size_of(config)) if clips else size_of(config)
    several, crops = method.config.multi_crop, config.crops
    views = random_images(config, NUM_GLOBAL if several else 1, size, engine)
    if several:
        local = (crops.local_size, crops.local_size)
        views += random_images(config, crops.num_local, local, engine)
    rows = torch.arange(config.batch_size, device=engine.device)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=engine.device).expand(config.batch_size, 4)
    batches = repeat(Batch(views, rows, whole, torch.zeros_like(rows, dtype=torch.bool)))
    state = [*method.parameters(), *method.buffers()]

    def at(title: str, step: int) -> Contestant:
        make = partial(stepper.make, Progress(step, RUN_LENGTH, 1), batches)
        return Contestant(title, make, stepper.optimizers, state)

    middle, start = at(name, RUN_LENGTH // 2), at(name, 0)
    if measure.count_flops(middle.step) == measure.count_flops(start.step):
        return [middle]
    return [at(f"{name} (mid-training)", RUN_LENGTH // 2), at(f"{name} (first step)", 0)]


# ---- what is read off them ----


def _facts(contestant: Contestant, device: torch.device) -> dict[str, Any]:
    """What does not depend on time: parameters, work, memory."""
    for _ in range(2):  # the first steps make the optimizer's state
        contestant.step()
    work = measure.count_flops(contestant.step)
    contestant.optimizers.zero_grad()
    resident = [*contestant.state, *optimizer_tensors(contestant.optimizers).values()]
    memory = sum(tensor.nbytes for tensor in resident)
    memory += measure.peak_bytes(contestant.step, device)
    return {
        "trained_parameters": sum(p.numel() for p in contestant.optimizers.params.values()),
        "gflop_per_step": _round(work / 1e9),
        "peak_memory_mb": _round(memory / 2**20),
    }


@dataclass(frozen=True)
class Race:
    """One number a round: FLOP/s of matrix products, and seconds per step of every contestant."""

    rates_by: dict[str, list[float]]
    times: dict[str, list[float]]

    @property
    def rates(self) -> list[float]:
        """The fastest product of each round."""
        return [max(rates) for rates in zip(*self.rates_by.values(), strict=True)]


def _race(taking_part: Sequence[Contestant], engine: Engine, rounds: int) -> Race:
    device = engine.device
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    products = measure.matmul_products(device, dtype)
    work = 2 * measure.matmul_side(device) ** 3
    # On a GPU one step is over before the clock is worth reading.
    repeats = 10 if device.type == "cuda" else 1
    race = Race({name: [] for name in products}, {each.name: [] for each in taking_part})
    for turn in range(rounds):
        for name, product in products.items():
            race.rates_by[name].append(work / measure.seconds(product, device, repeats))
        first = turn % len(taking_part)
        for each in [*taking_part[first:], *taking_part[:first]]:
            race.times[each.name].append(measure.seconds(each.step, device, repeats))
    return race


def _row(name: str, facts: Mapping[str, Any], race: Race, batch_size: int) -> dict[str, Any]:
    times = race.times[name]
    work = facts["gflop_per_step"] * 1e9

    def share(rates: Sequence[float]) -> float:
        return _round(median(work / t / rate for t, rate in zip(times, rates, strict=True)))

    return {
        "name": name,
        "ms_per_step": _round(median(times) * 1e3),
        "images_per_second": _round(batch_size / median(times)),
        **facts,
        "gflops": _round(work / median(times) / 1e9),
        "share_of_matmul": {product: share(rates) for product, rates in race.rates_by.items()},
        "ms_of_each_round": [_round(t * 1e3) for t in times],
    }


def _ratios(times: Mapping[str, Sequence[float]], rivals: Sequence[str]) -> dict[str, float]:
    """Median ratio of the times of one round: every method by the first, and by every rival."""
    names = [name for name in times if name not in rivals]
    pairs = [(name, names[0]) for name in names[1:]]
    pairs += [(name, rival) for rival in rivals for name in names]

    def ratio(one: str, other: str) -> float:
        return _round(median(a / b for a, b in zip(times[one], times[other], strict=True)))

    return {f"{one} / {other}": ratio(one, other) for one, other in pairs}


def _round(number: float) -> float:
    """Four significant digits; a fifth is noise."""
    return float(f"{number:.4g}")


def _command(config: BenchStepSettings) -> str:
    def word(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    words = ["patchmine bench step"]
    for key in sorted(config.model_fields_set):
        value = getattr(config, key)
        inner = value.items() if isinstance(value, dict) else [("name", value)]
        words += [f"{key}{'' if name == 'name' else f'.{name}'}={word(v)}" for name, v in inner]
    return " ".join(words)


def as_lines(result: Mapping[str, Any]) -> list[str]:
    """A result in lines for people."""
    machine, settings, product = result["hardware"], result["settings"], result["matmul"]
    on = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    by = ", ".join(f"{name} {rate:,.0f}" for name, rate in product["gflops_by"].items())
    side, rounds = product["side"], settings["rounds"]
    lines = [
        f"{settings['model']}, image_size {settings['image_size']}, "
        f"batch {settings['batch_size']}, {settings['precision']}, {on}"
        f"{', matrices by oneDNN' if settings['product'] == 'onednn' else ''}",
        f"matrix product {side} x {side}: {product['gflops']:,.0f} GFLOP/s ({by})",
        f"{'':24}{'ms/step':>9}{'samples/s':>10}{'memory MB':>11}{'GFLOP/step':>12}{'GFLOP/s':>9}"
        + "".join(f"{f'of {name}':>13}" for name in product["gflops_by"]),
    ]
    lines += [
        f"{row['name']:24}{row['ms_per_step']:9,.1f}{row['images_per_second']:10,.1f}"
        f"{row['peak_memory_mb']:11,.0f}{row['gflop_per_step']:12,.1f}{row['gflops']:9,.0f}"
        + "".join(f"{share:13.0%}" for share in row["share_of_matmul"].values())
        for row in result["contestants"]
    ]
    if settings["profile"]:
        kinds = result["contestants"][0]["time_by_kind"]
        lines.append(f"{'time in operators':24}" + "".join(f"{kind:>11}" for kind in kinds))
        lines += [
            f"{row['name']:24}" + "".join(f"{s:11.1%}" for s in row["time_by_kind"].values())
            for row in result["contestants"]
        ]
    for pair, ratio in result["ratios"].items():
        one, other = pair.split(" / ")
        lines.append(f"{one} takes {ratio:.2f} times as long as {other} (median of {rounds})")
    return lines
