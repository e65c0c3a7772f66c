"""Mixup and CutMix of a batch, between neighbours: row 2i with row 2i + 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """How the rows of one step are mixed; numbers on the host, so that no device is waited for.

    Args:
        lam: share of a row that stays its own.
        box: (top, left, bottom, right) in pixels, which the partner's pixels fill (CutMix);
            None: all pixels are blended (mixup).
        repeats: consecutive rows that show the same item; partners are then rows of another one.
    """

    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None
    repeats: int = 1


# timm mixes row i with row B - 1 - i.  Between neighbours, processes and accumulated parts of an
# even number of rows mix the same pairs as the whole batch does.
def partners(rows: Float[Tensor, "B *rest"], repeats: int = 1) -> Float[Tensor, "B *rest"]:
    """(B, ...): for each row the one that it is mixed with; B is a multiple of 2 * repeats."""
    return rows.reshape(-1, 2, repeats, *rows.shape[1:]).flip(1).reshape(rows.shape)


def mix_images(images: Float[Tensor, "B C *space"], mixing: Mixing) -> Float[Tensor, "B C *space"]:
    """Images (B, C, H, W) or clips (B, C, T, H, W), of which all frames are mixed alike."""
    if mixing.lam == 1:
        return images
    others = partners(images, mixing.repeats)
    if mixing.box is None:
        return images * mixing.lam + others * (1 - mixing.lam)
    top, left, bottom, right = mixing.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed


def mix_targets(targets: Float[Tensor, "B K"], mixing: Mixing) -> Float[Tensor, "B K"]:
    """The targets (B, K) of mixed images."""
    if mixing.lam == 1:
        return targets
    return targets * mixing.lam + partners(targets, mixing.repeats) * (1 - mixing.lam)


def smoothed(labels: Int[Tensor, " B"], num_classes: int, smoothing: float) -> Float[Tensor, "B K"]:
    """(B, K) float32: 1 at each label, of which all classes share ``smoothing``."""
    rest = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), rest, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + rest)
