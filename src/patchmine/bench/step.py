"""`patchmine bench step`: what a training step costs, methods against each other, transformers'
MAE, or DINO.

The contestants take turns, step by step, so that whatever else the machine does meets all of them
alike.  Reported are medians over the rounds, and for a comparison the median of the rounds' ratios.
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

from patchmine.backbones.family import build_encoder
from patchmine.backbones.names import reads_clips
from patchmine.bench.measure import (
    count_flops,
    hardware,
    matmul_products,
    matmul_side,
    peak_bytes,
    seconds,
)
from patchmine.bench.settings import BenchStepSettings
from patchmine.config.explain import did_you_mean, shown, validate
from patchmine.data.views.images import NUM_GLOBAL
from patchmine.errors import UserError
from patchmine.methods import METHODS, method_class
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.optim import Optimizers, build_optimizers, optimizer_tensors
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, ParamGroup, Progress

# A long imaginary run, so that its first step is as early as can be whatever a schedule counts in.
RUN_LENGTH = 1000
OTHERS = ("transformers", "dino")
"""Opponents that are no methods of ours."""


@dataclass(frozen=True)
class Contestant:
    """Something that trains: ``step`` is one whole step, ``state`` what stays in memory from one to
    the next.
    """

    name: str
    step: Callable[[], object]
    optimizers: Optimizers
    state: Sequence[Tensor]


def bench_step(*, say: Callable[[str], None], **settings: Any) -> dict[str, Any]:
    """Time whole training steps on random images, as a run makes them: forward, backward, fused
    AdamW, what comes then.

    ``settings`` are those of `BenchStepSettings`.  A method whose first step does other work than one in
    mid-training (nothing hard to look for yet) is timed at both.  Returns what is also written to
    ``out``: settings, hardware, the rate of a large matrix product measured between the steps, and
    for each contestant time, memory, work, rate and share of that product's rate.

    Raises UserError for wrong settings, and where transformers is asked for but not installed.
    """
    config = validate(BenchStepSettings, settings, where="the settings of bench step")
    names, options = _methods(config)
    engine = Engine(config.device, precision=config.precision)
    torch.manual_seed(0)
    contestants = _contestants(names, options, config, engine)
    say(
        f"{len(contestants)} contestants, {config.rounds} rounds of one turn each; first a few steps that do not count."
    )
    facts = {contestant.name: _facts(contestant, engine.device) for contestant in contestants}
    race = _race(contestants, engine, config.rounds)
    result = {
        "command": _command(config),
        "hardware": hardware(engine.device),
        "settings": {
            **config.model_dump(mode="json", exclude={"out"}),
            "device": engine.device.type,
            "precision": engine.precision,
        },
        "matmul": {
            "side": matmul_side(engine.device),
            "gflops": _round(median(race.rates) / 1e9),
            "gflops_by": {
                name: _round(median(rates) / 1e9) for name, rates in race.rates_by.items()
            },
        },
        "contestants": [_row(name, facts[name], race, config.batch_size) for name in facts],
        "ratios": _ratios(race.times, config.against),
    }
    for line in describe(result):
        say(line)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"Written to {config.out}")
    return result


# ---- who takes part ----


def _contestants(
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    config: BenchStepSettings,
    engine: Engine,
) -> list[Contestant]:
    methods = {name: _build_method(name, options[name], config) for name in names}
    found = [
        entry
        for name in names
        for entry in _method_contestants(name, methods[name], config, engine)
    ]
    if config.against == "transformers":
        if reads_clips(config.model):
            raise UserError(
                "against=transformers times ViTMAE, which is for images: leave it out, or choose a method"
            )
        found.append(_transformers_contestant(methods[names[0]], config, engine))
    if config.against == "dino":
        # What is left of SCFS without its stages is DINO, of the same blocks as every other
        # contestant.
        dino = _build_method("scfs", {**_known("scfs", options), "stage_weights": 0.0}, config)
        found += _method_contestants("dino", dino, config, engine)
    return found


def _known(name: str, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of the settings that any contestant got, those that this method has."""
    fields = METHODS[name].model_fields
    return {
        key: value for given in options.values() for key, value in given.items() if key in fields
    }


def _random(
    config: BenchStepSettings, count: int, size: tuple[int, ...], engine: Engine
) -> list[Tensor]:
    """Random crops or clips, (B, C, *size) each."""
    return [
        torch.randn(config.batch_size, config.channels, *size, device=engine.device)
        for _ in range(count)
    ]


def _size(config: BenchStepSettings) -> tuple[int, int]:
    return (
        (config.image_size, config.image_size)
        if isinstance(config.image_size, int)
        else config.image_size
    )


def _methods(config: BenchStepSettings) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names of the methods in order, and for each the given settings that it has."""
    given = dict(config.method) if isinstance(config.method, dict) else {"name": config.method}
    names = given.pop("name", "mae")
    names = names.split(",") if isinstance(names, str) else [str(name) for name in names]
    if config.against not in (None, *OTHERS):
        names.append(config.against)
    names = list(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in METHODS:
            near = did_you_mean(name, [*METHODS, *OTHERS])
            raise UserError(
                f"method={name}: there is no such method, only {', '.join(METHODS)}{near}"
            )
    fields = {name: METHODS[name].model_fields for name in names}
    for key in given:
        if not any(key in own for own in fields.values()):
            near = did_you_mean(key, [other for own in fields.values() for other in own])
            raise UserError(
                f"method.{key}={shown(given[key])}: {' and '.join(names)} have no such setting{near}"
            )
    return names, {
        name: {key: value for key, value in given.items() if key in fields[name]} for name in names
    }


def _build_method(name: str, options: Mapping[str, Any], config: BenchStepSettings) -> Method:
    settings = validate(METHODS[name], options, where=f"the settings of method {name}")
    encoder = build_encoder(
        config.model,
        image_size=_size(config),
        patch_size=config.patch_size,
        channels=config.channels,
        model_args=config.model_args,
        clip=(config.frames, config.tubelet),
    )
    method: Method = method_class(settings)(settings, encoder).train()
    return method


def _method_contestants(
    name: str, method: Method, config: BenchStepSettings, engine: Engine
) -> list[Contestant]:
    """The method in mid-training, and at its first step where that does other work."""
    settings = TrainSettings.model_validate({"batch_size": config.batch_size, "warmup_epochs": 0})
    stepper = Stepper(method, engine, settings)
    size = (config.frames, *_size(config)) if reads_clips(config.model) else _size(config)
    views = _random(config, NUM_GLOBAL if method.config.multi_crop else 1, size, engine)
    if method.config.multi_crop:
        views += _random(
            config,
            config.crops.num_local,
            (config.crops.local_size, config.crops.local_size),
            engine,
        )
    rows = torch.arange(config.batch_size, device=engine.device)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=engine.device).expand(config.batch_size, 4)
    batches = repeat(Batch(views, rows, whole, torch.zeros_like(rows, dtype=torch.bool)))
    state = [*method.parameters(), *method.buffers()]

    def at(title: str, step: int) -> Contestant:
        make = partial(stepper.make, Progress(step, RUN_LENGTH, 1), batches)
        return Contestant(title, make, stepper.optimizers, state)

    middle, start = at(name, RUN_LENGTH // 2), at(name, 0)
    if count_flops(middle.step) == count_flops(start.step):
        return [middle]
    return [at(f"{name} (mid-training)", RUN_LENGTH // 2), at(f"{name} (first step)", 0)]


def _transformers_contestant(ours: Any, config: BenchStepSettings, engine: Engine) -> Contestant:
    """transformers' ViTMAEForPreTraining with the sizes of our model and the settings of our
    decoder.
    """
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        raise UserError(
            "against=transformers needs the package transformers: pip install 'patchmine[export]'"
        ) from error
    settings = ours.config
    encoder = ours.encoder
    (images,) = _random(config, 1, _size(config), engine)
    block = encoder.blocks[0]
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            layer_norm_eps=1e-6,
            image_size=_size(config),
            patch_size=encoder.patch_embed.patch_size[0],
            num_channels=config.channels,
            decoder_hidden_size=settings.decoder_embed_dim,
            decoder_num_hidden_layers=settings.decoder_depth,
            decoder_num_attention_heads=settings.decoder_num_heads,
            decoder_intermediate_size=ours.decoder.blocks[0].mlp.fc1.out_features,
            mask_ratio=settings.mask_ratio,
            norm_pix_loss=settings.norm_pix_loss,
            attn_implementation="sdpa",
        )
    )
    theirs = theirs.to(engine.device).train()
    trained = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
    optimizers = build_optimizers(
        [ParamGroup(trained)], weight_decay=0.05, blr=1.5e-4, betas=(0.9, 0.95)
    )

    def step() -> None:
        optimizers.zero_grad()
        with engine.autocast():
            loss = theirs(images).loss
        loss.backward()
        for optimizer in optimizers.by_name.values():
            optimizer.step()

    return Contestant("transformers", step, optimizers, [*theirs.parameters(), *theirs.buffers()])


# ---- what is read off them ----


def _facts(contestant: Contestant, device: torch.device) -> dict[str, Any]:
    """What does not depend on time: parameters, work, memory.  The first steps make the optimizer's
    state.
    """
    for _ in range(2):
        contestant.step()
    work = count_flops(contestant.step)
    contestant.optimizers.zero_grad()
    resident = [*contestant.state, *optimizer_tensors(contestant.optimizers).values()]
    memory = sum(tensor.nbytes for tensor in resident) + peak_bytes(contestant.step, device)
    return {
        "trained_parameters": sum(p.numel() for p in contestant.optimizers.params.values()),
        "gflop_per_step": _round(work / 1e9),
        "peak_memory_mb": _round(memory / 2**20),
    }


@dataclass(frozen=True)
class Race:
    """One number a round: rates of matrix products in FLOP/s, and seconds per step of every
    contestant.
    """

    rates_by: dict[str, list[float]]
    times: dict[str, list[float]]

    @property
    def rates(self) -> list[float]:
        """The fastest product of each round."""
        return [max(rates) for rates in zip(*self.rates_by.values(), strict=True)]


def _race(contestants: Sequence[Contestant], engine: Engine, rounds: int) -> Race:
    products = matmul_products(
        engine.device, torch.bfloat16 if engine.precision == "bf16" else torch.float32
    )
    work = 2 * matmul_side(engine.device) ** 3
    # On a GPU one step is over before the clock is worth reading.
    repeats = 10 if engine.device.type == "cuda" else 1
    race = Race(
        {name: [] for name in products}, {contestant.name: [] for contestant in contestants}
    )
    for turn in range(rounds):
        for name, product in products.items():
            race.rates_by[name].append(work / seconds(product, engine.device, repeats))
        first = turn % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            race.times[contestant.name].append(seconds(contestant.step, engine.device, repeats))
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


def _ratios(times: Mapping[str, Sequence[float]], against: str | None) -> dict[str, float]:
    """Median ratio of the times of one round: every method by the first.

    The first also by transformers' network, which has its sizes, and every one by DINO.
    """
    names = [name for name in times if name not in OTHERS]
    pairs = [(name, names[0]) for name in names[1:]]
    if against in OTHERS:
        pairs += [(name, against) for name in (names[:1] if against == "transformers" else names)]
    return {
        f"{a} / {b}": _round(median(x / y for x, y in zip(times[a], times[b], strict=True)))
        for a, b in pairs
    }


def _round(number: float) -> float:
    """Four significant digits; a fifth is noise."""
    return float(f"{number:.4g}")


def _command(config: BenchStepSettings) -> str:
    words = ["patchmine bench step"]
    for key in sorted(config.model_fields_set):
        value = getattr(config, key)
        if isinstance(value, dict):
            words += [
                key + ("=" if part == "name" else f".{part}=") + _word(inner)
                for part, inner in value.items()
            ]
        else:
            words.append(f"{key}={_word(value)}")
    return " ".join(words)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def describe(result: Mapping[str, Any]) -> list[str]:
    """A result in lines for people."""
    machine, settings, product = result["hardware"], result["settings"], result["matmul"]
    on = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    by = ", ".join(f"{name} {rate:,.0f}" for name, rate in product["gflops_by"].items())
    lines = [
        f"{settings['model']}, image_size {settings['image_size']}, batch {settings['batch_size']}, "
        f"{settings['precision']}, {on}",
        f"matrix product {product['side']} x {product['side']}: {product['gflops']:,.0f} GFLOP/s ({by})",
        f"{'':24}{'ms/step':>9}{'samples/s':>10}{'memory MB':>11}{'GFLOP/step':>12}{'GFLOP/s':>9}"
        + "".join(f"{f'of {name}':>13}" for name in product["gflops_by"]),
    ]
    lines += [
        f"{row['name']:24}{row['ms_per_step']:9,.1f}{row['images_per_second']:10,.1f}{row['peak_memory_mb']:11,.0f}"
        f"{row['gflop_per_step']:12,.1f}{row['gflops']:9,.0f}"
        + "".join(f"{share:13.0%}" for share in row["share_of_matmul"].values())
        for row in result["contestants"]
    ]
    for pair, ratio in result["ratios"].items():
        one, other = pair.split(" / ")
        lines.append(
            f"{one} takes {ratio:.2f} times as long as {other} (median of {settings['rounds']} rounds)"
        )
    return lines
