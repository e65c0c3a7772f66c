"""SCFS's own promises (docs/methods/scfs.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, build_encoder, stage_features
from patchmine.errors import UserError
from patchmine.methods import scfs as scfs_file
from patchmine.methods.scfs import SCFS
from patchmine.models.heads import DinoHead
from patchmine.models.teacher import Teacher
from patchmine.ops.distill import sharpen, view_cross_entropy
from patchmine.ops.schedules import cosine_decay
from patchmine.types import Batch, Losses, Progress

IMAGES, LOCALS = 3, 3
EARLY, LATE = Progress(0, 200, 2), Progress(150, 200, 2)
NARROW = dict(
    **dict(out_dim=20, head_hidden=16, head_bottleneck=8),
    **dict(stage_out_dim=12, stage_hidden=16, stage_bottleneck=6),
)


def resnet() -> ResNet:
    return ResNet(
        BasicBlock, [1, 1, 1, 1], channels=(8, 12, 16, 24), num_classes=0, zero_init_last=False
    )


def vit(depth: int = 4) -> Encoder:
    args = dict(embed_dim=24, depth=depth, num_heads=2)
    return build_encoder("vit_tiny_patch16_224", image_size=(16, 16), patch_size=4, model_args=args)


def build(make: Callable[[], Encoder] = resnet, **options: Any) -> SCFS:
    torch.manual_seed(0)
    method = SCFS(SCFS.Config(**(NARROW | options)), make())
    with torch.no_grad():  # a teacher that is no copy, as it is after some steps
        for p in method.teacher.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return method.train()


def batch_of(views: list[Tensor]) -> Batch:
    rows, count = len(views[0]), len(views)
    return Batch(
        views,
        torch.arange(rows),
        torch.zeros(rows, count, 4),
        torch.zeros(rows, count, dtype=torch.bool),
    )


@pytest.fixture
def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sides = [64, 64, *[32] * LOCALS]
    return [torch.randn(IMAGES, 3, side, side, generator=generator) for side in sides]


def gradients(method: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def step(method: SCFS, views: list[Tensor], term: str = "loss") -> tuple[Losses, dict[str, Tensor]]:
    losses = method(batch_of(views), LATE)
    losses[term].backward()
    return losses, gradients(method)


class Dino(nn.Module):
    """DINO from the same blocks, with nothing of SCFS in it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = resnet()
        self.head = DinoHead(24, 20, 16, 8, trainable_gain=False)
        self.teacher = Teacher(own_statistics=True, encoder=self.encoder, head=self.head)
        self.register_buffer("centre", torch.zeros(20))

    def forward(self, views: list[Tensor]) -> Tensor:
        large, small = torch.cat(views[:2]), torch.cat(views[2:])
        pooled = [stage_features(self.encoder, images).pooled for images in (large, small)]
        with torch.no_grad():
            self.seen = self.teacher.head(stage_features(self.teacher.encoder, large).pooled)
        return view_cross_entropy(
            self.head(torch.cat(pooled)), sharpen(self.seen, self.centre, 0.07)
        )


@pytest.mark.parametrize(
    "options", [dict(stage_weights=0), dict(stage_global_weight=0, stage_search_weight=0)]
)
def test_without_stages_it_is_dino_bit_by_bit(views: list[Tensor], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dino = Dino().train()
    torch.manual_seed(0)
    method = SCFS(SCFS.Config(**NARROW, **options), resnet()).train()
    late = Progress(150, 200, 2)
    for _ in range(2):
        loss = dino(views)
        losses = method(batch_of(views), late)
        assert torch.equal(losses["loss"], loss)
        assert set(losses) == {"loss", "dino", "entropy", "feature_spread"}
        for module, value in ((dino, loss), (method, losses["loss"])):
            value.backward()
            with torch.no_grad():
                for p in module.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
                        p.grad = None
        method.after_step(late)
        dino.teacher.update(
            cosine_decay(late, start=0.996, end=1.0), encoder=dino.encoder, head=dino.head
        )
        dino.centre = 0.9 * dino.centre + (1 - 0.9) * dino.seen.mean(dim=0)
    state = method.state_dict()
    assert torch.equal(state.pop("centre.mean"), dino.centre)
    assert state.keys() == dino.state_dict().keys() - {"centre"}
    assert all(torch.equal(value, dino.state_dict()[name]) for name, value in state.items())


def test_stages_do_not_change_where_dino_starts() -> None:
    with_stages, without = build(), build(stage_weights=0)
    for name, p in without.named_parameters():
        assert torch.equal(p, with_stages.get_parameter(name)), name


def test_the_loss_is_the_weighted_sum(views: list[Tensor]) -> None:
    method = build(stage_weights=[1, 0.5, 2], stage_global_weight=0.3, stage_search_weight=0.7)
    losses, _ = step(method, views)
    expected = losses["dino"]
    for stage, weight in (("layer2", 1), ("layer3", 0.5), ("layer4", 2)):
        expected = expected + weight * (
            0.3 * losses[f"global_{stage}"] + 0.7 * losses[f"search_{stage}"]
        )
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        (dict(stage_weights=[0, 1, 1]), ["global_layer2", "search_layer2"]),
        (dict(stages=["layer4"]), ["global_layer2", "search_layer3"]),
        (dict(stage_global_weight=0), ["global_layer2", "global_layer4"]),
        (dict(stage_search_weight=0), ["search_layer2", "search_layer4"]),
    ],
)
def test_what_has_no_weight_is_not_computed(
    views: list[Tensor], options: dict[str, Any], absent: list[str]
) -> None:
    method = build(**options)
    losses, grads = step(method, views)
    assert not set(absent) & set(losses)
    assert set(grads) == {name for name, p in method.named_parameters() if p.requires_grad}


def test_nothing_flows_through_query_attention_or_teacher(
    views: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the search's loss is that with the attention held as a number."""
    kept: list[Tensor] = []
    real = scfs_file.cosine_attention

    def remember(queries: Tensor, maps: Tensor) -> Tensor:
        assert not queries.requires_grad
        kept.append(real(queries, maps))
        return kept[-1]

    monkeypatch.setattr(scfs_file, "cosine_attention", remember)
    _, expected = step(build(), views, "search_layer3")
    frozen = iter([attention.clone() for attention in kept])
    monkeypatch.setattr(scfs_file, "cosine_attention", lambda *_: next(frozen))
    _, found = step(build(), views, "search_layer3")
    assert not [name for name in expected if name.startswith("teacher.")]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def stage_maps() -> tuple[Tensor, Tensor, Tensor]:
    """What the student makes of global and local crops at layer2, and what the teacher makes of the
    global ones.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = ((2 * IMAGES, 12, 8, 8), (LOCALS * IMAGES, 12, 4, 4), (2 * IMAGES, 12, 8, 8))
    seen, searching, known = (torch.randn(*shape, generator=generator).relu() for shape in shapes)
    return seen, searching, known


def test_only_global_crop_0_is_searched() -> None:
    method = build()
    seen, searching, known = stage_maps()
    terms = method.compare_stage(0, seen, searching, known, 0.05)
    for rows, same in ((slice(IMAGES, None), True), (slice(0, IMAGES), False)):
        other = known.clone()
        other[rows] = other[rows].flip(1)
        changed = method.compare_stage(0, seen, searching, other, 0.05)
        assert torch.equal(changed["search"], terms["search"]) is same
        assert changed["global"] != terms["global"]


def test_a_search_is_paired_with_its_own_image() -> None:
    """Another order of the images changes nothing, another order of the queries alone does."""
    method = build()
    seen, searching, known = stage_maps()
    terms = method.compare_stage(0, seen, searching, known, 0.05)
    order = torch.tensor([2, 0, 1])

    def ordered(maps: Tensor) -> Tensor:
        return maps.unflatten(0, (-1, IMAGES))[:, order].flatten(0, 1)

    moved = method.compare_stage(0, ordered(seen), ordered(searching), ordered(known), 0.05)
    torch.testing.assert_close(moved["search"], terms["search"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved["global"], terms["global"], atol=1e-4, rtol=1e-4)
    mixed = method.compare_stage(0, seen, ordered(searching), known, 0.05)
    assert (mixed["search"] - terms["search"]).abs() > 1e-3


def test_the_order_of_local_crops_does_not_matter(views: list[Tensor]) -> None:
    first, _ = step(build(), views)
    second, _ = step(build(), [*views[:2], views[4], views[2], views[3]])
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-4, rtol=1e-4)


def test_centres_move_by_global_crops_and_leave_the_search_alone() -> None:
    method = build()
    seen, searching, known = stage_maps()
    before = method.compare_stage(0, seen, searching, known, 0.05)
    expected = 0.1 * method.teacher.stage_heads[0](known).mean(dim=0)
    method.stage_centres[0].update()
    torch.testing.assert_close(method.stage_centres[0].mean, expected)
    with torch.no_grad():
        method.stage_centres[0].mean += torch.linspace(0, 1, 12)
    after = method.compare_stage(0, seen, searching, known, 0.05)
    assert torch.equal(after["search"], before["search"])
    assert after["global"] != before["global"]


def test_a_loss_uses_the_centre_of_before(views: list[Tensor]) -> None:
    method = build()
    first, second = (method(batch_of(views), LATE)["loss"] for _ in range(2))
    assert torch.equal(first, second)
    method.after_step(LATE)
    assert method.centre.mean.abs().sum() > 0
    assert method(batch_of(views), LATE)["loss"] != first


def test_monitors_see_a_collapse(views: list[Tensor]) -> None:
    method = build(centre_momentum=0)
    step(method, views)
    method.after_step(LATE)  # now the centres are the mean of this very batch
    healthy, _ = step(method, views)
    with torch.no_grad():
        method.centre.mean[0] = -100.0
        method.stage_centres[1].mean[0] = -100.0
    collapsed, _ = step(
        method, [view[:1].expand_as(view) for view in (views[0], views[0], *views[2:])]
    )
    assert collapsed["entropy"] < 0.01 < 0.1 < healthy["entropy"]
    assert collapsed["entropy_layer3"] < 0.01 < 0.1 < healthy["entropy_layer3"]
    assert collapsed["feature_spread"] < 0.01 < 0.1 < healthy["feature_spread"]


def test_groups() -> None:
    for make, optimizer in ((resnet, "sgd"), (vit, "adamw")):
        method = build(make)
        others, prototypes = method.param_groups()
        assert [name for name, _ in prototypes.params] == ["head.last_layer.weight_v"]
        assert (others.frozen_until, prototypes.frozen_until) == (0, 1)
        for group in (others, prototypes):
            assert (group.optimizer, group.clip_norm, group.clip_each) == (optimizer, 3.0, True)
    assert {group.optimizer for group in build(optimizer="lars").param_groups()} == {"lars"}


def test_stages_of_a_vit() -> None:
    names = {depth: build(lambda depth=depth: vit(depth)).stages for depth in (1, 2, 3, 4, 12)}
    assert names[12] == ["blocks.5", "blocks.8", "blocks.11"]
    assert names[4] == ["blocks.1", "blocks.2", "blocks.3"]
    assert (names[1], names[2]) == (["blocks.0"], ["blocks.0", "blocks.1"])
    generator = torch.Generator().manual_seed(2)
    views = [torch.randn(IMAGES, 3, side, side, generator=generator) for side in (16, 16, 8, 8)]
    method = build(vit)
    losses, grads = step(method, views)
    assert losses["loss"].isfinite()
    assert set(grads) == {name for name, p in method.named_parameters() if p.requires_grad}


def test_pictures_of_a_resnet_show_where_parts_are_found(views: list[Tensor]) -> None:
    method = build(stage_weights=0).eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    panels = method.panels(
        Batch(views[:1], torch.arange(3), torch.zeros(3, 4), torch.zeros(3).bool()), LATE
    )
    sides = [panel.data.shape[-1] for panel in panels if panel.kind == "heat"]
    assert sides == [8, 4, 2] * 2
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(stages=["layer5"]), r"method\.stages=layer5.*layer1, layer2, layer3, layer4"),
        (
            dict(stages=["layer3", "layer3"]),
            r"method\.stages=\[layer3,layer3\] names a stage twice",
        ),
        (
            dict(stage_weights=[1, 2]),
            r"method\.stage_weights has 2 numbers for 3 stages \(layer2, layer3, layer4\)",
        ),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(**options)


def test_a_single_image_is_refused_where_batch_norms_need_two(views: list[Tensor]) -> None:
    with pytest.raises(
        UserError, match="need 2 images or more at a time, and gets 1: raise batch_size"
    ):
        build()(batch_of([view[:1] for view in views]), LATE)


def test_local_crops_are_needed(views: list[Tensor]) -> None:
    with pytest.raises(UserError, match=r"set crops\.num_local=1 or more"):
        build()(batch_of(views[:2]), LATE)
