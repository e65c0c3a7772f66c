"""Every method's step as a GPU and torch.compile want it, without a GPU and without compiling.

Nothing mixes devices or waits for one, no graph breaks, and nothing is compiled anew because a
schedule has moved.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda.amp import common as amp

from fixtures.imaginary_gpu import draw_there, put_on
from fixtures.tiny_methods import (
    EARLY,
    LATE,
    NAMES,
    PATCHES,
    ROTARY,
    build,
    images,
    optimise,
    with_holes,
)
from patchmine.models.noise import Noise
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Batch, Progress

# Steps of 200 epochs.  Between the first two begin a step that is no constant any more, attention
# that guides, hard patches, the last temperature.
FIRST, LATER = (0, 250), (300, 301, 330, 351, 399)

# Ways to find what is hard that no default takes.
LOOKS = {
    "through masks": {"look": "masked", "predictor": "head", "num_looks": 2},
    "observed": {"look": "masked", "score": "observed", "target": "ema"},
    "every second epoch": {"look": "masked", "every": 2},
    "memory": {"look": "memory", "predictor": "head"},
    "cross-attention": {"look": "masked", "decoder_attention": "cross", "predicted_share": 0.5},
}

# Blocks of the encoders that are traced as one graph, every block anew.
DEPTH = 1

# torch looks at the .grad of what it traces.
AS_TORCH_TRACES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every method, and once more on clips and on a rotary encoder if it takes them."""
    return request.param


@pytest.fixture(params=[*(name for name in NAMES if ROTARY not in name), "hpm" + ROTARY])
def traced(request: pytest.FixtureRequest) -> str:
    """The same, one of them alone on a rotary encoder: tracing takes a while."""
    return request.param


@pytest.fixture(params=LOOKS.values(), ids=list(LOOKS))
def looking(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of HPM."""
    return request.param


def build_hpm(looking: dict[str, Any], depth: int = 2) -> Method:
    """HPM in its first epoch, with room for four items."""
    method = build("hpm", depth=depth, **looking)
    method.begin_epoch(EARLY, [images(method)] * 4)
    return method


@pytest.fixture(params=[EARLY, LATE], ids=["early", "late"])
def progress(request: pytest.FixtureRequest) -> Progress:
    return request.param


@pytest.fixture(scope="module")
def steps_on_a_gpu() -> dict[str, str]:
    """What each step said (`fixtures/imaginary_gpu.py`)."""
    program = Path(__file__).parent / "fixtures" / "imaginary_gpu.py"
    made = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=280, check=False
    )
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes it that there is a GPU with bf16."""
    monkeypatch.setattr(amp, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(Noise, "uniform", draw_there)


@pytest.mark.usefixtures("imagined")
def test_a_forward_pass_in_bf16_mixes_no_devices_and_asks_a_gpu_for_nothing(
    name: str, progress: Progress
) -> None:
    # Tensors without values, on a GPU that need not be there.  Not the backward pass, whose engine
    # asks CUDA itself.
    method, mode = build(name), FakeTensorMode()
    batch = put_on("cuda", method, images(method), mode)
    with mode:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = method(batch, progress)
        method.after_step(progress)
    assert {(loss.device.type, loss.dtype) for loss in found.values()} == {("cuda", torch.float32)}


@pytest.mark.usefixtures("imagined")
def test_looks_ask_a_gpu_for_nothing(looking: dict[str, Any]) -> None:
    method, mode = build_hpm(looking), FakeTensorMode()
    batch = put_on("cuda", method, images(method), mode)
    with mode:
        for progress in (LATE, LATE.at(LATE.step + 2)):  # an epoch in which every=2 looks not
            with torch.autocast("cuda", dtype=torch.bfloat16):
                found = method(batch, progress)
            method.after_step(progress)
    assert {(loss.device.type, loss.dtype) for loss in found.values()} == {("cuda", torch.float32)}


@pytest.mark.usefixtures("imagined")
@pytest.mark.parametrize("name", PATCHES)
def test_missing_pixels_ask_a_gpu_for_nothing(name: str, progress: Progress) -> None:
    method, mode = build(name), FakeTensorMode()
    batch = put_on("cuda", method, with_holes(images(method)), mode)
    with mode, torch.autocast("cuda", dtype=torch.bfloat16):
        found = method(batch, progress)
    assert {(loss.device.type, loss.dtype) for loss in found.values()} == {("cuda", torch.float32)}


def test_a_whole_step_stays_on_its_gpu_and_its_optimizers_are_fused(
    steps_on_a_gpu: dict[str, str], name: str
) -> None:
    # Forward, backward, clipping, update, teacher and the counting of skipped steps.
    assert steps_on_a_gpu[name] == ""


@pytest.fixture
def traceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is of no graph is replaced, or left out."""
    monkeypatch.setattr(Noise, "uniform", draw_there)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes


def assert_one_graph(
    method: Method,
    twin: Method,
    first: tuple[int, ...],
    given: Callable[[Batch], Batch] = lambda batch: batch,
) -> None:
    """Compiled in its ``first`` steps alone, it computes what its twin computes uncompiled.

    ``given``: what becomes of the batch before.
    """
    torch._dynamo.reset()
    whole = torch.compile(method, backend="eager", fullgraph=True)
    for step in (*first, *LATER):
        progress = Progress(step, 400, 2)
        torch.manual_seed(step)
        expected = optimise(twin, given(images(twin)), progress)
        torch.manual_seed(step)
        with torch.compiler.set_stance("fail_on_recompile" if step in LATER else "default"):
            found = optimise(method, given(images(method)), progress, whole)
        assert torch.equal(found, expected), step  # nothing that moves has become a constant


@AS_TORCH_TRACES
@pytest.mark.usefixtures("traceable")
def test_a_compiled_method_is_one_graph_that_schedules_do_not_make_anew(traced: str) -> None:
    assert_one_graph(build(traced, depth=DEPTH), build(traced, depth=DEPTH), FIRST)


@AS_TORCH_TRACES
@pytest.mark.usefixtures("traceable")
def test_looks_are_one_graph_too(looking: dict[str, Any]) -> None:
    method, twin = (build_hpm(looking, DEPTH) for _ in range(2))
    assert_one_graph(method, twin, (0, 250, 252))


@AS_TORCH_TRACES
@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("name", [name for name in PATCHES if ROTARY not in name])
def test_missing_pixels_are_one_graph_too(name: str) -> None:
    assert_one_graph(build(name, depth=DEPTH), build(name, depth=DEPTH), FIRST, with_holes)


@AS_TORCH_TRACES
def test_compiled_blocks_are_compiled_in_the_first_steps_alone(
    traced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = partial(nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module))
    torch._dynamo.reset()
    method = build(traced)
    settings = TrainSettings(batch_size=4, compile=True)
    stepper = Stepper(method, Engine("cpu"), settings)
    for step in (*FIRST, *LATER):
        with torch.compiler.set_stance("fail_on_recompile" if step in LATER else "default"):
            stepper.make(Progress(step, 400, 2), repeat(images(method)))
    assert stepper.total_skipped() == 0
