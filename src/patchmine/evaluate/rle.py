"""Masks as COCO's run lengths, whole or of the part of an image that an object takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchmine.data.sources.coco_masks import counts_of
from patchmine.errors import UserError

Rle = dict[str, Any]
"""``size``: [height, width]; ``counts``: COCO's compressed run lengths of the columns."""


def library() -> Any:
    """faster-coco-eval.  Raises UserError where it is missing."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError(
            "masks and average precision need faster-coco-eval, which is not installed; "
            "run `pip install patchmine[det]`"
        ) from error
    return faster_coco_eval


def encoded(masks: Tensor) -> list[Rle]:
    """Run lengths of masks (N, H, W), one after the other."""
    encode = library().mask.encode
    return [encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8)) for mask in masks]


def encoded_part(mask: NDArray[np.bool_], corner: tuple[int, int], size: tuple[int, int]) -> Rle:
    """Run lengths of a mask of ``size`` of which only a part (h, w) from ``corner`` on may be set.

    Args:
        mask: the part.
        corner: (top, left) of it.
        size: (height, width) of the whole, of which no array is made.
    """
    (top, left), (height, width) = corner, size
    columns = np.zeros((mask.shape[1], height), np.int8)
    columns[:, top : top + mask.shape[0]] = mask.T
    edges = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + left * height
    counts = np.diff([0, *edges.tolist(), height * width])
    counts = counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts
    whole = {"counts": counts.tolist(), "size": [height, width]}
    rle: Rle = library().mask.frPyObjects(whole, height, width)
    return rle


def decoded_part(rle: Rle, left: int, right: int) -> NDArray[np.bool_]:
    """(H, right - left) bool: some columns of a mask, without an array of all."""
    height, counts = rle["size"][0], rle["counts"]
    runs = counts_of(counts.decode() if isinstance(counts, bytes) else counts) or []
    ends = np.clip(np.cumsum(runs) - left * height, 0, (right - left) * height)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, np.diff(ends, prepend=0))
    return inside.reshape(right - left, height).T


def united(masks: Sequence[Rle]) -> Rle:
    """What any of some masks of one size covers."""
    rle: Rle = library().mask.merge([*masks]) if len(masks) > 1 else masks[0]
    return rle


def areas(masks: Sequence[Rle]) -> NDArray[np.float64]:
    """(N,) pixels of each."""
    pixels: NDArray[Any] = library().mask.area([*masks])
    return np.asarray(pixels, np.float64).reshape(len(masks))
