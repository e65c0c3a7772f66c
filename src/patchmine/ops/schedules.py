"""What moves with time, as pure functions of `Progress` or of plain numbers."""

from __future__ import annotations

import math

from patchmine.types import LrSchedule as LrSchedule
from patchmine.types import Progress


def learning_rate(progress: Progress, peak: float, schedule: LrSchedule) -> float:
    """The rate of a step under a schedule whose highest rate is ``peak``."""
    epoch = progress.step / progress.steps_per_epoch
    epochs = progress.total_steps / progress.steps_per_epoch
    warmup = schedule.warmup_epochs
    if epoch < warmup:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * epoch / warmup
    if schedule.kind == "multi_step":
        return peak * schedule.gamma ** sum(
            progress.fraction >= milestone for milestone in schedule.milestones
        )
    if schedule.kind == "constant" or epochs <= warmup:
        return peak
    start = warmup if schedule.warmup_prefix else 0.0
    if schedule.kind == "linear":
        return schedule.min_lr + (peak - schedule.min_lr) * (epochs - epoch) / (epochs - start)
    turn = math.pi * (epoch - start) / (epochs - start)
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1.0 + math.cos(turn))


def hard_count(
    progress: Progress, num_masked: int, *, start: float, end: float, offset: int
) -> int:
    """H, how many masked patches are the hardest ones: ``int(M * alpha)``, constant in an epoch.

    ``alpha = start + (epoch + offset) / total_epochs * (end - start)`` (HPM, generate_mask).
    """
    # In this order, because int() truncates and the reference multiplies in it too.
    alpha = start + (progress.epoch + offset) / progress.total_epochs * (end - start)
    return int(num_masked * min(max(alpha, 0.0), 1.0))


def ema_decay(progress: Progress, *, start: float, end: float, ramp_epochs: int | None) -> float:
    """Decay of an EMA teacher: linear over the first ``ramp_epochs``, in steps of one epoch (HPM).

    ``None`` ramps smoothly over the whole run instead, which suits short runs.
    """
    done = progress.fraction if ramp_epochs is None else progress.epoch / max(1, ramp_epochs)
    return start + min(done, 1.0) * (end - start)


def falling(progress: Progress, start: float) -> float:
    """Linear from ``start`` towards 0, in steps of one epoch; the last has ``start / epochs``."""
    return start * (1 - progress.epoch / progress.total_epochs)


def cosine_decay(progress: Progress, *, start: float, end: float) -> float:
    """Decay of an EMA teacher: half a cosine over the steps of the run (DINO, MOKD, SCFS)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress.fraction))
