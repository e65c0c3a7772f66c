"""Patches: cutting, choosing and putting together, in two and three dimensions, against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.ops.patches import (
    all_patches,
    channels_first,
    channels_last,
    gather_patches,
    images_from_values,
    patch_statistics,
    patch_values,
    pixel_targets,
)
from patchmine.ops.pictures import fill_masked, hide_masked, patch_map, reconstruction_panels
from patchmine.types import Grid, Mask

GRIDS = [Grid((2, 3), (4, 4)), Grid((3, 2), (2, 4)), Grid((2, 3, 2), (2, 4, 4))]


def images_for(grid: Grid, batch: int = 2, channels: int = 3) -> Tensor:
    size = [count * side for count, side in zip(grid.size, grid.patch, strict=True)]
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def slow_patch(image: Tensor, grid: Grid, number: int) -> Tensor:
    """Patch ``number`` of one image by slicing."""
    place = list(itertools.product(*map(range, grid.size)))[number]
    window = tuple(
        slice(at * side, (at + 1) * side) for at, side in zip(place, grid.patch, strict=True)
    )
    return image[(slice(None), *window)]


@pytest.mark.parametrize("grid", GRIDS)
def test_gather_against_slices(grid: Grid) -> None:
    images = images_for(grid)
    index = torch.stack([torch.tensor([4, 0, 3]), torch.tensor([1, 5, 2])])
    found = gather_patches(images, index, grid.patch)
    everything = all_patches(images, grid.patch)
    for row, numbers in enumerate(index.tolist()):
        for place, number in enumerate(numbers):
            expected = slow_patch(images[row], grid, number)
            assert torch.equal(found[row, place], expected)
            assert torch.equal(everything[row, number], expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_there_and_back(grid: Grid, channels: int) -> None:
    images = images_for(grid, channels=channels)
    values = patch_values(all_patches(images, grid.patch))
    assert values.shape == (2, grid.num_patches, grid.values_per_patch(channels))
    assert torch.equal(images_from_values(values, grid, channels), images)


def test_values_run_row_column_channel() -> None:
    image = torch.arange(2 * 4 * 4).float().reshape(1, 2, 4, 4)
    first = patch_values(all_patches(image, (2, 2)))[0, 0]
    assert first.tolist() == [0, 16, 1, 17, 4, 20, 5, 21]


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_is_the_order_of_pixel_shuffle(channels: int) -> None:
    grid = Grid((2, 3), (4, 4))
    images = images_for(grid, channels=channels)
    values = patch_values(all_patches(images, grid.patch))
    first = channels_first(values, channels)
    assert torch.equal(first, all_patches(images, grid.patch).flatten(2))
    folded = first.transpose(1, 2).reshape(
        2, -1, *grid.size
    )  # (B, P, rows, columns), what a 1 x 1 convolution gives
    assert torch.equal(F.pixel_shuffle(folded, 4), images)
    assert torch.equal(channels_last(first, channels), values)


def test_standardised_targets_do_not_see_a_constant() -> None:
    grid = GRIDS[0]
    images = images_for(grid)
    index = torch.arange(grid.num_patches).expand(2, -1)
    plain, shifted = (
        pixel_targets(i, index, grid.patch, norm_pix_loss=True) for i in (images, images + 3.0)
    )
    torch.testing.assert_close(plain, shifted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        plain.mean(dim=-1), torch.zeros(2, grid.num_patches), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        plain.var(dim=-1), torch.ones(2, grid.num_patches), atol=1e-4, rtol=0
    )


def test_statistics_put_eps_inside_the_root() -> None:
    mean, deviation = patch_statistics(torch.full((1, 1, 6), 2.0))
    assert mean.item() == 2.0
    assert deviation.item() == pytest.approx(1e-3)


def test_pictures() -> None:
    grid = GRIDS[0]
    images = images_for(grid)
    mask = Mask(torch.tensor([[0, 2], [1, 5]]), torch.tensor([[1, 3, 4, 5], [0, 2, 3, 4]]), 6)
    hidden = hide_masked(images, mask, grid)
    for row in range(2):
        for number in range(6):
            patch = slow_patch(hidden[row], grid, number)
            if number in mask.visible[row].tolist():
                assert torch.equal(patch, slow_patch(images[row], grid, number))
            else:
                assert patch.isnan().all()
    true = patch_values(gather_patches(images, mask.masked, grid.patch))
    assert torch.equal(fill_masked(images, mask, grid, true), images)
    heat = patch_map(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), grid, mask.masked)
    assert heat.shape == (2, 2, 3)
    assert heat[0].isnan().tolist() == [[True, False, True], [False, False, False]]
    assert heat[1, 1].tolist()[:2] == [7, 8]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("standardised", [True, False])
def test_a_perfect_prediction_paints_the_input(grid: Grid, standardised: bool) -> None:
    images = images_for(grid)
    numbers = torch.stack([torch.arange(grid.num_patches)] * 2)
    mask = Mask(numbers[:, :1], numbers[:, 1:], grid.num_patches)
    target = pixel_targets(images, mask.masked, grid.patch, norm_pix_loss=standardised)
    plain, together = reconstruction_panels(images, mask, grid, target, standardised=standardised)
    torch.testing.assert_close(together.data, images, atol=1e-5, rtol=1e-5)
    assert "borrowed" not in plain.title
    assert ("borrowed" in together.title) is standardised
    assert ("borrowed from the input" in together.note) is standardised


@pytest.mark.parametrize("grid", GRIDS)
def test_a_plain_reconstruction_knows_nothing_of_what_is_hidden(grid: Grid) -> None:
    images, mask = images_for(grid), Mask(torch.tensor([[0], [1]]), torch.tensor([[3], [5]]), 6)
    mask = Mask(mask.visible, mask.masked, grid.num_patches)
    generator = torch.Generator().manual_seed(0)
    values = grid.values_per_patch(3)
    predicted = torch.randn(2, 1, values, generator=generator)
    hidden = images.clone()
    for row, number in ((0, 3), (1, 5)):
        slow_patch(hidden[row], grid, number).fill_(7.0)
    for standardised in (False, True):
        found, other = (
            reconstruction_panels(each, mask, grid, predicted, standardised=standardised)[0].data
            for each in (images, hidden)
        )
        torch.testing.assert_close(found, other, equal_nan=True, atol=0, rtol=0)
        for row, number in ((0, 3), (1, 5)):
            there = slow_patch(found[row], grid, number)
            seen = slow_patch(images[row], grid, row)  # the one visible patch
            if standardised:
                expected = patch_values(predicted[row].reshape(1, 1, *grid.patch, 3).movedim(-1, 2))
                expected = expected.reshape(*grid.patch, 3).movedim(-1, 0)
                axes = list(range(1, seen.ndim)) if len(grid.patch) == 3 else None
                mean = seen.mean(dim=axes, keepdim=True)
                deviation = seen.std(dim=axes, keepdim=True)
                torch.testing.assert_close(there, expected * deviation + mean, atol=1e-4, rtol=1e-4)
            others = [n for n in range(grid.num_patches) if n != number]
            assert all(slow_patch(found[row], grid, n).isnan().all() for n in others)


def test_what_is_thrown_away_is_in_no_reconstruction() -> None:
    grid = GRIDS[0]
    mask = Mask(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), 6)
    target = pixel_targets(images_for(grid)[:1], mask.masked, grid.patch, norm_pix_loss=False)
    panels = reconstruction_panels(images_for(grid)[:1], mask, grid, target, standardised=False)
    for panel, shown in zip(panels, ([1, 3], [0, 1, 2, 3]), strict=True):
        there = [n for n in range(6) if not slow_patch(panel.data[0], grid, n).isnan().any()]
        assert there == shown
    assert "thrown away" in panels[0].note


def test_cubes_are_standardised_within_each_channel() -> None:
    grid = GRIDS[2]
    clips = images_for(grid) * torch.tensor([1.0, 5.0, 0.2]).view(1, 3, 1, 1, 1)
    target = pixel_targets(clips, torch.tensor([[4], [7]]), grid.patch, norm_pix_loss=True)
    for row, number in enumerate((4, 7)):
        cube = slow_patch(clips[row], grid, number)  # (C, 2, 4, 4)
        flat = cube.flatten(1)
        expected = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6 / 0.226)
        torch.testing.assert_close(target[row, 0].reshape(-1, 3).T, expected, atol=1e-5, rtol=1e-5)
    still = pixel_targets(
        torch.full_like(clips, 0.5), torch.tensor([[4], [7]]), grid.patch, norm_pix_loss=True
    )
    assert still.abs().max() < 0.1
