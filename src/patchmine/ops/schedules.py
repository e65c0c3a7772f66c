"""What moves with time, as pure functions of `Progress` or of plain numbers."""

from __future__ import annotations

import math

from patchmine.types import Progress


def hard_count(progress: Progress, num_masked: int, *, start: float, end: float, offset: int) -> int:
    """H, how many of the masked patches are chosen as the hardest: ``int(M * alpha)``, constant within an epoch.

    ``alpha = start + (epoch + offset) / total_epochs * (end - start)``; the reference code has start 0, end 0.5 and
    offset 1 (HPM, generate_mask and engine_pretrain.py).
    """
    # In this order, because int() truncates and the reference multiplies in it too.
    alpha = start + (progress.epoch + offset) / progress.total_epochs * (end - start)
    return int(num_masked * min(max(alpha, 0.0), 1.0))


def ema_decay(progress: Progress, *, start: float, end: float, ramp_epochs: int | None) -> float:
    """Decay of an EMA teacher: linear from ``start`` to ``end`` over the first ``ramp_epochs``, in steps of one epoch.

    That is HPM's ramp (engine_pretrain.py); ``None`` ramps smoothly over the whole run instead, which suits short runs.
    """
    done = progress.fraction if ramp_epochs is None else progress.epoch / max(1, ramp_epochs)
    return start + min(done, 1.0) * (end - start)


def falling(progress: Progress, start: float) -> float:
    """Linear from ``start`` towards 0, in steps of one epoch; the last one has ``start / epochs`` left (DropPos)."""
    return start * (1 - progress.epoch / progress.total_epochs)


def cosine_decay(progress: Progress, *, start: float, end: float) -> float:
    """Decay of an EMA teacher: half a cosine from ``start`` to ``end`` over the steps of the run (DINO, MOKD, SCFS)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress.fraction))
