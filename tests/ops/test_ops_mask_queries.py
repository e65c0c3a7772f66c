"""Costs, losses and scores of masks that queries propose, against loops over single points."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.ops import mask_queries as ops

N, Q, K, P = 2, 4, 3, 16


def drawn(seed: int = 0, points: int = P) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of classes, logits of masks, labels, and which of the points are known."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(N, Q, K + 1, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(N, Q, points, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (N, points), generator=generator)
    known = torch.rand(N, points, generator=generator) < 0.8
    return classes, logits, labels, known


def entropy(logit: float, truth: bool) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -math.log(probability if truth else 1 - probability)


def slow_mask(logits: list[float], truth: list[bool]) -> tuple[float, float]:
    """Cross entropy and 1 - Dice of one mask."""
    shares = [1 / (1 + math.exp(-each)) for each in logits]
    common = sum(share for share, inside in zip(shares, truth, strict=True) if inside)
    both = sum(shares) + sum(truth)
    each = [entropy(logit, inside) for logit, inside in zip(logits, truth, strict=True)]
    return sum(each) / len(each), 1 - (2 * common + 1) / (both + 1)


def test_costs_are_what_each_pair_costs_by_itself() -> None:
    classes, logits, labels, known = drawn()
    found = ops.pair_costs(classes, logits, labels, known)
    for n in range(N):
        seen = known[n].nonzero()[:, 0].tolist()
        for q in range(Q):
            for k in range(K):
                truth = [bool(labels[n, p] == k) for p in seen]
                mask, dice = slow_mask([float(logits[n, q, p]) for p in seen], truth)
                right = float(classes[n, q].softmax(0)[k])
                assert float(found[n, q, k]) == pytest.approx(5 * mask + 5 * dice - 2 * right)


def test_queries_learn_their_class_or_none() -> None:
    classes, *_ = drawn()
    matched = torch.tensor([[2, -1, 0], [-1, -1, -1]])
    found = ops.class_losses(classes, matched)
    for n, targets in enumerate([[2, 3, 0, 3], [3, 3, 3, 3]]):
        logs = [-float(classes[n, q].log_softmax(0)[target]) for q, target in enumerate(targets)]
        weights = [0.1 if target == K else 1.0 for target in targets]
        mean = sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights)
        assert float(found[n]) == pytest.approx(mean)


def test_masks_learn_at_their_least_sure_points_and_at_others() -> None:
    count = 4
    candidates = 3 * count + count // 4
    _, logits, labels, known = drawn(points=candidates)
    matched = torch.tensor([[2, -1, 0], [-1, 3, -1]])
    mask, dice = ops.mask_losses(logits, labels, known, matched, count)
    for n in range(N):
        losses = []
        for k in range(K):
            if (query := int(matched[n, k])) < 0:
                continue
            sure = {p: abs(float(logits[n, query, p])) for p in range(3 * count) if known[n, p]}
            points = sorted(sure, key=lambda p: sure[p])[: count - count // 4]
            points += [p for p in range(3 * count, candidates) if known[n, p]]
            truth = [bool(labels[n, p] == k) for p in points]
            losses.append(slow_mask([float(logits[n, query, p]) for p in points], truth))
        expected = [sum(each) / len(losses) for each in zip(*losses, strict=True)]
        assert (float(mask[n]), float(dice[n])) == pytest.approx(tuple(expected))


def test_what_is_of_no_class_teaches_nothing() -> None:
    classes, logits, labels, _ = drawn(points=13)
    known = torch.zeros(N, 13, dtype=torch.bool)
    known[0, :4] = True
    logits.requires_grad_()
    matched = torch.tensor([[2, -1, 0], [1, 2, 3]])
    mask, dice = ops.mask_losses(logits, labels, known, matched, 4)
    (mask + dice).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, :, :4].abs().sum() > 0
    assert logits.grad[0, :, 4:].abs().sum() == 0
    assert logits.grad[1].abs().sum() == 0
    before = ops.pair_costs(classes, logits, labels, known)
    after = ops.pair_costs(classes, logits, torch.where(known, labels, 1), known)
    assert torch.equal(before, after)


def test_labels_are_those_of_the_pixel_and_maps_are_bilinear() -> None:
    labels = torch.arange(12).reshape(1, 3, 4)
    points = torch.tensor([[[0.0, 0.0], [0.26, 0.0], [0.99, 0.34], [0.5, 0.999]]])
    assert ops.pixels_at(labels, points).tolist() == [[0, 1, 7, 10]]
    ramp = torch.arange(4.0).expand(1, 1, 3, 4)  # at (column + 1/2) / 4
    values = ops.values_at(ramp, torch.tensor([[[0.125, 0.5], [0.5, 0.5], [0.625, 0.99]]]))
    torch.testing.assert_close(values, torch.tensor([[[0.0, 1.5, 2.0]]]))
    maps = torch.randn(1, 2, 3, 4)  # at the pixels of an enlarged map
    larger = F.interpolate(maps, (15, 20), mode="bilinear", align_corners=False)
    rows, columns = (torch.arange(15) + 0.5) / 15, (torch.arange(20) + 0.5) / 20
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=2).reshape(1, -1, 2)
    torch.testing.assert_close(ops.values_at(maps, pixels), larger.flatten(2))


def test_a_class_is_shown_by_any_known_pixel() -> None:
    labels = torch.tensor([[[0, 2], [2, 1]], [[1, 1], [1, 1]]])
    known = torch.tensor([[[True, True], [False, False]], [[False] * 2] * 2])
    assert ops.classes_shown(labels, known, 3).tolist() == [[True, False, True], [False] * 3]


def test_scores_are_logarithms_of_what_queries_say_together() -> None:
    classes, logits, *_ = drawn()
    shares = ops.class_scores(classes, logits.unflatten(2, (2, 8))).softmax(1).flatten(2)
    sums = torch.zeros(N, K, P, dtype=torch.float64)
    for q in range(Q):
        said = classes[:, q].softmax(1)[:, :K]
        sums += said[:, :, None] * logits[:, q].sigmoid()[:, None]
    torch.testing.assert_close(shares, sums / sums.sum(1, keepdim=True))
    nowhere = ops.class_scores(classes, torch.full_like(logits, -1e4))
    assert nowhere.isfinite().all()
