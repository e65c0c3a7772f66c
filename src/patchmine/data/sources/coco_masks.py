"""Segmentations of COCO files become masks: polygons and run lengths, compressed or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchmine.errors import UserError
from patchmine.types import Objects

_CHARACTERS = range(48, 48 + 64)  # of compressed counts: six bits each
_DIGIT, _MORE, _SIGN = 0x1F, 0x20, 0x10


def require_pycocotools() -> None:
    """UserError where what decodes segmentations is not installed."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        what = "masks of COCO files are decoded by pycocotools, which is not installed"
        raise UserError(f"{what}: pip install 'patchmine[det]'") from error


def packed(segmentation: Any) -> bytes:
    """A segmentation as it is kept: as compact as numbers of eight bytes, and exact."""
    return json.dumps(segmentation, separators=(",", ":")).encode()


def masks_of(segmentations: Sequence[bytes], height: int, width: int) -> Tensor:
    """(N, H, W) bool of packed segmentations without faults (see `coco_check`)."""
    pixels = np.zeros((len(segmentations), width * height), bool)  # by columns
    for mask, text in zip(pixels, segmentations, strict=True):
        counts = _counts(json.loads(text), height, width)
        mask[:] = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return torch.from_numpy(pixels).view(-1, width, height).transpose(1, 2)


def _counts(segmentation: Any, height: int, width: int) -> list[int]:
    """Lengths of the runs of 0, 1, 0, ... of one segmentation."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
    else:
        from pycocotools import mask as coco

        counts = coco.merge(coco.frPyObjects(segmentation, height, width))["counts"].decode()
    return (counts_of(counts) or []) if isinstance(counts, str) else counts


def counts_of(text: str) -> list[int] | None:
    """The run lengths in a compressed string; None where it is damaged.

    Each number is a series of characters of five bits, lowest first, with a bit that says whether
    another follows; from the fourth number on it is the difference to the number two before.
    """
    counts, value, shift = list[int](), 0, 0
    for code in text.encode("utf-8", "surrogatepass"):
        if code not in _CHARACTERS:
            return None
        digit = code - _CHARACTERS.start
        value |= (digit & _DIGIT) << shift
        shift += 5
        if digit & _MORE:
            continue
        if digit & _SIGN:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return None if shift else counts


def class_map(objects: Objects, num_classes: int, ignore: int = 255) -> Tensor:
    """(H, W) int64 of an image's objects, for semantic segmentation.

    Args:
        objects: with masks; of two on one pixel the later one counts.
        num_classes: of objects; class k becomes k + 1, and 0 is background.
        ignore: what pixels get that only a crowd covers.

    Raises:
        ValueError: objects without masks, or ``ignore`` is a class.
    """
    if objects.masks is None:
        raise ValueError("a class map needs the masks of the objects")
    if 0 <= ignore <= num_classes:
        raise ValueError(f"ignore={ignore} is one of {num_classes} classes and background")
    drawn = torch.zeros(objects.masks.shape[1:], dtype=torch.int64)
    # Single objects are drawn over the crowd that they stand in.
    for crowd in (True, False):
        for place in (objects.crowd == crowd).nonzero().flatten().tolist():
            drawn[objects.masks[place]] = ignore if crowd else int(objects.labels[place]) + 1
    return drawn
