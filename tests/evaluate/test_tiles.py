"""Large images looked at piece by piece: what is found is what whole images show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from patchmine.config.schema import DetectConfig
from patchmine.evaluate.detection import KeptObjects
from patchmine.evaluate.rle import library
from patchmine.evaluate.tiles import ObjectFinder, Tile, auto_tile, merged, tiles_of
from patchmine.models.detection import Found
from patchmine.types import Batch

VIEW, PADDING = 64, 124


def config(**settings: object) -> DetectConfig:
    given = {"data": "x", "model": "vit_tiny_patch16_224", "image_size": VIEW, **settings}
    return DetectConfig.model_validate(given)


def drawn(boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
    """(3, H, W): rectangles (left, top, right, bottom), each of a colour of its own."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        image[0, top:bottom, left:right] = number
    return image


def sees_colours(batch: Batch, blind: int = 2) -> list[Found]:
    """A stub of a detector: finds what has a colour, but no piece of ``blind`` pixels.

    The class is whether the colour is odd; larger pieces are surer.
    """
    every = []
    for view in batch.views[0]:
        boxes, labels, scores = [], [], []
        for number in (n for n in view[0].unique().tolist() if 0 < n < PADDING):
            rows, columns = (view[0] == number).nonzero().T
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            if min(box[2] - box[0], box[3] - box[1]) <= blind:
                continue
            boxes.append([float(side) for side in box])
            labels.append(int(number) % 2)
            scores.append(0.5 + len(rows) / 1e5)
        masks = torch.ones(len(boxes), 1, 28, 28)
        every.append(
            Found(
                torch.tensor(boxes).reshape(-1, 4),
                torch.tensor(labels, dtype=torch.int64),
                torch.tensor(scores),
                masks,
            )
        )
    return every


def as_set(objects: KeptObjects) -> list[tuple[int, ...]]:
    rows = torch.cat([objects.labels[:, None], objects.boxes.round().long()], 1)
    return sorted(map(tuple, rows.tolist()))


def scene(seed: int) -> tuple[list[tuple[int, int, int, int]], tuple[int, int]]:
    """Disjoint rectangles in cells of a grid that tiles do not know of."""
    generator = np.random.default_rng(seed)
    size, boxes = (170, 230), []
    for top in range(0, size[0] - 22, 23):
        for left in range(0, size[1] - 26, 27):
            if generator.random() < 0.7:
                high, wide = generator.integers(5, 21), generator.integers(5, 25)
                y, x = top + generator.integers(0, 3), left + generator.integers(0, 3)
                boxes.append((int(x), int(y), int(x + wide), int(y + high)))
    return boxes, size


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("overlap", [0.45, 0.7])
def test_pieces_show_what_the_whole_image_shows(seed: int, overlap: float) -> None:
    boxes, size = scene(seed)
    image = drawn(boxes, size)
    find = ObjectFinder(sees_colours, config(), (VIEW, VIEW), overlap, at_once=5)
    (found,) = find([image])
    assert as_set(found) == sorted((number % 2, *box) for number, box in enumerate(boxes, 1))
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    masks = torch.as_tensor(library().mask.decode(found.masks)).movedim(-1, 0)
    for mask, (left, top, right, bottom) in zip(masks, found.boxes.int().tolist(), strict=True):
        inside = torch.zeros(size)
        inside[top:bottom, left:right] = 1
        assert (mask == inside).float().mean() > 0.99


def test_what_no_piece_sees_whole_is_put_together() -> None:
    boxes = [(5, 40, 220, 60), (100, 5, 112, 30), (150, 70, 200, 160), (10, 90, 90, 165)]
    image = drawn(boxes, (170, 230))
    (found,) = ObjectFinder(sees_colours, config(), (VIEW, VIEW), 0.3, 4)([image])
    assert as_set(found) == sorted((number % 2, *box) for number, box in enumerate(boxes, 1))
    areas = library().mask.area(found.masks).tolist()
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    assert areas == pytest.approx(sides.prod(1).tolist(), rel=0.2)


def test_without_tiles_the_image_is_shrunk_whole() -> None:
    image = drawn([(20, 40, 120, 80)], (128, 256))
    seen: list[tuple[int, ...]] = []

    def network(batch: Batch) -> list[Found]:
        seen.append(tuple(batch.views[0].shape))
        return sees_colours(batch)

    (found,) = ObjectFinder(network, config(), None, 0.25, 4)([image])
    assert seen == [(1, 3, VIEW, VIEW)]
    assert found.boxes[0].tolist() == pytest.approx([20, 40, 120, 80], abs=4)


def test_views_of_several_images_go_at_once_and_come_back_in_order() -> None:
    sizes, counts = [(64, 64), (90, 100), (20, 30)], list[int]()
    images = [drawn([(3, 4, 15 + n, 18)], size) for n, size in enumerate(sizes)]

    def network(batch: Batch) -> list[Found]:
        counts.append(len(batch))
        return sees_colours(batch)

    found = ObjectFinder(network, config(), (VIEW, VIEW), 0.5, 3)(images)
    assert counts == [3, 3, 2]
    assert [each.boxes.round().int().tolist() for each in found] == [
        [[3, 4, 15 + n, 18]] for n in range(3)
    ]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_tiles_cover_the_image_and_know_their_neighbours(overlap: float) -> None:
    tiles = tiles_of((100, 230), (64, 80), overlap)
    covered = torch.zeros(100, 230)
    for tile in tiles:
        left, top, right, bottom = tile.corners
        assert (bottom - top, right - left) == (64, 80)
        covered[top:bottom, left:right] = 1
        assert (tile.before[0] is None, tile.after[0] is None) == (top == 0, bottom == 100)
        assert (tile.before[1] is None, tile.after[1] is None) == (left == 0, right == 230)
    assert covered.all()
    assert tiles_of((30, 40), (64, 80), overlap) == [Tile(0, 0, 30, 40)]


def test_automatic_tiles_keep_the_scale_of_training() -> None:
    assert auto_tile(config(usual_size=[480, 640], image_size=256)) == (640, 640)
    assert auto_tile(config(usual_size=[100, 50], image_size=[64, 128])) == (100, 200)
    assert auto_tile(config(image_size=[64, 128])) == (64, 128)


def found_in(*rows: tuple[float, ...]) -> KeptObjects:
    """Objects of (label, score, left, top, right, bottom)."""
    values = torch.tensor(rows).reshape(-1, 6)
    none = torch.zeros(len(values), dtype=torch.bool)
    return KeptObjects(values[:, 2:], values[:, 0].long(), values[:, 1], none)


def merge(*found: KeptObjects) -> list[list[float]]:
    tiles = tiles_of((50, 140), (50, 80), 0.25)  # from 0, and from 60 on
    assert len(tiles) == 2
    result = merged([*zip(tiles, found, strict=True)], [1.0, 1.0], nms=0.5)
    return [[*map(float, row)] for row in torch.cat([result.scores[:, None], result.boxes], 1)]


def test_classes_are_merged_apart_and_the_surer_stays() -> None:
    left = found_in((0, 0.5, 62, 10, 76, 20), (1, 0.75, 62, 10, 76, 20))
    right = found_in((0, 0.875, 63, 10, 77, 20))
    assert merge(left, right) == [[0.875, 63, 10, 77, 20], [0.75, 62, 10, 76, 20]]


def test_a_part_is_left_out_however_sure_it_is() -> None:
    part, whole = found_in((0, 1.0, 70, 10, 80, 20)), found_in((0, 0.5, 70, 10, 95, 20))
    assert merge(part, whole) == [[0.5, 70, 10, 95, 20]]
    assert merge(part, found_in()) == []  # the piece that sees more of it found nothing there
    assert merge(found_in(), found_in((0, 1.0, 60, 10, 70, 20))) == []


def test_neighbours_in_the_strip_stay_two() -> None:
    left = found_in((0, 0.5, 55, 10, 69, 20), (0, 0.75, 40, 30, 50, 40))
    right = found_in((0, 0.25, 69, 10, 90, 20))
    assert [row[0] for row in merge(left, right)] == [0.75, 0.5, 0.25]


def test_there_may_be_nothing() -> None:
    assert merge(found_in(), found_in()) == []
