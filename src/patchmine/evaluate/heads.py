"""Training linear classifiers on cached features; it knows no files and no models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.ops.schedules import LrSchedule, learning_rate
from patchmine.types import Progress

Slots = Mapping[str, Sequence[int]]
"""Which columns of a table (N, S, D) a classifier reads, laid end to end, by the choice's name."""

_ROWS = 4_096  # rows that are scored at once
_WORTH_THREADS = 2_000_000_000  # operations, about 20 ms of one core


@dataclass(frozen=True)
class HeadGrid:
    """Classifiers that are trained together: every input in ``slots`` with each of R rates."""

    slots: Slots
    weights: dict[str, Tensor]  # (d, C, R): d inputs, C classes
    biases: dict[str, Tensor]  # (C, R)

    def logits(self, name: str, rows: Tensor) -> Tensor:
        """Scores (B, C, R) of the classifiers on input ``name`` for ``rows`` (B, S, D)."""
        weight = self.weights[name]
        scores = F.linear(_inputs(rows, self.slots[name]), weight.flatten(1).T)  # (B, C * R)
        return scores.view(len(rows), *weight.shape[1:]) + self.biases[name]


def _inputs(rows: Tensor, slots: Sequence[int]) -> Tensor:
    return rows[:, list(slots)].flatten(1)


def shuffled_batches(size: int, batch_size: int, count: int, seed: int) -> Iterator[Tensor]:
    """``count`` index batches; every epoch is a new permutation without its last partial batch."""
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, size)
    per_epoch = size // batch_size
    order = torch.empty(0, dtype=torch.int64)
    for step in range(count):
        place = step % per_epoch
        if place == 0:
            order = torch.randperm(size, generator=generator)
        yield order[place * batch_size : (place + 1) * batch_size]


@torch.no_grad()
def train_grid(
    table: Tensor,
    labels: Tensor,
    num_classes: int,
    slots: Slots,
    rates: Sequence[float],
    *,
    rows: Tensor | None = None,
    iterations: int,
    batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tick: Callable[[int], None] = lambda _: None,
) -> HeadGrid:
    """Softmax regressions for every input and rate on ``rows`` of ``table`` (N, S, D)."""
    # DINOv2, eval/linear.py: SGD with momentum 0.9, no weight decay, cosine from each rate to zero.
    weights, biases, num_rates = {}, {}, len(rates)
    for name, chosen in slots.items():
        # N(0, 0.01) as DINOv2's, one draw for all rates, so that only the rate differs.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(chosen) * table.shape[2], num_classes, 1, generator=generator)
        weights[name] = (drawn * 0.01).repeat(1, 1, num_rates).to(device)
        biases[name] = torch.zeros(num_classes, num_rates, device=device)
    grid = HeadGrid(slots, weights, biases)
    speeds = {name: [torch.zeros_like(t[name]) for t in (weights, biases)] for name in slots}
    peak = torch.tensor(rates, device=device)  # (R,)
    rows = torch.arange(len(table)) if rows is None else rows
    with _fitting_threads(4 * batch_size * sum(map(Tensor.numel, weights.values()))):
        for step, index in enumerate(shuffled_batches(len(rows), batch_size, iterations, seed)):
            rate = peak * (0.5 * (1 + math.cos(math.pi * step / iterations)))
            x, labels_now = table[rows[index]].to(device), labels[rows[index]].to(device)
            truth = labels_now[:, None, None].expand(-1, 1, num_rates)
            for name, (weight_speed, bias_speed) in speeds.items():
                # The gradient is written out, (softmax - one-hot) times the input: all rates of an
                # input are one matrix product.  Classes are not the last axis: a softmax over few
                # neighbouring numbers is 20 times slower on a CPU.
                error = grid.logits(name, x).softmax(dim=1)  # (B, C, R)
                error.scatter_add_(1, truth, error.new_full(truth.shape, -1.0))
                error /= len(x)
                gradient = F.linear(_inputs(x, slots[name]).T, error.flatten(1).T)  # (d, C * R)
                weight_speed.mul_(0.9).add_(gradient.view_as(weight_speed))
                bias_speed.mul_(0.9).add_(error.sum(0))
                weights[name].sub_(rate * weight_speed)
                biases[name].sub_(rate * bias_speed)
            tick(1)
    return grid


@contextmanager
def _fitting_threads(operations: int) -> Iterator[None]:
    """One thread for steps of few floating-point operations."""
    # Tiny parallel regions wait for each other, beside another busy process a time slice each.
    before = torch.get_num_threads()
    if operations < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def grid_accuracy(
    grid: HeadGrid, table: Tensor, labels: Tensor, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Percent right (R,) of the classifiers of each input; an infinite one scores zero."""
    found = {}
    for name in grid.slots:
        hits = torch.zeros(grid.biases[name].shape[1], dtype=torch.float64)
        for start in range(0, len(table), _ROWS):
            scores = grid.logits(name, table[start : start + _ROWS].to(device))  # (B, C, R)
            truth = labels[start : start + _ROWS, None].to(device)
            right = (scores.argmax(dim=1) == truth) & scores.isfinite().all(dim=1)
            hits += right.sum(0).cpu()
        found[name] = 100 * hits / len(table)
    return found


def train_lars(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    epochs: int,
    warmup_epochs: int,
    batch_size: int,
    blr: float,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tick: Callable[[int], None] = lambda _: None,
) -> nn.Sequential:
    """MAE's probe on ``features`` (N, D), in eval mode (main_linprobe.py); ``blr`` is per 256."""
    from timm.optim import Lars

    linear = nn.Linear(features.shape[1], num_classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6)
    head = nn.Sequential(norm, linear).to(device)
    # timm adapts only where there is weight decay, unless told to; the bias is never adapted.
    adapted = {linear.weight: True, linear.bias: False}
    groups = [dict(params=[part], always_adapt=each) for part, each in adapted.items()]
    optimizer = Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)
    batch_size = min(batch_size, len(features))
    per_epoch = len(features) // batch_size
    total, peak = epochs * per_epoch, blr * batch_size / 256
    schedule = LrSchedule(warmup_epochs=warmup_epochs)
    with _fitting_threads(4 * batch_size * linear.weight.numel()):
        for step, index in enumerate(shuffled_batches(len(features), batch_size, total, seed)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(Progress(step, total, per_epoch), peak, schedule)
            loss = F.cross_entropy(head(features[index].to(device)), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tick(1)
    return head.eval()


def train_logistic(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and bias (C,) of softmax regression on few rows (N, D), to the optimum."""
    # What scikit-learn's LogisticRegression minimises with C=1: the summed cross entropy plus half
    # of the squared weights; the bias is free.
    rows = x.double()
    # The optimum lies in the span of the rows: solved in an orthonormal basis (D, min(N, D)) of it.
    basis, _ = torch.linalg.qr(rows.T)
    rows = rows @ basis
    weight = rows.new_zeros(rows.shape[1], num_classes, requires_grad=True)
    bias = rows.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        tolerance_grad=1e-5,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        misfit = F.cross_entropy(rows @ weight + bias, labels, reduction="sum")
        loss = misfit + weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return (basis @ weight.detach()).to(x.dtype), bias.detach().to(x.dtype)
