"""How the images of a step are mixed: drawn on the host, the same in every process."""

from __future__ import annotations

import math

import numpy as np

from patchmine.ops.mixing import Mixing

_MIXING = 3  # first word of the seed, another than those of the loader's streams


def mixing_generator(seed: int, step: int) -> np.random.RandomState:
    """The generator of one step; of the kind that timm draws from."""
    words = np.random.SeedSequence((_MIXING, seed, step))
    return np.random.RandomState(np.random.MT19937(words))


def draw_mixing(
    generator: np.random.RandomState,
    size: tuple[int, int],
    *,
    mixup: float,
    cutmix: float,
    prob: float,
    switch_prob: float,
    repeats: int = 1,
) -> Mixing:
    """One mixing for a whole batch, drawn as timm.data.Mixup draws it in batch mode.

    Args:
        generator: gives timm's numbers when it is in the state of numpy's global one.
        size: (height, width) of the images in pixels.
        mixup: alpha of blending, 0 for none.
        cutmix: alpha of exchanging boxes, 0 for none.
        prob: share of batches that are mixed.
        switch_prob: share of cutmix in them, where both are above 0.
        repeats: consecutive rows that show the same item.

    Returns:
        The mixing; with ``lam=1`` for a batch that stays as it is.
    """
    if not (mixup or cutmix) or generator.rand() >= prob:
        return Mixing(repeats=repeats)
    cuts = generator.rand() < switch_prob if mixup and cutmix else cutmix > 0
    alpha = cutmix if cuts else mixup
    lam = float(generator.beta(alpha, alpha))
    if not cuts or lam == 1:
        return Mixing(lam, repeats=repeats)
    height, width = size
    tall, wide = (int(side * math.sqrt(1 - lam)) for side in size)
    row, column = int(generator.randint(height)), int(generator.randint(width))
    top, bottom = max(0, row - tall // 2), min(height, row + (tall + 1) // 2)
    left, right = max(0, column - wide // 2), min(width, column + (wide + 1) // 2)
    # What the borders cut off stays the row's own
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixing(lam, (top, left, bottom, right), repeats)
