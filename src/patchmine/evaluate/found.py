"""What a network found in views, as objects of the images that these were made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import expand_boxes, paste_masks_in_image

from patchmine.data.views.objects import boxes_in_image
from patchmine.evaluate.detection import KeptObjects
from patchmine.evaluate.rle import Rle, encoded_part
from patchmine.models.detection import Found


def in_image(found: Found, view: Tensor, box: Tensor, size: tuple[int, int]) -> KeptObjects:
    """The objects of one view in pixels of its image, on the host.

    Args:
        found: in the view.
        view: (C, H, W), not mirrored.
        box: (4,) where in the image it lies, as of `Batch`.
        size: (height, width) of the image.
    """
    boxes = boxes_in_image(found.boxes.float().cpu(), box.cpu(), *size, view)
    masks = None
    if found.masks is not None:
        each = zip(found.masks.float().cpu(), boxes, strict=True)
        masks = [_pasted(mask, own, size) for mask, own in each]
    none = torch.zeros(len(boxes), dtype=torch.bool)
    return KeptObjects(boxes, found.labels.cpu(), found.scores.cpu(), none, masks)


def _pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Rle:
    """Run lengths of a mask (1, m, m) that is told inside its box.

    Only the part of the image around the box is made: objects may be small and images large.
    """
    cells = mask.shape[-1]
    around = expand_boxes(box[None], (cells + 2) / cells)[0]  # as torchvision pads masks
    left, top = (around[:2].floor().clamp(min=0)).int().tolist()
    right, bottom = (int(side) + 2 for side in around[2:].tolist())
    part = min(bottom, size[0]) - top, min(right, size[1]) - left
    if min(part) <= 0:
        return encoded_part(torch.zeros(0, 0).bool().numpy(), (0, 0), size)
    shift = torch.tensor([left, top, left, top])
    pasted = paste_masks_in_image(mask[None], (box - shift)[None], part)[0, 0]  # (h, w)
    return encoded_part((pasted >= 0.5).numpy(), (top, left), size)
