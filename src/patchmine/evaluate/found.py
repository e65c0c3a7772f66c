"""What a network found in views, as objects of the images that these were made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from patchmine.data.views.objects import boxes_in_image
from patchmine.evaluate.detection import KeptObjects, Rle, encoded
from patchmine.models.detection import Found

_AT_ONCE = 16_000_000  # pixels of masks, so that a hundred of a large image need little memory


def in_image(found: Found, view: Tensor, box: Tensor, size: tuple[int, int]) -> KeptObjects:
    """The objects of one view in pixels of its image, on the host.

    Args:
        found: in the view.
        view: (C, H, W), not mirrored.
        box: (4,) where in the image it lies, as of `Batch`.
        size: (height, width) of the image.
    """
    boxes = boxes_in_image(found.boxes.float().cpu(), box.cpu(), *size, view)
    masks = None if found.masks is None else _pasted(found.masks.float().cpu(), boxes, size)
    none = torch.zeros(len(boxes), dtype=torch.bool)
    return KeptObjects(boxes, found.labels.cpu(), found.scores.cpu(), none, masks)


def _pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Rle]:
    """Run lengths of masks (N, 1, m, m) that are told inside their boxes."""
    few = max(1, _AT_ONCE // (size[0] * size[1]))
    found: list[Rle] = []
    for start in range(0, len(masks), few):
        part = slice(start, start + few)
        pasted = paste_masks_in_image(masks[part], boxes[part], size)  # (few, 1, height, width)
        found += encoded(pasted[:, 0] >= 0.5)
    return found
