"""Objects found in views, as objects of their images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchmine.data.settings import InputSettings
from patchmine.data.views.objects import PlainObjectView
from patchmine.evaluate import found as module
from patchmine.evaluate.detection import _library
from patchmine.evaluate.found import in_image
from patchmine.models.detection import Found


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_boxes_and_masks_return_to_the_image(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
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
    masks = torch.as_tensor(_library().mask.decode(kept.masks)).movedim(-1, 0)
    assert masks.shape == (2, 50, 100)
    assert masks[0, 8:30, 15:61].all()
    assert not masks[0, :4].any()
    assert not masks[0, :, 66:].any()
    assert masks[1].float().mean() > 0.95


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
