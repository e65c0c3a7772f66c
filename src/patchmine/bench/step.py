"""`patchmine bench step`: what a training step costs, methods against each other and against transformers' MAE.

The contestants take turns, step by step, so that whatever else the machine does meets all of them alike.  Reported are
medians over the rounds, and for a comparison the median of the rounds' ratios.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from patchmine.bench.measure import count_flops, hardware, matmul_flops_per_second, matmul_side, peak_bytes, seconds
from patchmine.errors import UserError
from patchmine.method import Method
from patchmine.methods import METHODS
from patchmine.mistakes import validate
from patchmine.models.vit import build_encoder
from patchmine.types import Batch, ParamGroup, Progress
from patchmine.words import did_you_mean, shown

# A long imaginary run, so that its first step is as early as can be whatever a schedule counts in.
RUN_LENGTH = 1000


class StepBench(BaseModel):
    """Settings of `patchmine bench step`."""

    model_config = ConfigDict(extra="forbid")
    method: str | list[str] | dict[str, Any] = Field(
        "mae", description="one method, or several as mae,hpm; method.KEY=VALUE sets KEY of every method that has it"
    )
    against: str | None = Field(
        None, description="also time `transformers` (ViTMAEForPreTraining, same sizes) or another method"
    )
    model: str = Field("vit_small_patch16_224", description="any plain ViT of timm's")
    model_args: dict[str, Any] = Field(default_factory=dict, description="extra arguments for timm, such as depth")
    image_size: int | tuple[int, int] = Field(224, description="side, or height and width, in pixels")
    patch_size: int | None = Field(None, gt=0, description="side of a patch; null: the model's own")
    channels: int = Field(3, gt=0)
    batch_size: int = Field(16, gt=0, description="images in one step")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    rounds: int = Field(10, gt=0, description="rounds in which every contestant takes its turn")
    out: Path | None = Field(None, description="JSON file for the result")


@dataclass(frozen=True)
class Contestant:
    """Something that trains: ``loss`` is one forward pass, ``after`` what follows an update."""

    name: str
    module: nn.Module
    groups: Sequence[ParamGroup]
    loss: Callable[[], Tensor]
    after: Callable[[], None]


def bench_step(*, say: Callable[[str], None], **settings: Any) -> dict[str, Any]:
    """Time whole training steps on random images: forward, backward, clipping, fused AdamW, what the method does then.

    ``settings`` are those of `StepBench`.  A method whose first step does other work than one in mid-training (nothing
    hard to look for yet) is timed at both.  Returns what is also written to ``out``: settings, hardware, the rate of a
    large matrix product measured between the steps, and for each contestant time, memory, work, rate and share of that
    product's rate.

    Raises UserError for wrong settings, and where transformers is asked for but not installed.
    """
    config = validate(StepBench, settings, where="the settings of bench step")
    device, dtype = _device(config), _dtype(config)
    torch.manual_seed(0)
    contestants = _contestants(config, device)
    steps = {contestant.name: _training_step(contestant, device, dtype) for contestant in contestants}
    say(f"{len(steps)} contestants, {config.rounds} rounds of one turn each; first a few steps that do not count.")
    facts = {
        name: _facts(contestant, step, device)
        for contestant, (name, step) in zip(contestants, steps.items(), strict=True)
    }
    rates, times = _race(steps, device, dtype, config.rounds)

    result = {
        "command": _command(config),
        "hardware": hardware(device),
        "settings": {
            **config.model_dump(mode="json", exclude={"out"}),
            "device": device.type,
            "precision": _short(dtype),
        },
        "matmul": {"side": matmul_side(device), "dtype": _short(dtype), "gflops": _round(median(rates) / 1e9)},
        "contestants": [_row(name, facts[name], times[name], rates, config.batch_size) for name in steps],
        "ratios": _ratios(times, config.against),
    }
    for line in describe(result):
        say(line)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"Written to {config.out}")
    return result


def _device(config: StepBench) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here: use device=cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(config: StepBench) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if _device(config).type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _short(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


# ---- who takes part ----


def _contestants(config: StepBench, device: torch.device) -> list[Contestant]:
    names, options = _methods(config)
    images = torch.randn(config.batch_size, config.channels, *_size(config), device=device)
    found = [entry for name in names for entry in _method_contestants(name, options[name], config, images)]
    if config.against == "transformers":
        found.append(_transformers_contestant(found[0].module, config, images))
    return found


def _size(config: StepBench) -> tuple[int, int]:
    return (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size


def _methods(config: StepBench) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names of the methods in order, and for each the given settings that it has."""
    given = dict(config.method) if isinstance(config.method, dict) else {"name": config.method}
    names = given.pop("name", "mae")
    names = list(names.split(",") if isinstance(names, str) else names)
    if config.against not in (None, "transformers"):
        names.append(config.against)
    names = list(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in METHODS:
            near = did_you_mean(name, [*METHODS, "transformers"])
            raise UserError(f"method={name}: there is no such method, only {', '.join(METHODS)}{near}")
    classes: dict[str, Any] = dict(METHODS)
    fields = {name: classes[name].Config.model_fields for name in names}
    for key in given:
        if not any(key in own for own in fields.values()):
            near = did_you_mean(key, [other for own in fields.values() for other in own])
            raise UserError(f"method.{key}={shown(given[key])}: {' and '.join(names)} have no such setting{near}")
    return names, {name: {key: value for key, value in given.items() if key in fields[name]} for name in names}


def _method_contestants(name: str, options: Mapping[str, Any], config: StepBench, images: Tensor) -> list[Contestant]:
    """The method in mid-training, and at its first step where that does other work."""
    method_class: Any = METHODS[name]
    settings = validate(method_class.Config, options, where=f"the settings of method {name}")
    encoder = build_encoder(
        config.model,
        image_size=_size(config),
        patch_size=config.patch_size,
        channels=config.channels,
        model_args=config.model_args,
    )
    method: Method = method_class(settings, encoder).to(images.device).train()
    rows = torch.arange(len(images), device=images.device)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0], device=images.device).expand(len(images), 4)
    batch = Batch([images], rows, box, torch.zeros_like(rows, dtype=torch.bool))

    def at(title: str, step: int) -> Contestant:
        progress = Progress(step, RUN_LENGTH, 1)
        loss = partial(_method_loss, method, batch, progress)
        return Contestant(title, method, method.param_groups(), loss, partial(method.after_step, progress))

    middle, start = at(name, RUN_LENGTH // 2), at(name, 0)
    if count_flops(middle.loss) == count_flops(start.loss):
        return [middle]
    return [at(f"{name} (mid-training)", RUN_LENGTH // 2), at(f"{name} (first step)", 0)]


def _method_loss(method: Method, batch: Batch, progress: Progress) -> Tensor:
    method.noise.begin(progress.step)
    return method(batch, progress)["loss"]


def _transformers_contestant(ours: Any, config: StepBench, images: Tensor) -> Contestant:
    """transformers' ViTMAEForPreTraining with the sizes of our model and the settings of our decoder."""
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        raise UserError(
            "against=transformers needs the package transformers: pip install 'patchmine[export]'"
        ) from error
    settings = ours.config
    encoder = ours.encoder
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
            decoder_intermediate_size=4 * settings.decoder_embed_dim,
            mask_ratio=settings.mask_ratio,
            norm_pix_loss=settings.norm_pix_loss,
            attn_implementation="sdpa",
        )
    )
    theirs = theirs.to(images.device).train()
    group = ParamGroup([(name, p) for name, p in theirs.named_parameters() if p.requires_grad])
    return Contestant("transformers", theirs, [group], lambda: theirs(images).loss, lambda: None)


# ---- the step, and what is read off it ----


def _training_step(contestant: Contestant, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward, clipping where the method asks for it, fused AdamW, and what follows an update."""
    parameters = [[p for _, p in group.params] for group in contestant.groups]
    decays = [0.05, 0.0]
    matrices_and_vectors = [[p for part in parameters for p in part if (p.ndim > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": part, "weight_decay": decay} for part, decay in zip(matrices_and_vectors, decays, strict=True)],
        lr=1e-5,
        betas=(0.9, 0.95),
        fused=True,
    )

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = contestant.loss()
        loss.backward()
        for group, part in zip(contestant.groups, parameters, strict=True):
            if group.clip_norm is not None:
                nn.utils.clip_grad_norm_(part, group.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        contestant.after()

    return step


def _facts(contestant: Contestant, step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """What does not depend on time: parameters, work, memory.  The first step makes the optimizer's state."""
    for _ in range(2):
        step()
    trained = [p for group in contestant.groups for _, p in group.params]
    kept = [*contestant.module.parameters(), *contestant.module.buffers()]
    # Weights, and AdamW's two averages of every trained one, stay from step to step.
    resident = sum(t.nbytes for t in kept) + 2 * sum(p.nbytes for p in trained)
    return {
        "trained_parameters": sum(p.numel() for p in trained),
        "gflop_per_step": _round(count_flops(step) / 1e9),
        "peak_memory_mb": _round((resident + peak_bytes(step, device)) / 2**20),
    }


def _race(
    steps: Mapping[str, Callable[[], None]], device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Rates of the matrix product (one a round) and seconds per step of each contestant (one a round)."""
    product = matmul_flops_per_second(device, dtype)
    # On a GPU one step is over before the clock is worth reading.
    repeats = 10 if device.type == "cuda" else 1
    rates: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(rounds):
        rates.append(product())
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            times[name].append(seconds(steps[name], device, repeats))
    return rates, times


def _row(
    name: str, facts: Mapping[str, Any], times: Sequence[float], rates: Sequence[float], batch_size: int
) -> dict[str, Any]:
    middle = median(times)
    work = facts["gflop_per_step"] * 1e9
    return {
        "name": name,
        "ms_per_step": _round(middle * 1e3),
        "images_per_second": _round(batch_size / middle),
        **facts,
        "gflops": _round(work / middle / 1e9),
        "share_of_matmul": _round(median(work / t / rate for t, rate in zip(times, rates, strict=True))),
        "ms_of_each_round": [_round(t * 1e3) for t in times],
    }


def _ratios(times: Mapping[str, Sequence[float]], against: str | None) -> dict[str, float]:
    """Median ratio of the times of one round: every contestant by the first, and the first by transformers'."""
    names = list(times)
    pairs = [(name, names[0]) for name in names[1:] if name != "transformers"]
    if against == "transformers":
        pairs.append((names[0], "transformers"))
    return {f"{a} / {b}": _round(median(x / y for x, y in zip(times[a], times[b], strict=True))) for a, b in pairs}


def _round(number: float) -> float:
    """Four significant digits; a fifth is noise."""
    return float(f"{number:.4g}")


def _command(config: StepBench) -> str:
    words = ["patchmine bench step"]
    for key in sorted(config.model_fields_set):
        value = getattr(config, key)
        if isinstance(value, dict):
            words += [key + ("=" if part == "name" else f".{part}=") + _word(inner) for part, inner in value.items()]
        else:
            words.append(f"{key}={_word(value)}")
    return " ".join(words)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def describe(result: Mapping[str, Any]) -> list[str]:
    """A result in lines for people."""
    machine, settings, product = result["hardware"], result["settings"], result["matmul"]
    on = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"{settings['model']}, image_size {settings['image_size']}, batch {settings['batch_size']}, "
        f"{settings['precision']}, {on}",
        f"matrix product {product['side']} x {product['side']} in {product['dtype']}: {product['gflops']:,.0f} GFLOP/s",
        f"{'':24}{'ms/step':>9}{'images/s':>10}{'memory MB':>11}{'GFLOP/step':>12}{'GFLOP/s':>9}{'of matmul':>11}",
    ]
    lines += [
        f"{row['name']:24}{row['ms_per_step']:9,.1f}{row['images_per_second']:10,.1f}{row['peak_memory_mb']:11,.0f}"
        f"{row['gflop_per_step']:12,.1f}{row['gflops']:9,.0f}{row['share_of_matmul']:11.0%}"
        for row in result["contestants"]
    ]
    for pair, ratio in result["ratios"].items():
        one, other = pair.split(" / ")
        lines.append(f"{one} takes {ratio:.2f} times as long as {other} (median of {settings['rounds']} rounds)")
    return lines
