"""Who multiplies a run's matrices on a processor: measured where it begins, and kept to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchmine
from fixtures.small_runs import DECODER, SMALL, VIT
from patchmine.models.onednn import onednn_usable
from patchmine.train.checkpoint import list_checkpoints, load_newest
from patchmine.train.engine import Engine
from patchmine.training import place

pytestmark = pytest.mark.skipif(
    not onednn_usable(), reason="this build of torch has no oneDNN product"
)
SETTINGS = {**VIT, **DECODER, **SMALL, "steps": 4, "checkpoint_every": 2}


def unmeasured() -> str:
    raise AssertionError("measured again")


@pytest.mark.bitwise
def test_a_resumed_run_multiplies_as_it_began(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: Callable[[Path], dict[str, Tensor]],
) -> None:
    monkeypatch.setattr(place, "measured_product", lambda: "onednn")
    said: list[str] = []
    given = {**SETTINGS, "say": said.append}
    run = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **given)
    assert any(line.endswith("fp32 on 1 x cpu, matrices by oneDNN") for line in said)
    whole = weights(run.path)
    list_checkpoints(run.checkpoint_dir)[-1].unlink()
    monkeypatch.setattr(place, "measured_product", unmeasured)
    monkeypatch.setattr(place, "usual_product", unmeasured)
    patchmine.resume(run.path, say=said.append)
    again = weights(run.path)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    lines = (run.path / "origin.jsonl").read_text().splitlines()
    assert [json.loads(line)["product"] for line in lines] == ["onednn", "onednn"]


@pytest.mark.parametrize("usual", ["torch", "onednn"])
def test_a_run_of_an_earlier_version_goes_on_as_usual_for_its_processor(
    usual: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "measured_product", lambda: "torch")  # whatever is faster here
    run = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **SETTINGS)
    start = load_newest(run.checkpoint_dir, lambda _: None)
    engine, config = Engine("cpu"), run.whole_config
    monkeypatch.setattr(place, "usual_product", lambda: usual)
    monkeypatch.setattr(place, "measured_product", unmeasured)
    assert place.product_of(config, engine, start) == start.facts.pop("product") == "torch"
    assert place.product_of(config, engine, start) == usual


def test_in_bf16_attention_is_exact_but_in_runs_that_began_otherwise(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "measured_product", unmeasured)
    given = {**SETTINGS, "precision": "bf16"}
    run = patchmine.pretrain(data=image_folder, out=tmp_path / "run", **given)
    start = load_newest(run.checkpoint_dir, lambda _: None)
    engine, config = Engine("cpu", precision="bf16"), run.whole_config
    assert place.product_of(config, engine, start) == "float-attention"
    del start.facts["product"]
    assert place.product_of(config, engine, start) == "torch"
    assert place.product_of(config, engine, None) == "float-attention"


def test_a_budget_is_timed_with_the_product_of_the_run(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "measured_product", lambda: "onednn")
    used: list[str] = []
    wrap = Engine.wrap

    def noted(engine: Engine, *args: Any, **keywords: Any) -> Any:
        used.append(engine.product)
        return wrap(engine, *args, **keywords)

    monkeypatch.setattr(Engine, "wrap", noted)
    monkeypatch.setattr("patchmine.train.engine.usual_product", lambda _: "torch")
    given = {key: value for key, value in SETTINGS.items() if key not in ("steps", "epochs")}
    patchmine.pretrain(data=image_folder, out=tmp_path / "run", budget="2s", **given)
    assert used == ["onednn", "onednn"]  # the steps that are timed, and the run's
