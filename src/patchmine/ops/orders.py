"""Orders in which the patches of an image are visited, and attention in such an order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

BY_CONTENT = ("attention_center", "similarity")
"""Orders that need to know how similar each patch is to the image."""

IN_GROUPS = ("attention_center", "center2out", "out2center")
"""Orders of whole rings or boxes, whose patches are in random order among themselves."""

_AT_RANDOM = (*IN_GROUPS, "stochastic")
_HALF_WIDTHS = (1, 3, 5)  # of the centred boxes, in patches (SAIM, models_saim.py)


def token_similarity(
    anchor: Float[Tensor, "B D"], tokens: Float[Tensor, "B L D"]
) -> Float[Tensor, "B L"]:
    """Cosine of one vector with each of many, float32: (B, D), (B, L, D) -> (B, L)."""
    anchor = F.normalize(anchor.float(), dim=-1, eps=1e-12)
    return (F.normalize(tokens.float(), dim=-1, eps=1e-12) * anchor[:, None]).sum(dim=-1)


def patch_levels(
    order: str, size: tuple[int, ...], similarity: Float[Tensor, "B L"] | None, device: torch.device
) -> Tensor:
    """What decides first when patches are put in order, lower is earlier: (B or 1, L).

    Whole numbers on a grid of ``size`` (rows, columns), but for ``similarity``, whose levels are
    the negated similarities (B, L): ``1 - softmax`` as in the reference would round close ones
    together.
    """
    if order == "attention_center":
        assert similarity is not None
        return squared_distances(similarity.argmax(dim=1), size)
    if order == "similarity":
        assert similarity is not None
        return -similarity
    row, column = _coordinates(size, device)
    if order == "rowmajor":
        return (row * size[1] + column)[None]
    if order == "serpentine":
        return (row * size[1] + torch.where(row % 2 == 1, size[1] - 1 - column, column))[None]
    if order == "stochastic":
        return torch.zeros_like(row)[None]
    inside = [_in_box(row, size[0], half) & _in_box(column, size[1], half) for half in _HALF_WIDTHS]
    boxes = torch.stack(inside).sum(dim=0)
    return (boxes if order == "out2center" else -boxes)[None]


def squared_distances(centre: Int[Tensor, "B"], size: tuple[int, ...]) -> Int[Tensor, "B L"]:
    """Squared distance of every patch from patch ``centre`` (B,), in patches: (B, L) int64."""
    row, column = _coordinates(size, centre.device)
    down, across = (centre // size[1])[:, None] - row, (centre % size[1])[:, None] - column
    return down * down + across * across


def _coordinates(size: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, two of (L,) int64."""
    number = torch.arange(size[0] * size[1], device=device)
    return number // size[1], number % size[1]


def _in_box(place: Tensor, side: int, half: int) -> Tensor:
    """Whether a coordinate lies within ``half`` patches of the middle of an axis."""
    return (2 * place - (side - 1)).abs() < 2 * half


def visiting_order(order: str, levels: Tensor, noise: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """``visited[:, r]`` is the patch of rank r: (1 or B, L), (B, L) -> (B, L) int64.

    Within a level patches are drawn by ``noise`` in [0, 1), in float64 (docs/methods/semaim.md).
    """
    key = levels.double().expand(len(noise), -1)
    if order in _AT_RANDOM:
        key = key + noise.double()
    return key.argsort(dim=1, stable=True)


def visibility(score: Tensor) -> tuple[Tensor, Tensor]:
    """Who may attend to whom by score (B, L): (B, 1 + L, 1 + L) and (B, L, 1 + L), True = may.

    Column 0 is the class token, which all may read and which reads itself.  Content reads itself
    and what has no higher score, queries what has a lower one.
    """
    score = F.pad(score.double(), (1, 0), value=float("-inf"))  # (B, 1 + L)
    content = score[:, :, None] >= score[:, None, :]
    query = score[:, 1:, None] > score[:, None, :]
    return content, query


def take(values: Shaped[Tensor, "B L D"], index: Int[Tensor, "B N"]) -> Shaped[Tensor, "B N D"]:
    """Rows by number: (B, L, D), (B, N) -> (B, N, D)."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[-1]))
