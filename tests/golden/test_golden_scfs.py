"""SCFS against numbers of the reference implementation, and of an oracle in float64."""

from __future__ import annotations

import re

import pytest
import torch
from golden_vectors import Golden, batch_of, load_golden, normalised_crops, tiny_resnet

from patchmine.backbones.family import stage_features
from patchmine.methods.scfs import SCFS, search
from patchmine.ops.distill import teacher_temperature
from patchmine.types import Progress

pytestmark = pytest.mark.golden

STAGES = {"l2": "layer2", "l3": "layer3", "l4": "layer4"}  # the published ones
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("scfs")


@pytest.fixture
def method(golden: Golden) -> SCFS:
    return build(golden)


@pytest.fixture
def progress(golden: Golden) -> Progress:
    return Progress(golden.config["epoch"], golden.config["epochs"], 1)


def own_name(name: str) -> str:
    """Our name for a parameter of the reference's student or teacher."""
    name = name.replace("backbone.model.", "encoder.")
    return re.sub(r"^layer(\d)_head", lambda found: f"stage_heads.{int(found[1]) - 2}", name)


def build(golden: Golden) -> SCFS:
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
    built = SCFS(config, tiny_resnet(c["channels"], c["global_size"]))
    state = {}
    for prefix, own in (("student.", ""), ("teacher.", "teacher.")):
        for name, tensor in golden.under(prefix).items():
            if not ("_head." in name and name.endswith(RUNNING)):
                state[own + own_name(name)] = tensor
    centres = ["centre.mean", *(f"stage_centres.{place}.mean" for place in range(len(STAGES)))]
    for own, stored in zip(centres, ("final", *STAGES), strict=True):
        state[own] = golden[f"center_before.{stored}"][0]
    built.load_state_dict(state)  # nothing missing, nothing left over
    return built.train()


def test_temperature(golden: Golden, progress: Progress) -> None:
    c = golden.config
    found = teacher_temperature(
        progress, start=c["warmup_teacher_temp"], end=c["teacher_temp"], warmup_epochs=c["warm"]
    )
    golden.check_number(found, golden.meta["teacher_temp_at_epoch"], "temperature")


@pytest.mark.parametrize("stage", STAGES)
def test_search_in_stored_maps(golden: Golden, method: SCFS, stage: str) -> None:
    """No backbone: the student's maps ask, the teacher's answer, its head makes targets of that."""
    maps = golden[f"act.fmap_t_{stage}"]
    head = method.teacher.stage_heads[list(STAGES).index(stage)]
    first = maps[: golden.config["batch"]]
    attention = search(golden[f"act.fmap_s_local_{stage}"], first)
    golden.check(
        (attention[:, :, None] * first).flatten(0, 1), f"oracle.search_fmap_{stage}", "attention"
    )
    whole, found = head(maps), head(first, attention)
    for source in [source for source in ("oracle", "act") if f"{source}.att_{stage}" in golden]:
        golden.check(attention.flatten(0, 1), f"{source}.att_{stage}", "attention")
        golden.check(whole, f"{source}.t_{stage}_global", "tokens")
        golden.check(found, f"{source}.t_{stage}_search", "tokens")


def test_maps_and_heads_from_the_images(golden: Golden, method: SCFS) -> None:
    views, stages = normalised_crops(golden), list(STAGES.values())
    large, small = torch.cat(views[:2]), torch.cat(views[2:])
    known = stage_features(method.teacher.encoder, large, stages)
    seen, searching = (
        stage_features(method.encoder, large, stages),
        stage_features(method.encoder, small, stages),
    )
    golden.check(method.teacher.head(known.pooled), "act.t_final", "tokens")
    golden.check(method.head(torch.cat([seen.pooled, searching.pooled])), "act.s_final", "tokens")
    for place, stage in enumerate(STAGES):
        golden.check(known.maps[place], f"act.fmap_t_{stage}", "tokens")
        golden.check(searching.maps[place], f"act.fmap_s_local_{stage}", "tokens")
        golden.check(method.stage_heads[place](seen.maps[place]), f"act.s_{stage}_global", "tokens")
        golden.check(
            method.stage_heads[place](searching.maps[place]), f"act.s_{stage}_local", "tokens"
        )


def test_losses_gradients_and_centres(golden: Golden, method: SCFS, progress: Progress) -> None:
    losses = method(batch_of(*normalised_crops(golden)), progress)
    names = {"loss": "total", "dino": "final"}
    for stored, stage in STAGES.items():
        names |= {f"global_{stage}": f"{stored}_global", f"search_{stage}": f"{stored}_local"}
    for own, stored in names.items():
        golden.check_number(losses[own], golden[f"oracle.loss.{stored}"].item())
        golden.check_number(losses[own], golden.meta["losses_float64"][stored])

    losses["loss"].backward()
    golden.check_gradients(dict(method.named_parameters()), golden.under("grad."), own_name)
    assert all(p.grad is None for p in method.teacher.parameters())

    method.after_step(progress)
    for centre, stored in zip(
        (method.centre, *method.stage_centres), ("final", *STAGES), strict=True
    ):
        golden.check(centre.mean[None], f"center_after.{stored}", "statistics")
