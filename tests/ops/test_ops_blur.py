"""Blur as two matrix products, against a convolution with the window written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchmine.ops.blur import blur_matrix, blurred, circular_blur_matrix


@pytest.mark.parametrize(("kernel", "sigma"), [(9, 1.0), (3, 0.5), (1, 2.0), (21, 4.0)])
@pytest.mark.parametrize("size", [(16, 24), (6, 6)])
def test_blur_is_the_convolution(kernel: int, sigma: float, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    offset = torch.arange(kernel) - kernel // 2
    window = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * sigma**2))
    window = (window / window.sum()).expand(3, 1, -1, -1)
    expected = F.conv2d(images, window, padding=kernel // 2, groups=3)
    found = blurred(images, *(blur_matrix(side, kernel, sigma) for side in size))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_flat_image_changes_at_its_border_only() -> None:
    matrix = blur_matrix(32, 9, 1.0)
    torch.testing.assert_close(matrix[4:-4].sum(dim=1), torch.ones(24))
    image = blurred(torch.ones(1, 1, 32, 32), matrix, matrix)[0, 0]
    torch.testing.assert_close(image[4:-4, 4:-4], torch.ones(24, 24))
    assert (image[0] < 0.8).all()


def test_autocast_does_not_touch_it() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    matrix = blur_matrix(32, 9, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            blurred(images, matrix, matrix), blurred(images.double().float(), matrix, matrix)
        )
        assert blurred(images, matrix, matrix).dtype == torch.float32
    torch.testing.assert_close(blurred(images, matrix, matrix), matrix @ images @ matrix.T)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("size", [(14, 14), (4, 9)])
def test_a_circular_blur_is_the_convolution_of_a_repeated_image(
    sigma: float, size: tuple[int, int]
) -> None:
    images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    reach = 16
    offset = torch.arange(-reach, reach + 1)
    window = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * sigma**2))
    repeated = images.repeat(1, 1, *(2 * (reach // side + 1) + 1 for side in size))
    centre = F.conv2d(repeated, (window / window.sum())[None, None], padding=reach)
    expected = centre[
        :,
        :,
        (first := size[0] * (reach // size[0] + 1)) : first + size[0],
        (left := size[1] * (reach // size[1] + 1)) : left + size[1],
    ]
    found = blurred(images, *(circular_blur_matrix(side, sigma) for side in size))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
