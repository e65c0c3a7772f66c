"""How sure an accuracy is, and whether training has made an encoder better than its start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_NORMAL_95 = 1.959964  # half the width of the interval, in deviations
_NORMAL_80 = 0.841621  # below it lie four fifths
_WRITTEN = {"knn": "kNN"}


@dataclass(frozen=True)
class Change:
    """How many of the images only the trained encoder gets right, and how many only its start."""

    gained: int
    lost: int
    images: int

    @property
    def points(self) -> float:
        """What training has added to the accuracy in percent."""
        return 100 * (self.gained - self.lost) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of its 95 % interval, over which test images might have been drawn."""
        # Agresti and Min, Statistics in Medicine 24 (2005): Wald's interval of paired proportions
        # with half an image more in each of the four cells, which holds for few images, too.
        gained, lost, images = self.gained + 0.5, self.lost + 0.5, self.images + 2
        middle = (gained - lost) / images
        width = _NORMAL_95 * math.sqrt((gained + lost) / images - middle**2) / math.sqrt(images)
        return 100 * max(-1.0, middle - width), 100 * min(1.0, middle + width)

    def told(self) -> dict[str, object]:
        """The numbers for a result."""
        counts = {"gained": self.gained, "lost": self.lost, "images": self.images}
        return {"points": self.points, "interval": list(self.interval), **counts}

    def sentence(self, protocol: str, before: float, after: float, noun: str) -> str:
        """Whether training has helped, of top-1 in percent before and after it."""
        low, high = self.interval
        verdict = "It cannot be told whether adapting helped"
        if low > 0:
            verdict = "Adapting helped"
        elif high < 0:
            verdict = "Adapting made it worse"
        name = _WRITTEN.get(protocol, protocol)
        return (
            f"{verdict}: {name} {before:.1f} before, {after:.1f} after ({self.points:+.1f} points; "
            f"95 % interval {low:+.1f} to {high:+.1f} on {self.images:,} {noun}s)."
        )


def accuracy_interval(percent: float, images: int) -> list[float]:
    """The ends of the 95 % interval of an accuracy, in percent: Wilson's of a proportion."""
    # E. B. Wilson, Journal of the American Statistical Association 22 (1927)
    share, z = percent / 100, _NORMAL_95**2 / images
    middle = (share + z / 2) / (1 + z)
    width = math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return [100 * max(0.0, middle - width), 100 * min(1.0, middle + width)]


def unpaired_interval(
    percents: tuple[float, float], images: tuple[int, int]
) -> tuple[float, float]:
    """The ends of the 95 % interval of the first accuracy less the second, of other images each.

    Of accuracies on the same images it is wider than it need be.
    """
    # Newcombe, Statistics in Medicine 17 (1998), method 10: from the two intervals of Wilson
    (low, high), (other_low, other_high) = map(accuracy_interval, percents, images)
    (own, other), middle = percents, percents[0] - percents[1]
    down, up = math.hypot(own - low, other_high - other), math.hypot(high - own, other - other_low)
    return middle - down, middle + up


def images_to_tell(points: float, interval: tuple[float, float], images: int) -> float:
    """Test images with which the 95 % interval of such a difference leaves out 0 four times in
    five, given the interval on so many; infinite for no difference.
    """
    if not points:
        return math.inf
    width = (interval[1] - interval[0]) / 2  # which shrinks with the root of the number
    return images * ((_NORMAL_95 + _NORMAL_80) / _NORMAL_95 * width / points) ** 2


def ends_in_words(interval: Sequence[float]) -> str:
    """The ends of an interval of percentages: ``82.9 to 87.6``."""
    return " to ".join(f"{end:.1f}" for end in interval)


def interval_in_words(result: Mapping[str, Any]) -> str:
    """`` (95 % interval 78.1 to 85.0)`` of a result that has one; else nothing."""
    ends = result.get("top1_interval")
    return f" (95 % interval {ends_in_words(ends)})" if ends else ""


def change_between(before: Tensor, after: Tensor) -> Change:
    """The change of what is right (N,) bool, of the same images."""
    return Change(int((after & ~before).sum()), int((before & ~after).sum()), len(before))
