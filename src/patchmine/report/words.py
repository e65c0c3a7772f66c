"""Numbers and names as a reader wants them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from patchmine.methods import METHODS

NOTHING = "\N{EN DASH}"
"""Stands where there is no value."""

TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "images_per_second": "Speed, samples/s",
    "data_wait": "Waiting for data",
    "slowest_rank": "Slowest process",
    "slowest_over_others": "Slowest process over the others",
    "skipped": "Skipped steps",
    "grad_norm": "Gradient norm",
    "knn": "kNN",
    "val": "Validation",
    "rank_correlation": "Rank correlation of difficulty and error",
    "position_share": "Difficulty explained by position",
    "monitor.rankme": "RankMe",
    "monitor.feature_std": "Deviation of features",
    "monitor.neighbours_kept": "Neighbours kept",
    "monitor.held_out_loss": "Held-out loss",
    "proposal": "Loss of proposals",
    "proposal_box": "Loss of proposals' boxes",
    "class": "Loss of classes",
    "box": "Loss of boxes",
    "mask": "Loss of masks",
}

SCORES = {
    "top1": "top-1",
    "top5": "top-5",
    "precision": "precision",
    "f1": "f1",
    "ap": "AP",
    "ap50": "AP50",
    "map": "mAP",
    "map50": "mAP50",
    "map75": "mAP75",
    "map_small": "mAP small",
    "map_medium": "mAP medium",
    "map_large": "mAP large",
    "mar100": "mAR100",
    "iou": "IoU",
    "miou": "mIoU",
    "boundary_iou": "boundary IoU",
    "dice": "Dice",
    "accuracy": "accuracy",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
    "neighbours_kept": "neighbours kept",
}
"""Scores in percent, as they are usually written; those of masks begin with ``mask_``."""


def number(value: float) -> str:
    """Four significant digits, thousands apart: 1,234 · 12.35 · 0.4123 · 1.5e-4 · 20."""
    if not math.isfinite(value):
        return NOTHING
    size = abs(value)
    if size < 1e9 and value == round(value):
        return whole(value)
    if size < 1e-3 or size >= 1e9:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    decimals = 4 if size < 1 else 3 - math.floor(math.log10(size))
    return f"{value:.{decimals}f}"


def whole(value: float) -> str:
    """1,200."""
    return f"{round(value):,}"


def percent(value: float | None) -> str:
    """A percentage with one decimal: 43.2 %."""
    return NOTHING if value is None else f"{value:.1f} %"


def is_share(name: str) -> bool:
    """Whether a score is in percent."""
    return name.removeprefix("mask_") in SCORES or name.startswith("recall_")


def score(name: str) -> str:
    """``mask_map50`` -> ``mask mAP50``; other names as `spoken` has them."""
    plain = name.removeprefix("mask_")
    if plain not in SCORES:
        return "R\N{SUPERSCRIPT TWO}" if name == "r2" else spoken(name)
    return SCORES[plain] if plain == name else f"mask {SCORES[plain]}"


def measure(value: float, name: str) -> str:
    """The value of a score, with its unit."""
    return percent(value) if is_share(name) else number(value)


def rate(value: float) -> str:
    """Samples/s: 1,234 · 12.3."""
    return whole(value) if value >= 100 else f"{value:.1f}"


def span(interval: tuple[float, float]) -> str:
    """The ends of an interval of differences: +6.1 to +11.9."""
    return f"{points(interval[0])} to {points(interval[1])}"


def method(name: str) -> str:
    """A method as its authors spell it: ``droppos`` -> ``DropPos``."""
    if name in METHODS:
        return METHODS[name].implementation.partition(":")[2]  # classes are spelt so
    return name.upper()


def points(value: float) -> str:
    """A difference of percentages: +9.1."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def gib(size: int) -> str:
    """Bytes of memory or disk."""
    return f"{size / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """3 h 05 min · 12 min 30 s · 45 s."""
    if not math.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def moment(seconds: float) -> str:
    """A time since 1970: 2026-11-30 00:12 UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def spoken(name: str) -> str:
    """``raw_pixels`` -> ``raw pixels``."""
    return name.replace("_", " ")


def title(name: str) -> str:
    """``loss_pixel`` -> ``Loss pixel``; known names as they are usually written."""
    words = spoken(name).replace("-", " ").strip()
    return TITLES.get(name, words[:1].upper() + words[1:])
