"""Training linear classifiers on cached features: tensors in, weights out.  It knows no files and
no models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.ops.schedules import LrSchedule, learning_rate
from patchmine.types import Progress

Slots = Mapping[str, Sequence[int]]
"""Which columns of a table (N, S, D) a classifier reads, laid end to end, by the name of the
choice.
"""

_ROWS = 4_096  # rows that are scored at once
_WORTH_THREADS = 2_000_000_000  # operations, about 20 ms of one core


@dataclass(frozen=True)
class HeadGrid:
    """All classifiers that are trained together: every input in ``slots`` with every rate in
    ``rates``.

    ``weights[name]`` (d, C, R) and ``biases[name]`` (C, R): d inputs, C classes, R learning rates.
    """

    slots: Slots
    rates: tuple[float, ...]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]

    def logits(self, name: str, rows: Tensor) -> Tensor:
        """Scores (B, C, R) of the classifiers on input ``name`` for ``rows`` (B, S, D)."""
        weight = self.weights[name]
        scores = F.linear(_inputs(rows, self.slots[name]), weight.flatten(1).T)  # (B, C * R)
        return scores.view(len(rows), *weight.shape[1:]) + self.biases[name]


def _inputs(rows: Tensor, slots: Sequence[int]) -> Tensor:
    return rows[:, list(slots)].flatten(1)


def _start(
    size: int, num_classes: int, rates: int, seed: int, device: torch.device | str
) -> Tensor:
    """(d, C, R): one draw of N(0, 0.01) (DINOv2, eval/linear.py), the same for every rate so that
    only the rate differs.
    """
    drawn = torch.randn(size, num_classes, 1, generator=torch.Generator().manual_seed(seed)) * 0.01
    return drawn.repeat(1, 1, rates).to(device)


def shuffled_batches(size: int, batch_size: int, count: int, seed: int) -> Iterator[Tensor]:
    """``count`` index batches; every epoch is a new permutation of ``range(size)`` and its last
    partial batch is dropped.
    """
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
    tick: Callable[[], None] = lambda: None,
) -> HeadGrid:
    """Softmax regressions for every input and learning rate at once on ``rows`` of ``table`` (N, S,
    D), ``labels`` (N,).

    SGD with momentum 0.9, no weight decay, cosine from each rate to zero over ``iterations``
    (DINOv2, eval/linear.py). The gradient is written out, (softmax - one-hot) times the input: all
    rates of one input are one matrix product, without a graph.  A rate that is too large ruins its
    own classifier and no other.
    """
    inputs = {name: len(chosen) * table.shape[2] for name, chosen in slots.items()}
    weights = {
        name: _start(size, num_classes, len(rates), seed, device) for name, size in inputs.items()
    }
    biases = {name: torch.zeros(num_classes, len(rates), device=device) for name in slots}
    grid = HeadGrid(slots, tuple(rates), weights, biases)
    speeds = {
        name: (torch.zeros_like(weights[name]), torch.zeros_like(biases[name])) for name in slots
    }
    peak = torch.tensor(rates, device=device)  # (R,)
    rows = torch.arange(len(table)) if rows is None else rows
    with _fitting_threads(4 * batch_size * sum(inputs.values()) * num_classes * len(rates)):
        for step, index in enumerate(shuffled_batches(len(rows), batch_size, iterations, seed)):
            rate = peak * (0.5 * (1 + math.cos(math.pi * step / iterations)))
            _step(grid, speeds, rate, table[rows[index]].to(device), labels[rows[index]].to(device))
            tick()
    return grid


def _step(
    grid: HeadGrid,
    speeds: Mapping[str, tuple[Tensor, Tensor]],
    rate: Tensor,
    rows: Tensor,
    labels: Tensor,
) -> None:
    """One step of SGD for all classifiers on ``rows`` (B, S, D), in place; ``rate`` (R,)."""
    truth = labels[:, None, None].expand(-1, 1, len(rate))
    for name, (weight_speed, bias_speed) in speeds.items():
        # Classes are not the last axis: a softmax over few neighbouring numbers is 20 times slower
        # on a CPU.
        error = grid.logits(name, rows).softmax(dim=1)  # (B, C, R)
        error.scatter_add_(1, truth, error.new_full(truth.shape, -1.0))
        error /= len(rows)
        gradient = F.linear(_inputs(rows, grid.slots[name]).T, error.flatten(1).T)  # (d, C * R)
        weight_speed.mul_(0.9).add_(gradient.view_as(weight_speed))
        bias_speed.mul_(0.9).add_(error.sum(0))
        grid.weights[name].sub_(rate * weight_speed)
        grid.biases[name].sub_(rate * bias_speed)


@contextmanager
def _fitting_threads(operations: int) -> Iterator[None]:
    """One thread for steps of few floating-point operations.

    Dozens of tiny parallel regions in a step wait for each other; beside another busy process they
    wait a time slice each, which made a step of 4 ms take 2 s.
    """
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
    """Percent right, (R, 2) for top-1 and top-5, of every classifier; one that went to infinity
    scores zero.
    """
    return {
        name: accuracy(partial(grid.logits, name), table, labels, device).cpu()
        for name in grid.slots
    }


@torch.no_grad()
def accuracy(
    classify: Callable[[Tensor], Tensor], table: Tensor, labels: Tensor, device: torch.device | str
) -> Tensor:
    """Percent right, (R, 2) for top-1 and top-5, of ``classify``: rows of the table -> scores (B,
    C, R).
    """
    hits: Tensor | None = None
    for start in range(0, len(table), _ROWS):
        scores = classify(table[start : start + _ROWS].to(device))
        truth = labels[start : start + _ROWS, None, None].to(device)
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices  # (B, 5, R)
        right = (best == truth) & scores.isfinite().all(dim=1, keepdim=True)
        found = torch.stack([right[:, 0].sum(0), right.any(dim=1).sum(0)], dim=1)  # (R, 2)
        hits = found if hits is None else hits + found
    if hits is None:
        raise ValueError("accuracy of no rows")
    return 100.0 * hits.double() / len(table)


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
    tick: Callable[[], None] = lambda: None,
) -> nn.Sequential:
    """MAE's probe on ``features`` (N, D): batch norm without affine, linear, LARS with momentum
    0.9, trust 0.001, no weight decay.

    ``blr`` is per 256 rows; linear warm-up, then half a cosine to zero, per step (MAE,
    main_linprobe.py).  Returned in eval mode.
    """
    from timm.optim import Lars

    linear = nn.Linear(features.shape[1], num_classes)
    with torch.no_grad():
        nn.init.trunc_normal_(
            linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed)
        )
        linear.bias.zero_()
    head = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6), linear).to(
        device
    )
    # timm adapts only where there is weight decay, unless told to; the bias is never adapted.
    groups = [
        dict(params=[linear.weight], always_adapt=True),
        dict(params=[linear.bias], always_adapt=False),
    ]
    optimizer = Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)
    batch_size = min(batch_size, len(features))
    per_epoch = len(features) // batch_size
    peak, schedule = blr * batch_size / 256, LrSchedule(warmup_epochs=warmup_epochs)
    with _fitting_threads(4 * batch_size * features.shape[1] * num_classes):
        for step, index in enumerate(
            shuffled_batches(len(features), batch_size, epochs * per_epoch, seed)
        ):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    Progress(step, epochs * per_epoch, per_epoch), peak, schedule
                )
            loss = F.cross_entropy(head(features[index].to(device)), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tick()
    return head.eval()
