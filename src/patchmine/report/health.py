"""What the curves of a run say of its health, in sentences: collapse, over-fitting, distance, and
hard masks that do not follow the images.

The thresholds are ours; docs/training.md says them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from patchmine.report.reading import RunRecord
from patchmine.report.series import Floats, Series
from patchmine.report.words import number, percent

FEWEST_LOOKS = 3
"""That must agree, and one more: one may be noise, and features narrow as training begins."""

_COLLAPSED_RANK = 2.0  # 1: all features point in one direction
_LOST_RANK, _LOST_STD = 0.1, 0.05  # shares of the best before
_RISE, _FALL = 0.02, 0.01  # of the held-out loss and of the training loss, as shares of them
_BY_POSITION, _BLIND = 0.5, 0.2  # of maps of difficulty: beyond and below which they are no help
_FEWEST_LINES = 10  # of the log that must agree; maps follow the position as training begins
_FAR = 25.0  # percent of the neighbours kept, of a run that started from trained weights


@dataclass(frozen=True)
class Finding:
    """A sentence about a run; ``kind`` tells it from others, ``is_fault`` from mere news."""

    kind: str
    text: str
    is_fault: bool


def findings_of(
    series: Mapping[str, Series], steps_per_epoch: float | None, *, is_adapted: bool
) -> list[Finding]:
    """What is to be said of a run, the gravest first; of most runs nothing.

    Args:
        series: those of metrics.jsonl by name, as `reading.RunRecord` has them.
        steps_per_epoch: None: epochs are not told.
        is_adapted: the run started from trained weights.
    """
    return [
        *_collapse(series),
        *_over_fitting(series, steps_per_epoch),
        *_mining(series),
        *(_distance(series) if is_adapted else ()),
    ]


def health_of(run: RunRecord) -> list[Finding]:
    """The same of a run that was read."""
    is_adapted = run.settings.get("init", "none") != "none"
    return findings_of(run.series, run.steps_per_epoch, is_adapted=is_adapted)


def _collapse(series: Mapping[str, Series]) -> Iterator[Finding]:
    """RankMe near 1 or far below its best, or directions that hardly differ any more."""
    rank, std = series.get("monitor.rankme"), series.get("monitor.feature_std")
    if rank is None or std is None or len(rank.values) <= FEWEST_LOOKS:
        return
    recent, best = rank.values[-FEWEST_LOOKS:], float(rank.values.max())
    # Where images look alike, features of random weights begin below 2: that is no collapse
    collapsed = min(_COLLAPSED_RANK, (1 + best) / 2)
    if recent.max() < max(collapsed, _LOST_RANK * best):
        what = f"RankMe is {number(rank.last)}, and was {number(best)}"
    elif std.values[-FEWEST_LOOKS:].max() < _LOST_STD * std.values.max():
        most = number(float(std.values.max()))
        what = f"their standard deviation is {number(std.last)}, and was {most}"
    else:
        return
    text = f"The features collapsed: {what}. The encoder hardly tells images apart; "
    yield Finding("collapse", f"{text}try a lower blr.", is_fault=True)


def _over_fitting(series: Mapping[str, Series], steps_per_epoch: float | None) -> Iterator[Finding]:
    """The held-out loss rose from its lowest value, and the training loss fell since then."""
    held_out, trained = series.get("monitor.held_out_loss"), series.get("loss")
    if held_out is None or trained is None:
        return
    values, steps = held_out.values, held_out.steps
    at = int(values.argmin())
    low = float(values[at])
    if len(values) - at <= FEWEST_LOOKS or values[-FEWEST_LOOKS:].min() <= low + _RISE * abs(low):
        return
    before, now = _around(trained, steps, max(at, 1)), _around(trained, steps, len(steps) - 1)
    if before is None or now is None or now >= before - _FALL * abs(before):
        return
    since = f"step {steps[at]:.0f}"
    if steps_per_epoch:
        since = f"epoch {round(steps[at] / steps_per_epoch, 1):g}"
    rises = f"the held-out loss rises ({number(low)} to {number(held_out.last)})"
    falls = f"the training loss falls ({number(before)} to {number(now)})"
    text = f"The run over-fits since {since}: {rises} while {falls}. Fewer epochs or more images "
    yield Finding("over-fitting", f"{text}may avoid it.", is_fault=True)


def _mining(series: Mapping[str, Series]) -> Iterator[Finding]:
    """Difficulty that the place in the picture explains, and the errors of the step contradict."""
    shares, follows = series.get("position_share"), series.get("rank_correlation")
    if shares is None or follows is None or len(shares.values) < _FEWEST_LINES:
        return
    by_position = shares.values[-_FEWEST_LINES:].min() > _BY_POSITION
    if not by_position or follows.values[-_FEWEST_LINES:].max() >= _BLIND:
        return
    text = (
        "Hard masks do not follow the images: the place in the picture explains "
        f"{percent(100 * shares.last)} of the maps of difficulty, whose rank correlation with the "
        f"errors is {number(follows.last)}, so that the same places are masked in all images. "
        "Give predicting less weight with method.prediction_weight=0.1, or take method=mae."
    )
    yield Finding("mining", text, is_fault=True)


def _around(trained: Series, steps: Floats, look: int) -> float | None:
    """The mean training loss between a look at the held-out images and the one before."""
    between = (trained.steps > steps[look - 1]) & (trained.steps <= steps[look])
    return float(trained.values[between].mean()) if between.any() else None


def _distance(series: Mapping[str, Series]) -> Iterator[Finding]:
    kept = series.get("monitor.neighbours_kept")
    if kept is None or kept.values[-FEWEST_LOOKS:].max() >= _FAR:
        return
    text = f"{percent(kept.last)} of the nearest neighbours at step 0 are neighbours still."
    yield Finding("distance", f"The features have moved far from the start: {text}", is_fault=False)
