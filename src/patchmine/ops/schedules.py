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


def masked_share(progress: Progress, block: int, blocks: int) -> float:
    """Share of queries that are masked in one of the blocks that they go through: from 1 to 0.

    Each block's falls in a sixth of the run as a polynomial of power 0.9, the first one's from 1/6
    of the run on, the last one's until 5/6 (EoMT's configurations, `mask_annealing`).
    """
    start = 1 / 6 + (block / (2 * (blocks - 1)) if blocks > 1 else 0.0)
    done = 6 * (progress.fraction - start)
    return (1 - min(max(done, 0.0), 1.0)) ** 0.9


def cosine_decay(progress: Progress, *, start: float, end: float) -> float:
    """Decay of an EMA teacher: half a cosine over the steps of the run (DINO, MOKD, SCFS)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress.fraction))
