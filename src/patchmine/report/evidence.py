"""What the files of a run show: scores, differences from baselines, and how sure they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from patchmine.evaluate.evaluated import START
from patchmine.evaluate.paired import accuracy_interval, images_to_tell, unpaired_interval
from patchmine.report.curve_words import ends_of
from patchmine.report.reading import SHARES, RunRecord
from patchmine.report.series import finite_number

Interval = tuple[float, float]
PROTOCOLS = ("knn", "linear", "attentive", "video")
"""Those by which a run is judged, the first that is there."""

BASELINES = (START, "random_init", "raw_pixels")
"""What a run is measured by, the first that is there above all."""


@dataclass(frozen=True)
class Score:
    """An accuracy in percent on so many test images, where the file tells how many."""

    top1: float
    images: int | None

    @property
    def interval(self) -> Interval | None:
        """The ends of its 95 % interval."""
        if self.images is None:
            return None
        low, high = accuracy_interval(self.top1, self.images)
        return low, high


@dataclass(frozen=True)
class Difference:
    """An accuracy less another one, in points of percent.

    ``interval``: of 95 %, None where the number of images is unknown; ``is_paired``: of which
    images are right, not of the two accuracies alone.
    """

    name: str
    points: float
    interval: Interval | None
    images: int | None
    is_paired: bool

    @property
    def sign(self) -> int | None:
        """1: above, -1: below, 0: cannot be told, None: nobody knows on how many images."""
        if self.interval is None:
            return None
        low, high = self.interval
        return 1 if low > 0 else -1 if high < 0 else 0

    @property
    def enough_images(self) -> float:
        """With how many test images it could be told, if the difference stays as it is."""
        if self.interval is None or self.images is None:
            return math.inf
        return images_to_tell(self.points, self.interval, self.images)


def difference(
    name: str, own: Score, other: Score, paired: Interval | None = None, points: float | None = None
) -> Difference:
    """The first less the second; ``paired``: the interval where it is known image by image."""
    counts = (own.images, other.images)
    interval = paired
    if paired is None and counts[0] is not None and counts[1] is not None:
        interval = unpaired_interval((own.top1, other.top1), (counts[0], counts[1]))
    least = min((count for count in counts if count is not None), default=None)
    gap = own.top1 - other.top1 if points is None else points
    return Difference(name, gap, interval, least, paired is not None)


@dataclass(frozen=True)
class Measured:
    """An evaluation with an accuracy: of the model, and of its baselines in the order of worth."""

    name: str
    own: Score
    baselines: Mapping[str, float]
    differences: Sequence[Difference]


def measured(name: str, content: Mapping[str, object]) -> Measured | None:
    """What an eval/NAME.json says; None where it tells no accuracy."""
    top1 = _percent(content.get("top1"))
    if top1 is None:
        return None
    own = Score(top1, images_of(content))
    given = content.get("baselines", content.get("floors"))  # as earlier versions called them
    tables = given if isinstance(given, Mapping) else {}
    known = [*(key for key in BASELINES if key in tables), *sorted(map(str, tables))]
    baselines: dict[str, float] = {}
    differences = []
    for key in dict.fromkeys(known):
        table = tables.get(key)
        other = _percent(table.get("top1")) if isinstance(table, Mapping) else None
        if other is None or not isinstance(table, Mapping):
            continue
        baselines[key] = other
        change = content.get("since_start") if key == START else table.get("change")
        paired = _interval(change.get("interval")) if isinstance(change, Mapping) else None
        differences.append(difference(key, own, Score(other, own.images), paired))
    return Measured(name, own, baselines, differences)


def evaluations_of(run: RunRecord) -> list[Measured]:
    """Those with an accuracy, by which a run is judged: with baselines first, then as listed."""
    found = [measured(name, content) for name, content in run.evaluations.items() if name != SHARES]
    told = [each for each in found if each is not None]
    order = {name: place for place, name in enumerate(PROTOCOLS)}
    return sorted(
        told, key=lambda each: (not each.baselines, order.get(each.name, len(order)), each.name)
    )


def images_of(content: Mapping[str, object]) -> int | None:
    """How many test images a result is of."""
    images = content.get("images")
    if not isinstance(images, Mapping):
        return None
    for key in ("test_read", "test"):
        count = finite_number(images.get(key))
        if count is not None and 1 <= count < 1e12:
            return int(count)
    return None


def measured_on(content: Mapping[str, object]) -> str:
    """On which images, to tell whether two results can be compared."""
    images = content.get("images")
    how = images.get("how") if isinstance(images, Mapping) else content.get("data")
    return f"{how} {images_of(content)}"


def most_common(content: Mapping[str, object]) -> float | None:
    """The accuracy in percent of always naming the class that most test images have."""
    classes = content.get("per_class")
    tables = classes.values() if isinstance(classes, Mapping) else ()
    given = [table.get("count") for table in tables if isinstance(table, Mapping)]
    counts = [count for each in given if (count := finite_number(each)) is not None and count >= 0]
    total = sum(counts)
    return 100 * max(counts) / total if total > 0 else None


@dataclass(frozen=True)
class Guess:
    """What guessing gives: the value of a series, and what is guessed."""

    value: float
    own: float
    kind: str  # mean or place

    @property
    def is_beaten(self) -> bool:
        """Whether the run does clearly better."""
        return self.own < 0.99 * self.value if self.kind == "mean" else self.own > 2 * self.value


def guess_of(run: RunRecord) -> Guess | None:
    """What guessing would give in the newest numbers, where the settings tell.

    Targets that are standardised in each patch have variance 1 there: their mean square is the
    error of predicting the patch's mean (docs/report.md).
    """
    settings, series = run.settings, run.series
    if series.get("accuracy") and "method.pos_mask_ratio" in settings:
        patches = num_patches(settings)
        if patches:
            return Guess(100 / patches, 100 * ends_of(series["accuracy"])[1], "place")
        return None
    is_standard = settings.get("method.norm_pix_loss") == "true"
    others = settings.get("method.host", "mae") != "mae"
    if not is_standard or others or settings.get("method.target", "pixel") != "pixel":
        return None
    name = next((each for each in ("reconstruction", "loss") if each in series), None)
    return None if name is None else Guess(1.0, ends_of(series[name])[1], "mean")


def num_patches(settings: Mapping[str, str]) -> int | None:
    """Patches of an image, where size and patch are set."""
    sides = [int(text) for text in re.findall(r"\d{1,6}", settings.get("image_size", ""))]
    patch = [int(text) for text in re.findall(r"\d{1,6}", settings.get("patch_size", ""))]
    if not sides or not patch or 0 in patch:
        return None
    (height, width), (tall, wide) = (
        2 * each if len(each) == 1 else each[:2] for each in (sides, patch)
    )
    return (height // tall) * (width // wide) or None


def scores_in_training(run: RunRecord, quantities: Sequence[str]) -> Iterator[str]:
    """Names of series of scores, as ``knn.top1``."""
    return (
        name
        for name in run.series
        if name.partition(".")[2] in quantities and "monitor" not in name
    )


def _percent(value: object) -> float | None:
    number = finite_number(value)
    return number if number is not None and 0 <= number <= 100 else None


def _interval(value: object) -> Interval | None:
    ends = value if isinstance(value, list) and len(value) == 2 else []
    known = [end for each in ends if (end := finite_number(each)) is not None]
    return (known[0], known[1]) if len(known) == 2 and known[0] <= known[1] else None
