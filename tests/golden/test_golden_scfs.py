"""SCFS against numbers of the reference implementation, and of an oracle in float64 (spec scfs.md, section 10)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from patchmine.methods.scfs import SCFS, search
from patchmine.ops.distill import teacher_temperature
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.golden

STAGES = ("layer2", "layer3", "layer4")
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("scfs")


@pytest.fixture
def method(golden: Any) -> SCFS:
    return build(golden)


@pytest.fixture
def progress(golden: Any) -> Progress:
    return Progress(golden.config["epoch"], golden.config["epochs"], 1)


def tiny_resnet(channels: list[int]) -> ResNet:
    """timm's ResNet with one block a stage; its stem, which is 64 wide whatever is asked for, as narrow as stored."""
    encoder = ResNet(BasicBlock, [1, 1, 1, 1], channels=tuple(channels), num_classes=0)
    encoder.conv1 = nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
    encoder.bn1 = nn.BatchNorm2d(channels[0])
    encoder.layer1 = nn.Sequential(BasicBlock(channels[0], channels[0]))
    return encoder


def own_name(name: str) -> str:
    """Our name for a parameter of the reference's student or teacher."""
    name = name.replace("backbone.model.", "encoder.")
    return re.sub(r"^layer(\d)_head", lambda found: f"stage_heads.{int(found[1]) - 2}", name)


def build(golden: Any) -> SCFS:
    """The method at the stored sizes with the stored student, teacher and centres."""
    c = golden.config
    config = SCFS.Config(
        out_dim=c["out_dim"],
        head_hidden=c["head_hidden"],
        head_bottleneck=c["head_bottleneck"],
        stage_out_dim=c["shallow_out"],
        stage_hidden=c["shallow_hidden"],
        stage_bottleneck=c["shallow_bottleneck"],
        teacher_temp_start=c["warmup_teacher_temp"],
        teacher_temp_end=c["teacher_temp"],
        teacher_temp_warmup_epochs=c["warm"],
    )
    built = SCFS(config, tiny_resnet(c["channels"]))
    state = {}
    for prefix, own in (("student.", ""), ("teacher.", "teacher.")):
        for name, tensor in golden.tensors.items():
            if name.startswith(prefix) and not ("_head." in name and name.endswith(RUNNING)):
                state[own + own_name(name.removeprefix(prefix))] = tensor
    centres = ["centre.mean", *(f"stage_centres.{place}.mean" for place in range(3))]
    for own, stored in zip(centres, ("final", "l2", "l3", "l4"), strict=True):
        state[own] = golden.tensors[f"center_before.{stored}"][0]
    built.load_state_dict(state)  # nothing missing, nothing left over
    return built.train()


def batch_of(golden: Any) -> Batch:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    count = 2 + golden.config["n_local"]
    views = [(golden.tensors[f"in.crop{i}_u8"] / 255 - mean) / std for i in range(count)]
    rows = len(views[0])
    return Batch(views, torch.arange(rows), torch.zeros(rows, count, 4), torch.zeros(rows, count, dtype=torch.bool))


def close(found: Tensor, golden: Any, name: str, bound: float) -> None:
    expected = golden.tensors[name].to(found.dtype)
    torch.testing.assert_close(found, expected, atol=bound, rtol=0, msg=lambda text: f"{name}: {text}")


def test_temperature(golden: Any, progress: Progress) -> None:
    found = teacher_temperature(progress, start=0.04, end=0.07, warmup_epochs=50)
    assert found == pytest.approx(golden.meta["teacher_temp_at_epoch"], abs=1e-12)


@pytest.mark.parametrize("place", range(3))
def test_search_in_stored_maps(golden: Any, method: SCFS, place: int) -> None:
    """No backbone: the student's maps ask, the teacher's answer, its head makes targets of that."""
    stage = f"l{place + 2}"
    maps = golden.tensors[f"act.fmap_t_{stage}"]
    head = method.teacher.stage_heads[place]
    close(head(maps), golden, f"oracle.t_{stage}_global", 5e-5)
    first = maps[: golden.config["batch"]]
    attention = search(golden.tensors[f"act.fmap_s_local_{stage}"], first)
    close(attention.flatten(0, 1), golden, f"oracle.att_{stage}", 2e-5)
    close((attention[:, :, None] * first).flatten(0, 1), golden, f"oracle.search_fmap_{stage}", 2e-5)
    close(head(first, attention), golden, f"oracle.t_{stage}_search", 5e-5)


def test_maps_and_heads_from_the_images(golden: Any, method: SCFS) -> None:
    from patchmine.models.features import extract

    views = batch_of(golden).views
    large, small = torch.cat(views[:2]), torch.cat(views[2:])
    taught = extract(method.teacher.encoder, large, STAGES)
    seen, searching = extract(method.encoder, large, STAGES), extract(method.encoder, small, STAGES)
    close(method.teacher.head(taught.pooled), golden, "act.t_final", 5e-5)
    close(method.head(torch.cat([seen.pooled, searching.pooled])), golden, "act.s_final", 5e-5)
    for place, stage in enumerate(("l2", "l3", "l4")):
        close(taught.maps[place], golden, f"act.fmap_t_{stage}", 5e-5)
        close(searching.maps[place], golden, f"act.fmap_s_local_{stage}", 5e-5)
        close(method.stage_heads[place](seen.maps[place]), golden, f"act.s_{stage}_global", 5e-5)
        close(method.stage_heads[place](searching.maps[place]), golden, f"act.s_{stage}_local", 5e-5)


def test_losses_gradients_and_centres(golden: Any, method: SCFS, progress: Progress) -> None:
    losses = method(batch_of(golden), progress)
    names = {"loss": "total", "dino": "final"}
    for stage in STAGES:
        names |= {f"global_{stage}": f"l{stage[-1]}_global", f"search_{stage}": f"l{stage[-1]}_local"}
    for own, stored in names.items():
        expected = golden.tensors[f"oracle.loss.{stored}"].item()
        assert losses[own].item() == pytest.approx(expected, rel=2e-5), own

    losses["loss"].backward()
    parameters = dict(method.named_parameters())
    stored_gradients = {name: t for name, t in golden.tensors.items() if name.startswith("grad.")}
    assert len(stored_gradients) == 8
    for name, expected in stored_gradients.items():
        found = parameters[own_name(name.removeprefix("grad."))].grad
        assert found is not None, name
        bound = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, atol=bound, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is None for p in method.teacher.parameters())

    method.after_step(progress)
    for centre, stored in zip((method.centre, *method.stage_centres), ("final", "l2", "l3", "l4"), strict=True):
        close(centre.mean[None], golden, f"center_after.{stored}", 1e-6)
