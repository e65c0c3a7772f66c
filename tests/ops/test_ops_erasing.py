"""Erased boxes against a loop over rows; what fills them is normal and each row's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchmine.models.noise import Noise
from patchmine.ops.erasing import erase, pixel_noise

BOXES = torch.tensor([[2, 3, 5, 7], [0, 0, 0, 0], [0, 0, 12, 16], [11, 15, 1, 1]])


def noise_of(rows: int, seed: int = 0) -> Tensor:
    return Noise(seed).uniform(rows, 2)


@pytest.mark.parametrize("frames", [(), (4,)])
def test_boxes_are_filled_and_nothing_else(frames: tuple[int, ...]) -> None:
    images = torch.full((4, 5, *frames, 12, 16), 100.0)
    erased = erase(images, BOXES, noise_of(4))
    for row, (top, left, height, width) in enumerate(BOXES.tolist()):
        expected = torch.zeros(12, 16, dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(erased[row] != 100, expected.expand(images.shape[1:]))
    assert (images == 100).all()
    inside = erased[erased != 100]
    assert inside.unique().numel() > 0.99 * inside.numel()  # each pixel, channel and frame its own


def test_what_fills_boxes_is_standard_normal() -> None:
    drawn = pixel_noise(noise_of(16), 20_000).double()
    assert drawn.mean().abs() < 0.01
    assert abs(drawn.std() - 1) < 0.01
    shares = torch.tensor([0.001, 0.05, 0.25, 0.5, 0.9, 0.999], dtype=torch.float64)
    below = (drawn.flatten() < torch.special.ndtri(shares)[:, None]).double().mean(1)
    assert (below - shares).abs().max() < 0.004
    assert drawn.isfinite().all()
    # Neither rows, nor neighbouring places, nor channels a plane apart know of each other.
    assert (torch.corrcoef(drawn) - torch.eye(16)).abs().max() < 0.04
    for apart in (1, 2, 16, 224, 4096):
        pairs = torch.stack([drawn[:, apart:].flatten(), drawn[:, :-apart].flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.01
    assert pixel_noise(torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]]), 99).isfinite().all()


def test_parts_of_a_batch_are_erased_as_in_the_whole() -> None:
    images = torch.randn(8, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    boxes = BOXES.repeat(2, 1)

    def erased(first: int, last: int) -> Tensor:
        noise = Noise(5)
        noise.begin(9, first, 8)
        return erase(images[first:last], boxes[first:last], noise.uniform(last - first, 2))

    whole = erased(0, 8)
    torch.testing.assert_close(torch.cat([erased(0, 3), erased(3, 8)]), whole, rtol=0, atol=1e-6)
    assert not torch.equal(whole[0], erase(images, boxes, noise_of(8, seed=6))[0])
