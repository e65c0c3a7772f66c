"""Self-distillation between views: targets, losses, their centre, and monitors of collapse.

Rows are crop-major: all images of crop 0, then all of crop 1.  All in float32: bfloat16 logits
divided by a temperature of 0.04 would lose the differences that matter.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from patchmine.types import Progress

STUDENT_TEMPERATURE = 0.1  # DINO, MOKD and SCFS; no published setting has another


@torch.no_grad()
def sharpen(
    logits: Float[Tensor, "N K"], centre: Float[Tensor, "K"] | None, temperature: float
) -> Float[Tensor, "N K"]:
    """Targets ``softmax((logits - centre) / temperature)``: (N, K), (K,) or None -> (N, K)."""
    logits = logits.float()
    return ((logits if centre is None else logits - centre) / temperature).softmax(dim=-1)


def view_cross_entropy(
    student: Float[Tensor, "VB K"],
    targets: Float[Tensor, "TB K"],
    temperature: float = STUDENT_TEMPERATURE,
) -> Float[Tensor, ""]:
    """DINO's loss of logits (V * B, K) against probabilities (2 * B, K) of two teacher views, ().

    The mean over the 2 V - 2 pairs of a target with another view than its own
    (docs/methods/mokd.md). Views 0 and 1 of the student are those of the teacher.
    """
    first, second = targets.chunk(2)  # (B, K) each
    logs = (student.float() / temperature).log_softmax(dim=-1).view(-1, *first.shape)  # (V, B, K)
    agreement = (
        (second * logs[0]).sum()
        + (first * logs[1]).sum()
        + ((first + second) * logs[2:].sum(dim=0)).sum()
    )
    return -agreement / (len(first) * (2 * len(logs) - 2))


def search_cross_entropy(
    student: Float[Tensor, "N K"],
    targets: Float[Tensor, "N K"],
    temperature: float = STUDENT_TEMPERATURE,
) -> Float[Tensor, ""]:
    """Cross-entropy of logits with the probabilities in the same row: (N, K), (N, K) -> ()."""
    logs = (student.float() / temperature).log_softmax(dim=-1)
    return -(targets * logs).sum(dim=-1).mean()


@torch.no_grad()
def new_centre(
    centre: Float[Tensor, "K"], logits: Float[Tensor, "N K"], momentum: float
) -> Float[Tensor, "K"]:
    """The centre moved towards the mean row in float32; as it is where that is not finite."""
    mean = logits.float().mean(dim=0)
    moved = momentum * centre + (1 - momentum) * mean
    return torch.where(mean.isfinite().all(), moved, centre)


def teacher_temperature(
    progress: Progress, *, start: float, end: float, warmup_epochs: int
) -> float:
    """Linear from ``start`` to ``end`` over the epochs of the warm-up, then constant.

    A run shorter than the warm-up rises as far in its epochs, which the reference cannot do.
    """
    epochs = min(warmup_epochs, progress.total_epochs)
    if progress.epoch >= epochs:
        return end
    return start + (end - start) * progress.epoch / max(1, epochs - 1)


@torch.no_grad()
def mean_entropy(probabilities: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
    """Entropy of the mean row as a share of its largest value, log K: (N, K) -> () in [0, 1].

    Near 0 all rows choose the same prototype: one of the two ways to collapse.
    """
    mean = probabilities.float().mean(dim=0)
    return -torch.xlogy(mean, mean).sum() / math.log(len(mean))


@torch.no_grad()
def feature_spread(features: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
    """Standard deviation of the rows' directions, times sqrt(C): (N, C) -> ().

    1 for directions drawn evenly, 0 when all are the same: the other way to collapse.
    """
    directions = F.normalize(features.float(), dim=-1, eps=1e-12)
    deviation: Tensor = directions.std(dim=0, correction=0)
    return deviation.mean() * math.sqrt(features.shape[-1])
