"""Sliding windows against sums over the whole image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchmine.ops.windows import slide, slide_classes, window_starts

K = 4


def network(windows: Tensor) -> Tensor:
    """Logits that depend on where in its window a pixel is."""
    size = windows.shape[-2:]
    place = torch.linspace(0, 1, size.numel()).view(size)
    return torch.stack([windows.sum(1) * k + place * (k - 1) ** 2 for k in range(K)], 1)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 4, 3, [0, 3, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 3, [0]),
        (3, 4, 3, [0]),
        (5, 4, 3, [0, 1]),
    ],
)
def test_the_last_window_ends_with_the_image(
    length: int, window: int, stride: int, expected: list[int]
) -> None:
    assert window_starts(length, window, stride) == expected


@pytest.mark.parametrize("size", [(23, 31), (8, 8), (5, 40), (40, 5), (3, 4), (8, 9)])
@pytest.mark.parametrize("stride", [(5, 4), (8, 8), (1, 3)])
def test_logits_are_means_over_windows(size: tuple[int, int], stride: tuple[int, int]) -> None:
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    height, width = size
    whole = torch.zeros(3, max(8, height), max(8, width))
    whole[:, :height, :width] = image
    sums, counts = torch.zeros(K, *whole.shape[1:]), torch.zeros(whole.shape[1:])
    for top in window_starts(whole.shape[1], 8, stride[0]):
        for left in window_starts(whole.shape[2], 8, stride[1]):
            here = slice(top, top + 8), slice(left, left + 8)
            sums[:, here[0], here[1]] += network(whole[None, :, here[0], here[1]])[0]
            counts[here] += 1
    expected = (sums / counts)[:, :height, :width]
    found = slide(image, (8, 8), stride, 3, network, K)
    torch.testing.assert_close(found, expected)
    classes = slide_classes(image, (8, 8), stride, 3, network, K)
    assert torch.equal(classes.long(), found.argmax(0))
    assert classes.dtype == torch.int16


def test_a_large_image_keeps_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    real = torch.cat

    def watched(tensors: list[Tensor], dim: int = 0) -> Tensor:
        found = real(tensors, dim)
        kept.append(found.numel() if found.dtype == torch.float32 else 0)
        return found

    monkeypatch.setattr(torch, "cat", watched)
    batches: list[int] = []

    def counted(windows: Tensor) -> Tensor:
        batches.append(len(windows))
        return network(windows)

    slide_classes(torch.zeros(3, 200, 30), (8, 8), (4, 4), 5, counted, K)
    assert max(kept) == K * 8 * 30
    assert set(batches) == {5, 2}
