"""The grid of classifiers and the LARS probe against one plain classifier at a time."""

from __future__ import annotations

import math

import torch
from torch import nn

from patchmine.evaluate.heads import grid_accuracy, shuffled_batches, train_grid, train_lars
from patchmine.evaluate.measure import count_right

SLOTS = {"cls": [0], "cls+mean": [0, 2], "all": [0, 1, 2]}


def blobs(count, shape, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=g)
    return centres[labels] + 0.8 * torch.randn(count, *shape, generator=g), labels


def test_every_head_of_the_grid_equals_autograd_with_torch_sgd():
    table, labels = blobs(50, (3, 4))
    rates, steps = (0.01, 0.3, 1.0), 30
    grid = train_grid(table, labels, 3, SLOTS, rates, iterations=steps, batch_size=16, seed=5)
    for name, slots in SLOTS.items():
        for r, rate in enumerate(rates):
            linear = nn.Linear(4 * len(slots), 3)
            start = (
                torch.randn(4 * len(slots), 3, 1, generator=torch.Generator().manual_seed(5)) * 0.01
            )
            linear.weight.data, linear.bias.data = start[..., 0].T.clone(), torch.zeros(3)
            optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for index in shuffled_batches(50, 16, steps, 5):
                features = torch.cat([table[index, s] for s in slots], dim=1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(linear(features), labels[index]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(
                grid.weights[name][..., r].T, linear.weight.data, rtol=1e-3, atol=1e-5
            )
            torch.testing.assert_close(
                grid.biases[name][:, r], linear.bias.data, rtol=1e-3, atol=1e-5
            )


def test_training_on_some_rows_equals_training_on_a_copy_of_them():
    table, labels = blobs(50, (3, 4))
    rows = torch.tensor([3, 1, 20, 44, 17, 30, 31])
    some, copied = (
        train_grid(t, y, 3, SLOTS, (0.1,), rows=r, iterations=9, batch_size=3)
        for t, y, r in ((table, labels, rows), (table[rows], labels[rows], None))
    )
    assert all(torch.equal(some.weights[name], copied.weights[name]) for name in SLOTS)


def test_a_rate_that_explodes_scores_zero_and_spoils_no_other():
    table, labels = blobs(60, (3, 4))
    alone = train_grid(table, labels, 3, {"cls": [0]}, (0.5,), iterations=40, batch_size=20)
    pair = train_grid(table, labels, 3, {"cls": [0]}, (0.5, math.inf), iterations=40, batch_size=20)
    torch.testing.assert_close(alone.weights["cls"][..., 0], pair.weights["cls"][..., 0])
    scores = grid_accuracy(pair, table, labels)["cls"]
    assert scores[0] > 80
    assert scores[1] == 0.0


def test_accuracy_counts_like_a_loop():
    scores = torch.randn(5000, 7)
    labels = torch.randint(7, (5000,))
    order = scores.argsort(dim=1, descending=True)
    top1 = sum(int(o[0]) == int(y) for o, y in zip(order, labels, strict=True))
    top5 = sum(int(y) in o[:5].tolist() for o, y in zip(order, labels, strict=True))
    assert count_right(scores, labels).tolist() == [top1, top5]
    table, labels = blobs(5000, (3, 4))
    grid = train_grid(table, labels, 3, SLOTS, (0.01, 0.3), iterations=5, batch_size=16)
    for name, found in grid_accuracy(grid, table, labels).items():
        best = grid.logits(name, table).argmax(1)
        slow = [100 * sum((best[:, r] == labels).tolist()) / 5000 for r in range(2)]
        assert found.tolist() == slow


def slow_lars(features, labels, num_classes, epochs, warmup, batch_size, blr, seed):
    """MAE's LARS written out for one matrix and one bias (util/lars.py of the specification)."""
    weight = nn.init.trunc_normal_(
        torch.empty(num_classes, features.shape[1]),
        std=0.01,
        generator=torch.Generator().manual_seed(seed),
    )
    weight, bias = weight.requires_grad_(), torch.zeros(num_classes, requires_grad=True)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    per_epoch = len(features) // batch_size
    for step, index in enumerate(
        shuffled_batches(len(features), batch_size, epochs * per_epoch, seed)
    ):
        epoch = step / per_epoch
        peak = blr * batch_size / 256
        rate = (
            peak * epoch / warmup
            if epoch < warmup
            else peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        )
        x = features[index]
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(x @ weight.T + bias, labels[index]), [weight, bias]
        )
        with torch.no_grad():
            step_weight = gradients[0] * (0.001 * weight.norm() / gradients[0].norm())
            for parameter, velocity, move in zip(
                (weight, bias), speed, (step_weight, gradients[1]), strict=True
            ):
                velocity.mul_(0.9).add_(move)
                parameter.sub_(rate * velocity)
    return weight.detach(), bias.detach()


def test_lars_probe_equals_the_written_out_rule():
    features, labels = blobs(64, (6,))
    settings = dict(epochs=12, batch_size=16, blr=2.0, seed=3)
    head = train_lars(features, labels, 3, warmup_epochs=2, **settings)
    weight, bias = slow_lars(features, labels, 3, warmup=2, **settings)
    torch.testing.assert_close(head[1].weight.data, weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head[1].bias.data, bias, rtol=1e-3, atol=1e-5)
    assert not head.training


def test_threads_are_as_before_after_training():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        table, labels = blobs(20, (3, 4))
        train_grid(table, labels, 3, SLOTS, (0.1,), iterations=2, batch_size=5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_cover_every_row_once_an_epoch():
    batches = list(shuffled_batches(12, 4, 6, seed=1))
    assert sorted(torch.cat(batches[:3]).tolist()) == list(range(12))
    assert sorted(torch.cat(batches[3:]).tolist()) == list(range(12))
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))
