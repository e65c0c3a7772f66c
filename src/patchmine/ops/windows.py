"""Images larger than what a network takes, window by window, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Size = tuple[int, int]
Network = Callable[[Tensor], Tensor]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis; the last one ends where the axis does, as in mmseg."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def slide(
    image: Float[Tensor, "C H W"],
    window: Size,
    stride: Size,
    batch: int,
    network: Network,
    num_classes: int,
) -> Float[Tensor, "K H W"]:
    """Logits of a whole image: the mean over the windows that cover a pixel.

    Args:
        image: normalised, so that the padding of an image smaller than a window, which is 0, is
            the mean colour.
        window: (height, width).
        stride: (down, across).
        batch: windows that the network sees at once.
        network: (B, C, *window) -> (B, K, *window).
        num_classes: K.
    """
    return torch.cat([*_bands(image, window, stride, batch, network, num_classes)], 1)


def slide_classes(
    image: Float[Tensor, "C H W"],
    window: Size,
    stride: Size,
    batch: int,
    network: Network,
    num_classes: int,
) -> Int[Tensor, "H W"]:
    """The classes with the highest logits of `slide`, int16, without the logits of a whole image.

    No more than ``K * window[0] * W`` logits are kept at a time.
    """
    bands = _bands(image, window, stride, batch, network, num_classes)
    return torch.cat([band.argmax(0).to(torch.int16) for band in bands])


def _bands(
    image: Tensor, window: Size, stride: Size, batch: int, network: Network, num_classes: int
) -> Iterator[Tensor]:
    """Finished rows of logits, (K, rows, W), from the top down."""
    _, height, width = image.shape
    image = F.pad(image, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    tops = window_starts(image.shape[1], window[0], stride[0])
    lefts = window_starts(image.shape[2], window[1], stride[1])
    sums = image.new_zeros(num_classes, window[0], image.shape[2], dtype=torch.float32)
    counts = image.new_zeros(window[0], image.shape[2], dtype=torch.float32)
    for top, following in zip(tops, [*tops[1:], image.shape[1]], strict=True):
        rows = image[:, top : top + window[0]]
        for first in range(0, len(lefts), batch):
            some = lefts[first : first + batch]
            logits = network(torch.stack([rows[:, :, x : x + window[1]] for x in some]))
            for x, each in zip(some, logits, strict=True):
                sums[:, :, x : x + window[1]] += each
                counts[:, x : x + window[1]] += 1
        done = min(following - top, window[0])
        yield (sums[:, :done] / counts[:done])[:, : max(0, height - top), :width]
        sums = torch.cat([sums[:, done:], torch.zeros_like(sums[:, :done])], 1)
        counts = torch.cat([counts[done:], torch.zeros_like(counts[:done])])
