"""Objects found in views, as objects of their images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from patchmine.data.settings import InputSettings
from patchmine.data.views.objects import PlainObjectView
from patchmine.evaluate.found import in_image
from patchmine.evaluate.rle import areas, decoded_part, encoded, library, united
from patchmine.models.detection import Found


def test_boxes_and_masks_return_to_the_image() -> None:
    image = np.zeros((50, 100, 3), np.uint8)
    sample = PlainObjectView(InputSettings(image_size=(64, 64)))(image, None)
    boxes = torch.tensor([[8.0, 4, 40, 20], [0, 0, 64, 32]])  # of a view half as large
    full = torch.ones(2, 1, 14, 14)
    found = Found(boxes, torch.tensor([1, 0]), torch.tensor([0.9, 0.4]), full)
    kept = in_image(found, sample.views[0], sample.box, (50, 100))
    assert kept.boxes[0].tolist() == pytest.approx([12.5, 6.25, 62.5, 31.25])
    assert kept.boxes[1].tolist() == pytest.approx([0, 0, 100, 50])
    assert kept.labels.tolist() == [1, 0]
    assert not kept.crowd.any()
    masks = torch.as_tensor(library().mask.decode(kept.masks)).movedim(-1, 0)
    assert masks.shape == (2, 50, 100)
    assert masks[0, 8:30, 15:61].all()
    assert not masks[0, :4].any()
    assert not masks[0, :, 66:].any()
    assert masks[1].float().mean() > 0.95


def test_masks_are_those_that_are_pasted_into_the_whole_image() -> None:
    generator, size = torch.Generator().manual_seed(0), (45, 70)
    view, whole = torch.zeros(3, *size), torch.tensor([0, 0, 1.0, 1.0])
    corners = torch.rand(60, 2, 2, generator=generator) * torch.tensor([70.0, 45])
    corners[::5, 0], corners[::7, 1] = 0, torch.tensor([70.0, 45])  # along the borders
    corners[::3] = corners[::3].round()
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    masks = torch.rand(60, 1, 28, 28, generator=generator)
    found = Found(boxes, torch.zeros(60).long(), torch.ones(60), masks)
    kept = in_image(found, view, whole, size)
    pasted = paste_masks_in_image(masks, kept.boxes, size)[:, 0] >= 0.5
    assert kept.masks == encoded(pasted)
    for rle, mask, box in zip(kept.masks or [], pasted, kept.boxes.int().tolist(), strict=True):
        np.testing.assert_array_equal(decoded_part(rle, box[0], box[2]), mask[:, box[0] : box[2]])


def test_masks_are_united() -> None:
    masks = torch.zeros(3, 6, 5, dtype=torch.bool)
    masks[0, :2], masks[1, 1:4, 2], masks[2, 5, 4] = True, True, True
    runs = encoded(masks)
    assert united(runs) == encoded(masks.any(0)[None])[0]
    assert united(runs[:1]) == runs[0]
    assert areas(runs).tolist() == [10, 3, 1]
    assert areas([]).shape == (0,)


def test_there_may_be_no_masks_and_no_objects() -> None:
    view, box = torch.zeros(3, 64, 64), torch.tensor([0, 0, 1.0, 1.0])
    nothing = Found(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), None)
    kept = in_image(nothing, view, box, (64, 64))
    assert len(kept) == 0
    assert kept.masks is None
    with_masks = in_image(
        Found(nothing.boxes, nothing.labels, nothing.scores, torch.zeros(0, 1, 28, 28)),
        view,
        box,
        (64, 64),
    )
    assert with_masks.masks == []
