"""Where the time of a step goes, by kind of operator."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import torch

_STEPS = 2

KINDS = {
    "products": r"mm|addmm|bmm|baddbmm|addmv|mv|dot|linear|.*linear_pointwise|.*convolution.*",
    "attention": r".*scaled_dot_product.*|.*flash_attention.*|_?softmax.*|_efficient_attention.*",
    "copies": r"copy_|clone|cat|stack|index.*|_index.*|gather.*|scatter.*|fill_.*|zero_|zeros.*|"
    r"repeat.*|masked_fill.*|constant_pad.*|roll",
    "activation": r".*gelu.*|.*relu.*|silu.*|.*sigmoid.*|tanh.*",
    "norm": r".*(layer|batch|group|rms)_norm.*",
    "update": r"_fused_.*|_foreach_.*|linalg_vector_norm|lerp.*|_amp_.*",
}
"""Names of torch's operators, without library and overload; what none knows is the rest."""


def kind_of(operator: str) -> str:
    """The key of `KINDS` under which an operator such as ``aten::mm`` falls, or "rest"."""
    name = operator.rsplit("::", 1)[-1]
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), "rest")


def time_by_kind(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Shares of the time of a few steps in torch's operators, of `KINDS` in order and "rest".

    On a GPU its own time, on a processor that of the host, Python between operators left out.
    """
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's, about itself
        with torch.profiler.profile(activities=kinds) as profiled:
            for _ in range(_STEPS):
                step()
            if on_gpu:
                torch.cuda.synchronize(device)
    times = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiled.key_averages():
        if "::" in event.key and not event.key.startswith("autograd::"):
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[kind_of(event.key)] += spent
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}
