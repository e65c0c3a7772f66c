"""Views of images with objects: one geometry for pixels, boxes and masks, against slow versions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from coco_files import annotation, coco, write_part
from loading import start
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from patchmine.data.loader import plain_batches
from patchmine.data.settings import DetectViewSettings
from patchmine.data.sources.coco import CocoSource
from patchmine.data.views.objects import (
    ObjectView,
    PlainObjectView,
    boxes_in_image,
    boxes_of,
    jittered,
    seen_objects,
)
from patchmine.types import Objects, Sample

HEIGHT, WIDTH, SIZE = 40, 60, (48, 32)


def settings(**changes: Any) -> DetectViewSettings:
    return DetectViewSettings(image_size=SIZE, **changes)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)


def rectangles(seed: int, count: int = 12) -> Objects:
    """Boxes at whole pixels, each with a mask that fills it."""
    draws = np.random.default_rng(seed)
    left, top = draws.integers(0, WIDTH - 2, count), draws.integers(0, HEIGHT - 2, count)
    right = np.minimum(left + draws.integers(1, 30, count), WIDTH)
    bottom = np.minimum(top + draws.integers(1, 30, count), HEIGHT)
    boxes = torch.tensor(np.stack([left, top, right, bottom], 1)).float()
    masks = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (a, b, c, d) in zip(masks, boxes.int().tolist(), strict=True):
        mask[b:d, a:c] = True
    return Objects(boxes, torch.arange(count), torch.arange(count) % 3 == 0, masks)


def slow_masks(masks: Tensor, view: Sample) -> Tensor:
    """Each pixel of the view asks the image which one lies under its centre."""
    top, left, height, width = view.box.double().tolist()
    found = torch.zeros(len(masks), *SIZE, dtype=torch.bool)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            y = int((top + (row + 0.5) / SIZE[0] * height) * HEIGHT)
            x = int((left + (column + 0.5) / SIZE[1] * width) * WIDTH)
            if y < HEIGHT and x < WIDTH:
                found[:, row, column] = masks[:, y, x]
    return found.flip(-1) if view.flip else found


@pytest.mark.parametrize("seed", range(8))
def test_masks_and_boxes_move_with_the_pixels(seed: int) -> None:
    objects, view = rectangles(seed), ObjectView(settings())
    found = view(picture(), np.random.default_rng(seed), objects)
    boxes_only = Objects(objects.boxes, objects.labels, objects.crowd)
    only = view(picture(), np.random.default_rng(seed), boxes_only).target
    expected = slow_masks(objects.masks, found)
    # A centre that lies on the border of two pixels may count to either.
    wrong = (expected[found.target.labels] != found.target.masks).float().mean()
    assert wrong < 0.01
    assert found.target.masks.shape[1:] == SIZE
    kept = set(found.target.labels.tolist())
    large = {n for n, mask in enumerate(expected) if mask.sum() > 80}
    assert large <= kept <= set(only.labels.tolist())
    assert torch.equal(found.target.crowd, objects.crowd[found.target.labels])
    for place, number in enumerate(found.target.labels.tolist()):
        tight = found.target.boxes[place].tolist()
        rows, columns = found.target.masks[place].nonzero().unbind(1)
        assert tight == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        (exact,) = only.boxes[only.labels == number].tolist()
        assert np.allclose(tight, exact, atol=1.01)


@pytest.mark.parametrize("seed", range(6))
def test_pixels_are_those_of_the_whole_image_resized_and_cut(seed: int) -> None:
    smooth = F.interpolate(torch.rand(1, 3, 5, 6) * 255, (HEIGHT, WIDTH), mode="bicubic")
    image = smooth[0].clamp(0, 255).round().to(torch.uint8)
    generator = np.random.default_rng(seed)
    scale, offset = generator.uniform(0.1, 2), generator.random()
    view = ObjectView(settings())(image, np.random.default_rng(seed))
    factor = scale * min(SIZE[0] / HEIGHT, SIZE[1] / WIDTH)
    size = round(HEIGHT * factor), round(WIDTH * factor)
    whole = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    top, left = (
        round(max(0, side - limit) * offset) for side, limit in zip(size, SIZE, strict=True)
    )
    cut = whole[:, top : top + SIZE[0], left : left + SIZE[1]]
    seen = view.views[0][:, : cut.shape[1], : cut.shape[2]]
    difference = (seen.int() - cut.int()).abs().float()
    # The cut begins at a whole pixel of the image, which may be half of one away.
    assert difference.mean() < 0.5 + 6 * (size[0] > SIZE[0] or size[1] > SIZE[1])
    beside = [
        *view.views[0][:, cut.shape[1] :].flatten(1).T,
        *view.views[0][:, :, cut.shape[2] :].flatten(1).T,
    ]
    fill = [124, 116, 104]  # of ImageNet's mean
    assert all(pixel.tolist() == fill for pixel in beside)
    assert view.views[0].is_contiguous()
    assert view.views[0].shape == (3, *SIZE)


def test_sizes_are_as_published() -> None:
    """The image of `scale` times the fitting size, at most the view; only the cut is resized."""
    assert jittered(400, 600, (100, 100), 1.0, 0.5).size == (67, 100)
    assert jittered(400, 600, (100, 100), 0.1, 0.5).size == (7, 10)
    large = jittered(400, 600, (100, 100), 2.0, 0.5)
    assert (large.size, large.box) == ((100, 100), (50, 150, 300, 300))
    assert jittered(400, 600, (100, 100), 2.0, 0.0).box == (0, 0, 300, 300)
    one_way = jittered(200, 600, (100, 100), 2.0, 0.999)
    assert (one_way.size, one_way.box) == ((67, 100), (0, 300, 200, 300))
    assert jittered(1, 5000, (64, 64), 0.1, 0.3).size == (1, 6)
    assert jittered(3, 2, (64, 64), 2.0, 0.9).size == (64, 64)


def test_mirroring_is_that_of_the_padded_view() -> None:
    objects, geometry = rectangles(0), jittered(HEIGHT, WIDTH, SIZE, 0.7, 0.0)
    plain, mirrored = (
        seen_objects(objects, geometry, (HEIGHT, WIDTH), SIZE, flip) for flip in (False, True)
    )
    assert torch.equal(mirrored.masks, plain.masks.flip(-1))
    expected = torch.stack(
        [
            SIZE[1] - plain.boxes[:, 2],
            plain.boxes[:, 1],
            SIZE[1] - plain.boxes[:, 0],
            plain.boxes[:, 3],
        ],
        1,
    )
    assert torch.equal(mirrored.boxes, expected)
    without = Objects(objects.boxes, objects.labels, objects.crowd)
    seen = seen_objects(without, geometry, (HEIGHT, WIDTH), SIZE, True)
    back = seen_objects(without, geometry, (HEIGHT, WIDTH), SIZE, False)
    assert torch.allclose(seen.boxes[:, 0], SIZE[1] - back.boxes[:, 2])
    assert seen.boxes[:, 0].min() > 0


def test_small_objects_and_those_outside_are_dropped() -> None:
    boxes = torch.tensor([[0, 0, 30, 30], [50, 30, 60, 40], [2, 2, 3, 9.0]])
    objects = Objects(boxes, torch.arange(3), torch.zeros(3, dtype=torch.bool))
    assert PlainObjectView(settings())(picture(), None, objects).target.labels.tolist() == [0, 1]
    geometry = jittered(HEIGHT, WIDTH, SIZE, 1.9, 0.0)
    seen = seen_objects(objects, geometry, (HEIGHT, WIDTH), SIZE, False)
    assert seen.labels.tolist() == [0, 2]
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 5:25, 5:25] = masks[2, 2:9, 2:3] = True
    with_masks = Objects(boxes, objects.labels, objects.crowd, masks)
    left = seen_objects(with_masks, geometry, (HEIGHT, WIDTH), SIZE, False)
    assert left.labels.tolist() == [0, 2]
    assert left.boxes[0].tolist() == boxes_of(left.masks)[0].tolist() != seen.boxes[0].tolist()


def test_boxes_of_masks() -> None:
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, 1, 2] = masks[0, 3, 1] = masks[1] = True
    assert boxes_of(masks).tolist() == [[1, 1, 3, 4], [0, 0, 5, 4], [0, 0, 0, 0]]
    assert boxes_of(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (64, 64), (20, 90)])
def test_the_plain_view_leads_back_to_the_image(size: tuple[int, int]) -> None:
    view = PlainObjectView(DetectViewSettings(image_size=size))
    boxes = torch.tensor([[0, 0, 60, 40], [10, 5, 44.5, 33], [59, 39, 60, 40.0]])
    objects = Objects(boxes, torch.arange(3), torch.zeros(3, dtype=torch.bool))
    sample = view(picture(), np.random.default_rng(0), objects)
    assert sample.views[0].shape == (3, *size)
    assert not sample.flip
    back = boxes_in_image(sample.target.boxes, sample.box, HEIGHT, WIDTH, sample.views[0])
    assert torch.allclose(back, boxes[sample.target.labels], atol=1e-4)
    assert {0, 1} <= set(sample.target.labels.tolist())
    beyond = boxes_in_image(
        torch.tensor([[-3.0, -3, 99, 99]]), sample.box, HEIGHT, WIDTH, sample.views[0]
    )
    assert beyond.tolist() == [[0, 0, WIDTH, HEIGHT]]


def test_deeper_images_without_a_mean_are_padded_with_grey() -> None:
    image = np.full((HEIGHT, WIDTH, 2), 0.25, np.float32)
    view = PlainObjectView(DetectViewSettings(image_size=SIZE, channels=2))(image, None)
    seen, beside = view.views[0][:, :21], view.views[0][:, 21:]
    assert torch.allclose(seen, torch.tensor(0.25))
    assert (beside == 0.5).all()
    assert view.target is None


@pytest.mark.parametrize("scale", [(0, 1), (2, 1), (-1, 1)])
def test_scales_are_a_range(scale: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="scale"):
        DetectViewSettings(scale=scale)


def test_batches_of_a_coco_file(tmp_path: Any) -> None:
    objects = [annotation(n, image=1 + n % 3) for n in range(9)]
    source = CocoSource(write_part(tmp_path, tmp_path / "a.json", coco(objects, 4)), masks=True)
    view = ObjectView(settings(scale=(0.5, 1.0)))
    batches = list(
        start(source, view, batch_size=4, steps_per_epoch=1, total_steps=2, targets=True)
    )
    again = list(
        start(source, view, batch_size=4, steps_per_epoch=1, total_steps=2, targets=True, workers=2)
    )
    for one, two in zip(batches, again, strict=True):
        assert torch.equal(one.views[0], two.views[0])
        assert sorted(map(len, one.target)) == [0, 3, 3, 3]
        for left, right in zip(one.target, two.target, strict=True):
            assert torch.equal(left.boxes, right.boxes)
            assert torch.equal(left.masks, right.masks)
    (batch,) = plain_batches(source, PlainObjectView(settings()), batch_size=4, targets=True)
    assert [len(objects) for objects in batch.target] == [3, 3, 3, 0]
