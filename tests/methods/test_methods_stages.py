"""SCFS and MOKD on ConvNeXts and Swin Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.stages import MODELS, TINY, encoder_of
from patchmine.backbones.family import build_encoder
from patchmine.methods.mokd import MOKD
from patchmine.methods.scfs import SCFS
from patchmine.models.droppath import DropPath
from patchmine.task import Method
from patchmine.types import Batch, Progress

NARROW = dict(out_dim=32, head_hidden=16, head_bottleneck=8)
STAGES = dict(stage_out_dim=12, stage_hidden=16, stage_bottleneck=8)
VIT = dict(embed_dim=24, depth=2, num_heads=2)
SIZES = (64, 64, 32, 32)


def scfs(kind: str) -> SCFS:
    return SCFS(SCFS.Config(**NARROW, **STAGES), encoder_of(kind))


def mokd(first: str, second: str, **options: Any) -> MOKD:
    """A pair of kinds; ``vit`` is a plain one."""
    encoder = (
        build_encoder("vit_tiny_patch16_224", image_size=(64, 64), patch_size=16, model_args=VIT)
        if first == "vit"
        else encoder_of(first)
    )
    partner: dict[str, Any] = {
        "partner_model": MODELS.get(second, "vit_tiny_patch16_224"),
        "partner_args": TINY.get(second, VIT),
    }
    options = {"thead_depth": 1, "thead_heads": 2, **NARROW, **partner, **options}
    return MOKD(MOKD.Config(**options), encoder)


def batch(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(count, 3, side, side, generator=generator) for side in SIZES]
    places = (count, len(views))
    return Batch(
        views, torch.arange(count), torch.zeros(*places, 4), torch.zeros(places, dtype=torch.bool)
    )


def learn(method: Method, steps: int = 20) -> list[Tensor]:
    values, progress = [], Progress(0, 400, 2)
    groups = [parameter for group in method.param_groups() for _, parameter in group.params]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    for step in range(steps):
        method.noise.begin(step)
        losses = method(batch(), progress)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(progress)
        values.append(losses["loss"].detach())
    return values


MADE = {
    **{f"scfs {kind}": (lambda kind=kind: scfs(kind)) for kind in MODELS},
    "mokd convnext swin": lambda: mokd("convnext", "swin", thead_width=16),
    "mokd vit convnext": lambda: mokd("vit", "convnext"),
    "mokd swinv2 vit": lambda: mokd("swinv2", "vit"),
}


@pytest.mark.parametrize("name", MADE)
def test_twenty_steps_lower_the_loss(name: str) -> None:
    values = torch.stack(learn(MADE[name]().train()))
    assert torch.isfinite(values).all()
    assert values[-3:].mean() < values[:3].mean()


@pytest.mark.parametrize("name", MADE)
def test_everything_that_learns_has_a_gradient(name: str) -> None:
    method = MADE[name]().train()
    method.noise.begin(0)
    method(batch(), Progress(350, 400, 2))["loss"].backward()
    dead = {n for n, p in method.learning() if p.grad is None or not p.grad.isfinite().all()}
    assert not dead


def test_stages_are_the_last_three() -> None:
    assert scfs("convnext").stages == ["stages.1", "stages.2", "stages.3"]
    assert scfs("swin").stages == ["layers.1", "layers.2", "layers.3"]


def test_they_are_trained_as_their_authors_train_them() -> None:
    """By AdamW; of a pair the ConvNeXt has the weights of the CNN, the Swin of the transformer."""
    pair = mokd("convnext", "swin", thead_width=16, drop_path=0.2)
    for method in (scfs("convnext"), scfs("swin"), pair):
        assert {group.optimizer for group in method.param_groups()} == {"adamw"}
    assert pair.cross_weights == [1.0, 0.1]
    assert [len(paths) for paths in pair.drop_paths] == [4, 10]  # none in the first of the blocks
    teacher = pair.partner_teacher.get_submodule("encoder")
    assert [part.rate for part in pair.partner.modules() if isinstance(part, DropPath)][-1] == 0.2
    assert teacher.state_dict().keys() == pair.partner.state_dict().keys()


def test_dropped_paths_are_of_the_step_and_not_of_the_order() -> None:
    encoder = build_encoder(
        MODELS["swin"], image_size=(64, 64), model_args={**TINY["swin"], "drop_path_rate": 0.5}
    )
    method = SCFS(SCFS.Config(**NARROW, **STAGES), encoder).train()
    found = []
    for step in (3, 4, 3):
        method.noise.begin(step)
        found.append(method(batch(), Progress(0, 400, 2))["loss"].item())
    assert found[0] == found[2] != found[1]
