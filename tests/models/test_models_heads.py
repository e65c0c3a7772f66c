"""Heads against their formulas, the search head's fast path against the maps that it does not make,
the centre.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.models.centre import Centre
from patchmine.models.heads import DinoHead, StageHead, WeightNormLinear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stage_head(channels: int = 12) -> StageHead:
    torch.manual_seed(0)
    return StageHead(channels, 10, hidden=14, bottleneck=6)


def test_rows_of_the_last_layer_have_the_given_length() -> None:
    layer = WeightNormLinear(8, 5, trainable_gain=True).double()
    with torch.no_grad():
        layer.weight_g.copy_(torch.arange(1.0, 6.0)[:, None])
    rows = torch.stack(
        [g * v / v.norm() for g, v in zip(layer.weight_g, layer.weight_v, strict=True)]
    )
    x = normal(3, 8).double()
    torch.testing.assert_close(layer(x), x @ rows.T)
    old = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5, bias=False).double())
    old.load_state_dict(
        {
            "parametrizations.weight.original0": layer.weight_g,
            "parametrizations.weight.original1": layer.weight_v,
        }
    )
    for found, expected in zip(
        torch.autograd.grad(layer(x).square().sum(), [layer.weight_g, layer.weight_v]),
        torch.autograd.grad(old(x).square().sum(), list(old.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_head_of_dino() -> None:
    torch.manual_seed(0)
    head = DinoHead(7, 9, hidden=11, bottleneck=5, trainable_gain=False)
    assert {name for name, p in head.named_parameters() if not p.requires_grad} == {
        "last_layer.weight_g"
    }
    assert {name.rsplit(".", 1)[0] for name in head.state_dict()} == {
        "mlp.0",
        "mlp.2",
        "mlp.4",
        "last_layer",
    }
    features = normal(4, 7)
    logits = head(features)
    assert logits.shape == (4, 9)
    assert logits.abs().max() <= 1 + 1e-6  # both sides are unit vectors
    hidden = F.gelu(head.mlp[2](F.gelu(head.mlp[0](features))))
    rows = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        logits, F.cosine_similarity(head.mlp[4](hidden)[:, None], rows[None], dim=-1)
    )
    copied = copy.deepcopy(head)
    assert torch.equal(copied(features), logits)


def test_head_of_dino_starts_small_but_for_its_prototypes() -> None:
    torch.manual_seed(0)
    head = DinoHead(64, 50, hidden=200, bottleneck=32, trainable_gain=True)
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(not head.mlp[i].bias.any() for i in (0, 2, 4))
    assert head.last_layer.weight_v.abs().max().item() <= 1 / 32**0.5
    assert bool((head.last_layer.weight_g == 1).all())


def searched_slowly(head: StageHead, maps: Tensor, attention: Tensor) -> Tensor:
    """Every weighted map is made, crop-major, and goes through the head as a map of its own."""
    return head(torch.stack([w[:, None] * maps for w in attention]).flatten(0, 1))


def test_weighted_maps_without_making_them() -> None:
    # In float64: batch norms of six rows amplify the rounding of float32, by how much depends on
    # the processor.
    head, maps, attention = (
        part.double()
        for part in (stage_head(), normal(3, 12, 4, 5).relu(), normal(2, 3, 4, 5, seed=1).sigmoid())
    )
    found = head(maps, attention)
    assert found.shape == (6, 10)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(found, searched_slowly(head, maps, attention), atol=5e-7, rtol=0)


def test_full_attention_is_the_head_on_the_maps_alone() -> None:
    """J copies have the batch statistics of one."""
    head, maps = stage_head().double(), normal(3, 12, 4, 4).relu().double()
    found = head(maps, torch.ones(3, 3, 4, 4).double())
    torch.testing.assert_close(found, head(maps).repeat(3, 1), atol=5e-7, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_stage_head_keeps_no_running_statistics(training: bool) -> None:
    head, maps = stage_head().train(training), normal(3, 12, 4, 4)
    assert not dict(head.named_buffers())
    z = head.mlp(head_by_hand(head, maps))
    torch.testing.assert_close(head(maps), z / z.norm(dim=1, keepdim=True), atol=2e-5, rtol=0)


def head_by_hand(head: StageHead, maps: Tensor) -> Tensor:
    def standard(x: Tensor) -> Tensor:
        mean, variance = (
            x.mean((0, 2, 3), keepdim=True),
            x.var((0, 2, 3), keepdim=True, correction=0),
        )
        return (x - mean) / (variance + 1e-5).sqrt()

    y = standard(head.conv2(standard(head.conv1(maps)).relu())).relu()
    return (standard(head.conv3(y)) + maps).relu().mean((2, 3))


def test_one_image_keeps_its_axis() -> None:
    """Two global crops of one image, or two searches in one map, are two rows."""
    head, maps = stage_head(), normal(2, 12, 1, 1)
    assert head(maps).shape == (2, 10)
    assert head(maps[:1], torch.rand(2, 1, 1, 1)).shape == (2, 10)


def test_stage_head_in_bfloat16() -> None:
    head, maps, attention = (
        stage_head(),
        normal(3, 12, 4, 4).relu(),
        normal(2, 3, 4, 4, seed=1).sigmoid(),
    )
    exact = head(maps, attention)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head(maps.bfloat16(), attention)
    assert rough.dtype == torch.float32
    assert F.cosine_similarity(rough, exact).min() > 0.99


def test_centre_moves_after_the_step_with_all_parts_of_the_batch() -> None:
    whole, parts, logits = Centre(5), Centre(5), normal(8, 5)
    for _ in range(2):  # the second round starts afresh
        whole.see(logits)
        before = whole.mean.clone()
        whole.update()
        torch.testing.assert_close(whole.mean, 0.9 * before + 0.1 * logits.mean(0))
        for part in logits.chunk(4):
            parts.see(part)
        torch.testing.assert_close(parts.mean, before)
        parts.update()
        torch.testing.assert_close(parts.mean, whole.mean)
    assert list(whole.state_dict()) == ["mean"]


def test_centre_that_saw_nothing_stays() -> None:
    centre = Centre(5)
    centre.mean += 1
    centre.update()
    assert torch.equal(centre.mean, torch.ones(5))


def test_a_centre_takes_nothing_in_eval_mode() -> None:
    centre = Centre(4, momentum=0.5)
    centre.see(torch.ones(3, 4))
    centre.eval()
    centre.see(torch.full((3, 4), 100.0))  # a held-out loss, between two steps
    centre.train()
    centre.update()
    assert torch.equal(centre.mean, torch.full((4,), 0.5))
