"""Gaussian blur of images and of random fields, in float32."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def blur_matrix(side: int, kernel: int, sigma: float) -> Float[Tensor, "{side} {side}"]:
    """(side, side) float32: from a line of pixels to the blurred line, with zeros beyond its ends.

    ``kernel`` is odd; its weights add up to 1.
    """
    offset = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    weights = torch.exp(-(offset**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    place = torch.arange(side)
    tap = place[None, :] - place[:, None] + kernel // 2  # (side, side)
    inside = (tap >= 0) & (tap < kernel)
    return torch.where(inside, weights[tap.clamp(0, kernel - 1)], 0.0).float()


def circular_blur_matrix(side: int, sigma: float) -> Float[Tensor, "{side} {side}"]:
    """(side, side) float32: from a line of numbers to the blurred line, whose ends meet.

    Every row is the Gaussian around its own place, wrapped around; its weights add up to 1.
    """
    turns = math.ceil(8 * sigma / side)  # what is further off weighs nothing in float32
    distance = torch.arange(side, dtype=torch.float64)[:, None] + side * torch.arange(
        -turns, turns + 1
    )
    weights = torch.exp(-(distance**2) / (2 * sigma**2)).sum(dim=1)  # (side,), by distance
    place = torch.arange(side)
    return (weights / weights.sum())[(place[None, :] - place[:, None]) % side].float()


def blurred(
    images: Float[Tensor, "B C H W"], rows: Float[Tensor, "H H"], columns: Float[Tensor, "W W"]
) -> Float[Tensor, "B C H W"]:
    """Images (B, C, H, W) under the blur matrices of their two axes, in float32."""
    with torch.autocast(images.device.type, enabled=False):
        return rows @ images.float() @ columns.T
