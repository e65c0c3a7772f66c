"""A map of a whole image follows the crop: against averages over pixels, and against what the
loader really cut out.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.data.samples import collate
from patchmine.data.settings import ViewSettings
from patchmine.data.views.images import TrainView, crop_box
from patchmine.data.views.normalise import normalise
from patchmine.ops.alignment import align, attention_map, spread
from patchmine.types import Grid

GRID = Grid(
    (6, 4), (4, 8)
)  # rows and columns, and sides of a patch, that cannot be mistaken for each other
SIZES = [
    (48, 32),
    (37, 51),
    (90, 20),
    (20, 90),
    (7, 9),
]  # of originals; the narrow ones need the centred crop


def random_maps(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, GRID.num_patches, generator=torch.Generator().manual_seed(seed))


def crops(count: int) -> list[tuple[tuple[int, int], tuple[int, int, int, int], bool]]:
    """Sizes of images, boxes in pixels as the loader draws them, flips."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        found.append(
            (size, crop_box(*size, (0.2, 1.0), (3 / 4, 4 / 3), generator), bool(number % 3 == 0))
        )
    return found


def fractions(
    cut: list[tuple[tuple[int, int], tuple[int, int, int, int], bool]],
) -> tuple[Tensor, Tensor]:
    boxes = torch.tensor([[t / h, x / w, bh / h, bw / w] for (h, w), (t, x, bh, bw), _ in cut])
    return boxes, torch.tensor([flip for _, _, flip in cut])


def test_area_is_the_average_over_pixels() -> None:
    """Every pixel is cut into as many as the grid has rows and columns, so that no patch and no
    cell cuts one.
    """
    cut = crops(60)
    maps = random_maps(len(cut))
    found = align(maps, GRID, *fractions(cut))
    rows, columns = GRID.size
    for number, ((height, width), (top, left, box_height, box_width), flip) in enumerate(cut):
        cells = maps[number].double().reshape(GRID.size)
        pixels = cells.repeat_interleave(height, 0).repeat_interleave(
            width, 1
        )  # (height * rows, width * columns)
        crop = pixels[
            top * rows : (top + box_height) * rows, left * columns : (left + box_width) * columns
        ]
        crop = crop.flip(1) if flip else crop
        expected = F.avg_pool2d(crop[None, None], (box_height, box_width)).flatten()
        torch.testing.assert_close(found[number].double(), expected, atol=2e-6, rtol=0)
        # Nothing is lost: the mean weight is the integral of the map over the box.
        assert found[number].mean().item() == pytest.approx(crop.mean().item(), abs=2e-6)


@pytest.mark.parametrize("how", ["bilinear", "released"])
def test_resized_cells_against_interpolate(how: str) -> None:
    cut = crops(60)
    maps = random_maps(len(cut))
    found = align(maps, GRID, *fractions(cut), how)
    (rows, columns), (patch_height, patch_width) = GRID.size, GRID.patch
    for number, ((height, width), (top, left, box_height, box_width), flip) in enumerate(cut):
        if how == "bilinear":
            first = [top * rows // height, left * columns // width]
            last = [
                -(-(top + box_height) * rows // height),
                -(-(left + box_width) * columns // width),
            ]
        else:
            first = [0, 0]
            last = [(top + box_height) // height + 2, (left + box_width) // width + 2]
        cells = maps[number].reshape(1, 1, *GRID.size)[..., first[0] : last[0], first[1] : last[1]]
        pixels = F.interpolate(cells, (rows * patch_height, columns * patch_width), mode="bilinear")
        pixels = pixels.flip(-1) if flip else pixels
        expected = F.avg_pool2d(pixels, GRID.patch).flatten()
        torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=0)


def test_the_whole_image_keeps_its_map() -> None:
    maps, whole = random_maps(3), torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(3, 4)
    kept, mirrored = (align(maps, GRID, whole, torch.full((3,), flip)) for flip in (False, True))
    torch.testing.assert_close(kept, maps, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        mirrored.reshape(3, *GRID.size).flip(2).flatten(1), maps, atol=1e-6, rtol=0
    )


def test_mirroring_the_image_and_the_box_is_mirroring_the_weights() -> None:
    box, _ = fractions(crops(20))
    maps = random_maps(20)
    mirrored = maps.reshape(-1, *GRID.size).flip(2).flatten(1)
    other_side = torch.stack([box[:, 0], 1 - box[:, 1] - box[:, 3], box[:, 2], box[:, 3]], dim=1)
    straight = align(maps, GRID, box, torch.ones(20).bool())
    torch.testing.assert_close(
        straight, align(mirrored, GRID, other_side, torch.zeros(20).bool()), atol=1e-5, rtol=0
    )


def test_one_cell_reaches_only_patches_that_show_it() -> None:
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]])  # rows 1.5 to 4.5 of the cells, columns 1 to 3
    cell = torch.zeros(1, *GRID.size)
    cell[0, 2, 1] = 1.0
    weights = align(cell.flatten(1), GRID, box, torch.tensor([False])).reshape(GRID.size)
    assert torch.equal(
        weights > 0, torch.tensor([[0], [1], [1], [0], [0], [0]]).bool() & (torch.arange(4) < 2)
    )
    assert weights.sum().item() == pytest.approx(
        4.0
    )  # the cell is four patches large: 2 rows of them, 2 columns


def test_what_the_loader_cuts_out_is_what_is_aligned() -> None:
    """A picture of the map itself goes through the real crop and mirror; its patches then have the
    weights' values.
    """
    maps = (random_maps(12) * 255).round() / 255
    size = GRID.size[0] * GRID.patch[0], GRID.size[1] * GRID.patch[1]
    view = TrainView(ViewSettings(image_size=size, interpolation="bilinear"))
    samples = []
    for number, cells in enumerate(maps.reshape(-1, 1, *GRID.size)):
        picture = cells.repeat_interleave(40, 1).repeat_interleave(30, 2)
        levels = (picture * 255).byte().expand(3, -1, -1)
        samples.append(view(levels, np.random.default_rng(number)))
    batch = collate(samples)
    assert len(set(batch.flip.tolist())) == 2
    batch = normalise(batch, torch.zeros(3), torch.ones(3), "cpu")
    shown = F.avg_pool2d(batch.views[0][:, :1], GRID.patch).flatten(1)
    weights = align(maps, GRID, batch.box, batch.flip)
    assert (weights - shown).abs().max() < 0.03
    assert (align(maps, GRID, batch.box, ~batch.flip) - shown).abs().max() > 0.3


def test_area_under_autocast_is_float32() -> None:
    cut = crops(4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = align(random_maps(4), GRID, *fractions(cut))
    assert rough.dtype == torch.float32
    assert torch.equal(rough, align(random_maps(4), GRID, *fractions(cut)))


def test_heads_count_alike_and_a_flat_one_is_nothing() -> None:
    attention = torch.tensor([[[0.1, 0.2, 0.3], [0.0001, 0.0002, 0.0001], [0.2, 0.2, 0.2]]])
    expected = (torch.tensor([0.0, 0.5, 1.0]) + torch.tensor([0.0, 1.0, 0.0]) + torch.zeros(3)) / 3
    torch.testing.assert_close(attention_map(attention)[0], expected, atol=1e-5, rtol=0)


def painted_back(
    values: Tensor, known: Tensor, box: tuple[float, float, float, float], flip: bool
) -> tuple[Tensor, Tensor]:
    """What the patches of one crop say of the cells, by many small squares of the image."""
    rows, columns = GRID.size
    fine = 60  # squares to a cell and axis
    top, left, height, width = box
    y = (torch.arange(rows * fine, dtype=torch.float64) + 0.5) / (rows * fine)
    x = (torch.arange(columns * fine, dtype=torch.float64) + 0.5) / (columns * fine)
    row = ((y - top) / height * rows).floor()
    column = (x - left) / width * columns
    column = (columns - column if flip else column).floor()
    inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None]
    patch = row.clamp(0, rows - 1).long()[:, None] * columns + column.clamp(0, columns - 1).long()
    counts = inside * known[patch]

    def by_cell(image: Tensor) -> Tensor:
        return image.reshape(rows, fine, columns, fine).mean(dim=(1, 3)).flatten()

    covered = by_cell(counts)
    return by_cell(counts * values[patch].double()) / covered.clamp(min=1e-9), covered


def test_what_a_crop_says_goes_back_to_the_cells_that_it_shows() -> None:
    boxes, flips = fractions(crops(40))
    values = random_maps(len(boxes))
    known = (random_maps(len(boxes), seed=1) < 0.7).float()
    seen, covered = spread(values, known, GRID, boxes, flips)
    assert (covered == 0).any()
    assert (covered > 0.99).any()
    for number, box in enumerate(boxes.tolist()):
        expected, share = painted_back(
            values[number], known[number], tuple(box), bool(flips[number])
        )
        torch.testing.assert_close(covered[number].double(), share.double(), atol=0.03, rtol=0)
        sure = share > 0.3
        torch.testing.assert_close(seen[number][sure].double(), expected[sure], atol=0.05, rtol=0)


def test_a_whole_image_goes_back_as_it_is() -> None:
    values, known = random_maps(2), torch.ones(2, GRID.num_patches)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    seen, covered = spread(values, known, GRID, boxes, torch.tensor([False, True]))
    torch.testing.assert_close(seen[0], values[0])
    mirrored = values[1].reshape(GRID.size).flip(1).flatten()
    torch.testing.assert_close(seen[1], mirrored)
    torch.testing.assert_close(covered, known)
