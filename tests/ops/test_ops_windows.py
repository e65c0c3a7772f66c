"""Sliding windows against sums over the whole image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.ops import windows
from patchmine.ops.windows import best_classes, resized_bands, score_bands, window_starts

K = 4


def network(windows: Tensor) -> Tensor:
    """Logits that depend on where in its window a pixel is."""
    size = windows.shape[-2:]
    place = torch.linspace(0, 1, size.numel()).view(size)
    return torch.stack([windows.sum(1) * k + place * (k - 1) ** 2 for k in range(K)], 1)


def joined(bands: list[Tensor]) -> Tensor:
    """All rows; a band is copied before the next takes its place."""
    return torch.cat([band.clone() for band in bands], 1)


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
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_logits_are_means_over_windows(
    size: tuple[int, int], stride: tuple[int, int], batch: int
) -> None:
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
    how = (8, 8), stride, batch, network
    found = joined(score_bands(image, *how))
    assert torch.equal(found, expected)
    classes = best_classes(score_bands(image, *how), size)
    assert torch.equal(classes.long(), found.argmax(0))
    assert classes.dtype == torch.int16


def test_windows_are_prepared_before_they_are_padded() -> None:
    image = torch.arange(5 * 20, dtype=torch.uint8).view(1, 5, 20)

    def prepare(windows: Tensor) -> Tensor:
        assert windows.dtype == torch.uint8
        return windows / 255 - 0.5

    how = (8, 8), (4, 4), 2, network
    found, wanted = score_bands(image, *how, prepare), score_bands(prepare(image), *how)
    assert torch.equal(joined(found), joined(wanted))


def test_a_large_image_keeps_few_logits_and_fills_batches() -> None:
    batches: list[int] = []

    def counted(windows: Tensor) -> Tensor:
        batches.append(len(windows))
        return network(windows)

    rows = 0
    for band in score_bands(torch.zeros(3, 200, 30), (8, 8), (4, 4), 5, counted):
        assert band.untyped_storage().nbytes() == K * 8 * 30 * 4
        rows += band.shape[1]
    assert rows == 200
    assert batches == [5] * 68 + [3]  # 49 rows of 7 windows


@pytest.mark.parametrize("size", [(37, 51), (23, 31), (7, 9), (90, 10), (1, 1), (24, 31)])
@pytest.mark.parametrize("at_once", [1, 10_000_000])
def test_bands_are_resized_as_the_whole_is(
    size: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_AT_ONCE", at_once)
    image = torch.randn(3, 23, 31, generator=torch.Generator().manual_seed(0))
    how = (8, 8), (5, 4), 3, network
    whole = joined(score_bands(image, *how))
    wanted = F.interpolate(whole[None], size, mode="bilinear", align_corners=False)[0]
    bands = list(map(Tensor.clone, resized_bands(score_bands(image, *how), 23, size)))
    torch.testing.assert_close(torch.cat(bands, 1), wanted)
    if at_once == 1:
        assert {band.shape[1] for band in bands} == {1}
