"""Places on the grid as something to predict: smoothed targets, and a colour for each place."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchmine.types import Grid

Normalisation = Literal["column", "row"]

# Below this a neighbour weighs exp(-1e6), nothing, and 1 / sigma^2 would soon overflow
# (docs/methods/droppos.md).
LEAST_SIGMA = 1e-3

# Upper left, upper right, lower left, lower right: apart in brightness as well as in hue.
_CORNERS = ((0.99, 0.90, 0.36), (0.84, 0.22, 0.25), (0.20, 0.67, 0.62), (0.16, 0.13, 0.42))


def smoothing_map(
    size: tuple[int, ...],
    sigma: float,
    *,
    norm: Normalisation = "row",
    device: torch.device | str = "cpu",
) -> Float[Tensor, "L L"]:
    """How much of each place's target lies on every place, float32 (target L, place L).

    ``exp(-distance^2 / sigma^2)`` in patches, without a factor two, divided so that rows (one
    target's weights) or columns sum to one (docs/methods/droppos.md).
    """
    full = torch.ones(1, 1, device=device)
    for count in size:
        full = torch.kron(full, _along_one_axis(count, sigma, norm, device))
    return full


def _along_one_axis(
    count: int, sigma: float, norm: Normalisation, device: torch.device | str
) -> Tensor:
    if sigma < LEAST_SIGMA:
        return torch.eye(count, device=device)
    places = torch.arange(count, device=device, dtype=torch.float32)
    weights = torch.exp(-((places[:, None] - places) / sigma).square())
    return weights / weights.sum(dim=1 if norm == "row" else 0, keepdim=True)


def least_cross_entropy(targets: Float[Tensor, "T L"]) -> Float[Tensor, "T"]:
    """The lowest cross-entropy against each row of targets: (T, L) -> (T,).

    The entropy of a row that sums to one; another row is best met by the row divided by its sum.
    """
    mass = targets.sum(dim=-1)
    return torch.special.entr(targets).sum(dim=-1) - torch.special.entr(mass)


def place_colours(grid: Grid, device: torch.device | str = "cpu") -> Float[Tensor, "L 3"]:
    """A colour for each place, blended between four corners: (L, 3) in [0, 1]."""
    corners = torch.tensor(_CORNERS, device=device).reshape(2, 2, 3)
    down, across = (torch.linspace(0, 1, count, device=device) for count in grid.size)
    edges = torch.lerp(corners[0], corners[1], down[:, None, None])  # (rows, 2, 3): left and right
    return torch.lerp(edges[:, :1], edges[:, 1:], across[None, :, None]).flatten(0, 1)


def fill_patches(colours: Float[Tensor, "B L 3"], grid: Grid) -> Float[Tensor, "B 3 H W"]:
    """Every patch of an image filled with one colour: (B, L, 3) -> (B, 3, H, W)."""
    small = colours.transpose(1, 2).reshape(len(colours), 3, *grid.size)
    return small.repeat_interleave(grid.patch[0], dim=2).repeat_interleave(grid.patch[1], dim=3)
