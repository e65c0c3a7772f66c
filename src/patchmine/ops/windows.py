"""Images larger than what a network takes, window by window, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Size = tuple[int, int]
Network = Callable[[Tensor], Tensor]

_PIECE, _AT_ONCE = 32, 1 << 22  # rows, and scores after it, that are resized at a time


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis; the last one ends where the axis does, as in mmseg."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def score_bands(
    image: Tensor,
    window: Size,
    stride: Size,
    batch: int,
    network: Network,
    prepare: Network = lambda windows: windows,
) -> Iterator[Float[Tensor, "K rows W"]]:
    """Scores of a whole image in bands of rows from the top down: means over windows.

    No more than ``K * window[0] * W`` scores are kept at a time, and a band must be used before the
    next one is asked for, whose place it takes.

    Args:
        image: (C, H, W), of bytes perhaps.
        window: (height, width).
        stride: (down, across), no larger.
        batch: windows that the network sees at once, whatever row they are of.
        network: (B, C, *window) -> (B, K, *window).
        prepare: windows (B, C, h, w) of the image, as small as it is, before they are padded with
            zeros: normalises them, so that 0 is the mean colour.
    """
    _, height, width = image.shape
    high, wide = window
    tops = window_starts(max(height, high), high, stride[0])
    lefts = window_starts(max(width, wide), wide, stride[1])
    places, sums = list(product(tops, lefts)), None
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        seen = prepare(torch.stack([image[:, y : y + high, x : x + wide] for y, x in some]))
        seen = F.pad(seen, (0, wide - seen.shape[3], 0, high - seen.shape[2]))
        scores = network(seen)
        sums = sums or _Sums(scores, max(width, wide))
        for (top, left), each in zip(some, scores, strict=True):
            for band in sums.finished(top):
                yield band[..., :width]
            sums.add(top, left, each)
        del seen, scores, each  # so that they are gone while the next ones are made
    assert sums is not None  # there is one window at least
    for band in sums.finished(height):
        yield band[..., :width]


class _Sums:
    """Scores of as many rows as a window has; row y of the image stands at y modulo that."""

    def __init__(self, scores: Tensor, width: int) -> None:
        classes, self.high = scores.shape[1:3]
        self.sums = scores.new_zeros(classes, self.high, width, dtype=torch.float32)
        self.counts = scores.new_zeros(self.high, width, dtype=torch.float32)
        self.first = 0  # of the rows that are here

    def add(self, top: int, left: int, scores: Tensor) -> None:
        """A window (K, h, w)."""
        start, columns = top % self.high, slice(left, left + scores.shape[2])
        split = self.high - start
        self.sums[:, start:, columns] += scores[:, :split]
        self.sums[:, :start, columns] += scores[:, split:]
        self.counts[:, columns] += 1

    def finished(self, top: int) -> Iterator[Tensor]:
        """Means of the rows above ``top``, which no window covers any more; then these are 0."""
        while self.first < top:
            start = self.first % self.high
            rows = slice(start, min(self.high, start + top - self.first))
            yield self.sums[:, rows].div_(self.counts[rows])
            self.sums[:, rows], self.counts[rows] = 0, 0
            self.first += rows.stop - start


def resized_bands(
    bands: Iterable[Float[Tensor, "K rows w"]], height: int, size: Size
) -> Iterator[Float[Tensor, "K rows W"]]:
    """Bands of scores at another size: bilinear, as `F.interpolate` without ``align_corners``.

    Args:
        bands: of ``height`` rows in all.
        height: of what they are scores of.
        size: (H, W).
    """
    places = (torch.arange(size[0]) + 0.5) * torch.tensor(height / size[0]) - 0.5
    places = places.clamp_min(0)
    above = places.long()
    shares, below = places - above, (above + 1).clamp_max(height - 1)
    done, first, last_row = 0, 0, None
    for band in (piece for whole in bands for piece in torch.split(whole, _PIECE, 1)):
        rows = band if last_row is None else torch.cat([last_row, band], 1)
        last = first + rows.shape[1] - 1
        ready = int((below <= last).sum())
        step = max(1, _AT_ONCE // (rows.shape[0] * size[1]))
        for start in range(done, ready, step):
            some = slice(start, min(start + step, ready))
            upper, lower = (
                rows[:, (each[some] - first).to(rows.device)] for each in (above, below)
            )
            mixed = torch.lerp(upper, lower, shares[some, None].to(rows.device))  # (K, some, w)
            wide = (mixed.shape[1], size[1])
            yield F.interpolate(mixed[None], wide, mode="bilinear", align_corners=False)[0]
        done, first, last_row = ready, last, rows[:, -1:].clone()


def best_classes(bands: Iterable[Float[Tensor, "K rows W"]], size: Size) -> Int[Tensor, "H W"]:
    """The classes with the highest scores, int16, of bands of ``size`` = (H, W)."""
    classes, first = torch.empty(0), 0
    for band in bands:
        if not first:
            classes = torch.empty(size, dtype=torch.int16, device=band.device)
        classes[first : first + band.shape[1]] = band.argmax(0)
        first += band.shape[1]
    return classes
