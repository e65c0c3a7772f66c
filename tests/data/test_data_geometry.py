"""One geometry for an image, its mask and its boxes; targets travel to the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loading import seen, start

from patchmine.data.items import CLIP, IMAGE
from patchmine.data.loader import plain_batches
from patchmine.data.samples import collate
from patchmine.data.sources.contract import Labels
from patchmine.data.views.geometry import Geometry
from patchmine.data.views.images import PlainView, TrainView, View
from patchmine.data.views.normalise import normalise

GEOMETRIES = {
    "crop": Geometry((8, 16, 40, 48), (20, 24)),
    "mirrored": Geometry((8, 16, 40, 48), (20, 24), flip=True),
    "enlarged": Geometry((10, 20, 16, 16), (64, 48), flip=True),
    "whole": Geometry((0, 0, 64, 96), (32, 32)),
    "centre": Geometry((4, 14, 32, 32), (32, 32), canvas=(40, 60)),
}


def halves(height: int = 64, width: int = 96) -> torch.Tensor:
    """(H, W) classes: 0, 1, 2, 3 in the quarters, so that each place can be told."""
    mask = torch.zeros(height, width, dtype=torch.int64)
    mask[height // 2 :] += 2
    mask[:, width // 3 :] += 1
    return mask


@pytest.mark.parametrize("name", GEOMETRIES)
def test_image_and_mask_stay_aligned(name: str) -> None:
    geometry, mask = GEOMETRIES[name], halves()
    image = (mask * 80).to(torch.uint8)[None]
    pixels = geometry.apply(image, "bilinear")[0]
    pixels = pixels.flip(-1) if geometry.flip else pixels
    classes = geometry.apply_mask(mask)
    assert classes.shape == pixels.shape == geometry.size
    assert classes.dtype == torch.int64
    sure = pixels % 80 == 0  # away from edges, which resizing smoothes
    assert sure.float().mean() > 0.6
    assert (pixels[sure] // 80 == classes[sure]).float().mean() > 0.99
    assert set(classes.unique().tolist()) <= {0, 1, 2, 3}


def test_masks_keep_numbers_and_channels() -> None:
    geometry = GEOMETRIES["mirrored"]
    mask = torch.tensor([2**31 - 1, 7])[halves() % 2]
    assert set(geometry.apply_mask(mask).unique().tolist()) == {2**31 - 1, 7}
    both = geometry.apply_mask(torch.stack([halves(), 3 - halves()]))
    assert torch.equal(both[0] + both[1], torch.full((20, 24), 3))
    same = Geometry((0, 0, 64, 96), (64, 96))
    assert torch.equal(same.apply_mask(halves()), halves())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_boxes_are_where_the_mask_of_them_is(name: str) -> None:
    geometry, mask = GEOMETRIES[name], torch.zeros(64, 96, dtype=torch.uint8)
    mask[16:48, 24:60] = 1
    (left, top, right, bottom) = geometry.apply_boxes(torch.tensor([[24, 16, 60, 48.0]]), 64, 96)[0]
    rows, columns = geometry.apply_mask(mask).nonzero().T
    assert abs(rows.min() - top) <= 1
    assert abs(rows.max() + 1 - bottom) <= 1
    assert abs(columns.min() - left) <= 1
    assert abs(columns.max() + 1 - right) <= 1


@pytest.mark.parametrize(
    "view", [TrainView(seen(24)), PlainView(seen(24)), PlainView(seen(24), None)]
)
def test_a_view_shows_its_mask_as_its_image(view: View) -> None:
    mask = halves()
    image = (mask * 80).to(torch.uint8).expand(3, -1, -1)
    samples = [view(image, np.random.default_rng(seed), mask) for seed in range(8)]
    batch = normalise(collate(samples), torch.zeros(3), torch.ones(3), "cpu")
    assert batch.target is not None
    assert batch.target.shape == (8, 24, 24)
    levels = (batch.views[0][:, 0] * 255 / 80).round().long()
    assert (levels == batch.target).float().mean() > 0.9


class Labelled:
    name = fingerprint = "labelled"

    def __len__(self) -> int:
        return 16

    def read(self, index: int) -> Any:
        return np.full((12, 12, 3), index, np.uint8)

    def target(self, index: int) -> int:
        return index % 5

    def path(self, index: int) -> str:
        return f"{index}.png"

    def labels(self) -> Labels | None:
        return None


@pytest.mark.parametrize("workers", [0, 1])
def test_classes_travel_to_the_batch_where_they_are_asked_for(workers: int) -> None:
    for targets in (True, False):
        ways = (
            start(
                Labelled(), TrainView(seen(8)), steps_per_epoch=2, workers=workers, targets=targets
            ),
            plain_batches(Labelled(), PlainView(seen(8)), batch_size=6, targets=targets),
        )
        for batches in ways:
            for batch in batches:
                wanted = batch.index % 5 if targets else None
                assert (batch.to("cpu").target is None) is (wanted is None)
                assert wanted is None or torch.equal(batch.target, wanted)


def test_items_make_the_views_of_their_kind() -> None:
    settings = seen(16, clip={"frames": 4, "repeats": 3})
    assert [item.noun for item in (IMAGE, CLIP)] == ["image", "video"]
    assert [item.samples(settings) for item in (IMAGE, CLIP)] == [1, 3]
    assert [item.train_view(settings, 8, False).repeats for item in (IMAGE, CLIP)] == [1, 3]
    drawn = IMAGE.train_view(settings, 8, True)(
        np.zeros((30, 30, 3), np.uint8), np.random.default_rng(0)
    )
    assert len(drawn.views) == 10
    clip = CLIP.plain_view(settings, None)(
        np.zeros((9, 30, 30, 3), np.uint8), np.random.default_rng(0)
    )
    assert clip.views[0].shape == (3, 4, 16, 16)
