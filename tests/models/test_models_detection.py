"""Faster and Mask R-CNN on a pyramid: losses against torchvision's own, and what belongs to a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from patchmine.backbones.family import build_encoder
from patchmine.models.detection import DetectHead
from patchmine.models.pyramid import build_pyramid
from patchmine.types import Objects

SIZE = (64, 96)
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def build(**settings: Any) -> tuple[Any, DetectHead]:
    torch.manual_seed(0)
    encoder = build_encoder("vit_small_patch16_224", image_size=SIZE, patch_size=8, model_args=TINY)
    backbone = build_pyramid(encoder, width=8)
    settings = {"masks": True, "proposals": 60, "samples": 40, **settings}
    return backbone, DetectHead(backbone, 3, **settings)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def some(*boxes: list[float], crowd: int = 0) -> Objects:
    """Rectangles, the first ``crowd`` of them crowds."""
    corners = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    count = torch.arange(len(boxes))
    return Objects(corners, count % 3, count < crowd, masks)


TARGETS = [
    some([4.0, 8, 40, 56], [50, 10, 90, 30]),
    some(),
    some([30.0, 20, 60, 60], [3, 3, 20, 20], [70, 40, 95, 63]),
]


@pytest.mark.parametrize("kind", ["fpn", "vitdet"])
def test_the_losses_of_an_image_are_torchvisions(kind: str) -> None:
    backbone, head = build(kind=kind)
    maps = backbone(images(1))
    found = head.losses(images(1), maps, TARGETS[:1], [7])
    proposals, objects = head.proposals, head.objects
    proposals.__class__, objects.__class__ = RegionProposalNetwork, RoIHeads
    objects_of = TARGETS[0]
    target = {"boxes": objects_of.boxes, "labels": 1 + objects_of.labels}
    target["masks"] = objects_of.masks
    torch.manual_seed(7)
    boxes, first = proposals(ImageList(images(1), [SIZE]), maps, [target])
    _, second = objects(maps, boxes, [SIZE], [target])
    expected = first | second
    assert sorted(found) == ["box", "class", "mask", "proposal", "proposal_box"]
    values = [sorted(loss.item() for loss in each.values()) for each in (found, expected)]
    assert values[0] == values[1]
    assert found["mask"].item() == expected["loss_mask"].item()


def test_a_batch_is_the_mean_of_its_images_however_it_is_divided() -> None:
    backbone, head = build()
    maps = backbone(images())
    whole = head.losses(images(), maps, TARGETS, [1, 2, 3])
    torch.manual_seed(99)  # of no influence, and not changed
    state = torch.get_rng_state()
    parts = []
    for row, target in enumerate(TARGETS):
        own = {name: one[row : row + 1] for name, one in maps.items()}
        parts.append(head.losses(images()[row : row + 1], own, [target], [row + 1]))
    assert torch.equal(torch.get_rng_state(), state)
    for name, loss in whole.items():
        torch.testing.assert_close(loss, torch.stack([part[name] for part in parts]).mean())
    other = head.losses(images(), maps, TARGETS, [4, 5, 6])
    assert not torch.equal(other["class"], whole["class"])


def test_every_parameter_learns_even_where_an_image_shows_nothing() -> None:
    backbone, head = build(kind="vitdet")
    loss = sum(head.losses(images(1), backbone(images(1)), [some()], [0]).values())
    assert torch.isfinite(loss)
    loss.backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None]


def test_crowds_are_neither_learned_nor_background() -> None:
    backbone, head = build()
    anchors = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [30, 30, 40, 40], [0, 0, 90, 60]])
    real = torch.tensor([[30.0, 30, 40, 41]])
    crowds = torch.tensor([[0.0, 0, 20, 20]])
    target = {"boxes": real, "labels": torch.tensor([1]), "crowds": crowds}
    (labels,), _ = head.proposals.assign_targets_to_anchors([anchors], [target])
    assert labels.tolist() == [-1, -1, 1, 0]
    head.objects.crowds = [crowds]
    _, (labels,) = head.objects.assign_targets_to_proposals([anchors], [real], [torch.tensor([2])])
    assert labels.tolist() == [-1, -1, 2, 0]
    whole = some([0.0, 0, 96, 64], crowd=1)
    losses = head.losses(images(1), backbone(images(1)), [whole], [0])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["mask"] == losses["box"] == 0


def test_what_is_found_lies_in_the_view() -> None:
    backbone, head = build(score_threshold=0.0, most=20)
    head.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        maps = {name: one.float() for name, one in backbone(images()).items()}
        every = head.find(images(), maps)
    assert len(every) == 3
    for found in every:
        assert len(found.boxes) == len(found.labels) == len(found.scores) == 20
        assert found.masks.shape[:2] == (20, 1)
        assert set(found.labels.tolist()) <= {0, 1, 2}
        assert found.boxes.min() >= 0
        assert (found.boxes[:, 2:] <= torch.tensor([96.0, 64])).all()
        assert (found.scores[:-1] >= found.scores[1:]).all()


def test_nothing_may_be_found() -> None:
    backbone, head = build(score_threshold=1.0)
    head.eval()
    with torch.no_grad():
        every = head.find(images(), backbone(images()))
    assert [len(found.boxes) for found in every] == [0, 0, 0]
    assert every[0].masks.shape[0] == 0


def test_anchors_follow_the_strides() -> None:
    _, head = build(anchor_scale=4)
    assert head.proposals.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
