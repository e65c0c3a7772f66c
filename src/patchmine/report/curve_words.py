"""What every curve is, which way is good, what would be worrying, and what it does in this run."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from patchmine.report import words
from patchmine.report.series import Floats, Series

_ABOUT = {
    "loss": "What training minimises: lower is better. Flat from the start, or rising, is "
    "worrying.",
    "lr": "The step size that the schedule gives: up in the warm-up, then down. Set, not measured.",
    "grad_norm": "Length of the gradient before it is clipped. Spikes, or growth to the end, "
    "are worrying: try a lower blr.",
    "images_per_second": "Speed of training, pauses for pictures and evaluations left out: higher "
    "is faster. A drop means that something else uses the machine, or the data come late.",
    "data_wait": "Share of the time spent waiting for data: lower is better. Above a tenth, more "
    "workers help.",
    "slowest_rank": "Number of the process that took longest for its own part of a step. One and "
    "the same all along: look at its machine, or its data.",
    "slowest_over_others": "How long the slowest process takes for its own part of a step, where "
    "the others take 1: near 1 is good. All wait for it.",
    "skipped": "Steps without a finite gradient, which were left out: 0 is good. More than a few: "
    "try a lower blr.",
    "monitor.rankme": "How many directions the features use, without labels: higher is mostly "
    "better. Near 1 they have collapsed.",
    "monitor.feature_std": "How much the directions of features differ, without labels. At 0 all "
    "images look alike, which is a collapse.",
    "monitor.neighbours_kept": "Nearest neighbours at step 0 that are neighbours still. A fall "
    "says that the features change; neither end is good by itself.",
    "monitor.held_out_loss": "The loss on images that are not trained on: lower is better. Rising "
    "while the loss falls is over-fitting.",
    "reconstruction": "Error of the predicted patches: lower is better; flat from the start is "
    "worrying.",
    "prediction": "Error in predicting which patches are hard: lower is better. 0.693 is a guess "
    "where their order is predicted.",
    "counted": "Share of what is predicted of which there is data (missing=mask); the loss over it "
    "is the mean error of that. Set by the images, not learned.",
    "rank_correlation": "Whether the patches that were expected to be hard had the larger errors: "
    "1 is the same order, 0 none. Higher is better; near 0, mining picks at random.",
    "position_share": "How much of the maps of difficulty the place in the picture explains: lower "
    "is better. Near 1, mining follows the position and not the image.",
    "consistency": "How far predictions of one patch from several parts are apart, as it is "
    "weighed: lower is better.",
    "disagreement": "How far predictions of one patch from several parts are apart: lower is "
    "better, but 0 at once would be a collapse.",
    "position": "Error in placing patches: lower is better.",
    "pixels": "Error of predicted pixels: lower is better.",
    "above_floor": "The loss less the smallest that its targets allow: 0 is perfect.",
    "accuracy": "Share that is told right in training: higher is better. Near 100 % while the "
    "validation falls is over-fitting.",
    "weighted_accuracy": "Patches that are placed right, weighed as in the loss: higher is better.",
    "first_patch": "Error of the first patch, of which nothing is seen: it should stay near its "
    "start. A fall far below the others is worrying.",
    "first_tenth": "Error of the first tenth of the patches, of which little is seen: falls least.",
    "last_half": "Error of the last half of the patches, of which most is seen: lower is better.",
    "dino": "Cross-entropy of the student with its teacher's view of the whole image: lower is "
    "better, if the entropy stays up.",
    "agreement": "Share of images that both teachers put to the same prototype: rises as they "
    "agree. Near 1 with little entropy is a collapse.",
    "auxiliary": "Loss of the auxiliary head, which training alone uses: lower is better.",
    "dice": "Dice loss, of overlap: lower is better.",
    "proposal": "Whether proposals hold an object: lower is better.",
    "proposal_box": "Error of the proposals' boxes: lower is better.",
    "class": "Error in naming what is in a box: lower is better.",
    "box": "Error of the boxes: lower is better.",
    "mask": "Error of the masks: lower is better.",
}
_FAMILIES = (  # names with a part that varies
    (r"lr_.+", _ABOUT["lr"]),
    (
        r"(partner_)?entropy(_.+)?",
        "How evenly the teacher uses its prototypes. Falling to 0 is a collapse.",
    ),
    (
        r"(partner_)?feature_spread",
        "How much features of different images differ: 1 is even. Falling to 0 is a collapse.",
    ),
    (
        r"(partner_)?(self|cross)_.+|(global|search)_.+",
        "One term of the loss, without its weight: lower is better, if the entropy stays up.",
    ),
    (r"val\.loss", "The loss on validation images: lower is better; rising is over-fitting."),
    (r"val\.(rmse|mae)", "Error on validation images, in their own units: lower is better."),
    (
        r"val\..+",
        "On validation images, while training runs: higher is better. Falling for long while the "
        "loss falls is over-fitting.",
    ),
    (
        r".+\..+",
        "On labelled images that are not trained on, by the frozen features: higher is better. "
        "Falling for long is worrying, whatever the loss does.",
    ),
)
_OTHER = "A term that is logged beside the loss; the page of the method says which way is good."
_HEIGHTS = "Different methods minimise different things: compare the shapes, not the heights."

_ENDS, _TAIL = 20, 10  # the last twentieth is averaged, the last tenth looked at
_FEWEST_IN_TAIL = 4
_SMALL = 0.01  # of the larger end: no change worth a word
_FLAT = 0.1  # of it, between the smallest and the largest value
_SURE = 2.0  # standard errors of a slope


def about(name: str, *, one_kind: bool) -> str:
    """What the quantity of this name in metrics.jsonl is; ``one_kind``: of one method only."""
    text = _ABOUT.get(name)
    if text is None:
        text = next((told for part, told in _FAMILIES if re.fullmatch(part, name)), _OTHER)
    if name in ("loss", "monitor.held_out_loss") and not one_kind:
        text = f"{text} {_HEIGHTS}"
    return text


def does(series: Series, show: Callable[[float], str], *, is_score: bool = False) -> str:
    """What a curve does, as in "fell from 1.02 to 0.61, still falling in the last tenth".

    Args:
        series: its values; those of a score are few and told with the best.
        show: writes a value.
        is_score: higher is better.
    """
    values = series.values
    if len(values) == 1:
        return f"{show(series.last)}, a single value so far"
    first, last = ends_of(series)
    if abs(last - first) <= _SMALL * max(abs(first), abs(last)):
        low, high = float(values.min()), float(values.max())
        if high - low <= _FLAT * abs(last):
            return f"stayed near {show(last)}"
        return f"ended near its start, at {show(last)}, between {show(low)} and {show(high)}"
    text = f"{'rose' if last > first else 'fell'} from {show(first)} to {show(last)}"
    if is_score:
        best = int(values.argmax())
        if values[best] > last:
            step = words.whole(float(series.steps[best]))
            return f"{text}; best {show(float(values[best]))} at step {step}"
        return text
    tail = _slope(values[-max(_FEWEST_IN_TAIL, len(values) // _TAIL) :], abs(last - first))
    if tail is None or len(values) < _FEWEST_IN_TAIL * _TAIL:
        return text
    if tail == 0:
        return f"{text}, flat in the last tenth"
    again = "still " if (tail > 0) == (last > first) else ""
    return f"{text}, {again}{'rising' if tail > 0 else 'falling'} in the last tenth"


def ends_of(series: Series) -> tuple[float, float]:
    """The first value of a curve, which may fall steeply, and the mean of its last twentieth."""
    reach = max(1, len(series.values) // _ENDS)
    return float(series.values[0]), float(series.values[-reach:].mean())


def _slope(values: Floats, change: float) -> int | None:
    """Whether values rise (1), fall (-1) or neither, as far as their noise lets one tell."""
    count = len(values)
    if count < _FEWEST_IN_TAIL:
        return None
    x = np.arange(count) - (count - 1) / 2
    slope = float(x @ values / (x @ x))
    rest = values - values.mean() - slope * x
    error = float(np.sqrt(rest @ rest / max(1, count - 2) / (x @ x)))
    if abs(slope) <= _SURE * error or abs(slope) * count <= _SMALL * change:
        return 0
    return 1 if slope > 0 else -1
