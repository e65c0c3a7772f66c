"""Colours change as torchvision's transforms change those of a PIL image, for a whole batch at
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as TF

from patchmine.data.views import one_by_one, photometric
from patchmine.data.views.normalise import normalise
from patchmine.data.views.one_by_one import changed_one_by_one
from patchmine.data.views.photometric import (
    COLUMNS,
    change_colours,
    draw,
    draw_jitter,
    jitter_colours,
)
from patchmine.types import Batch


def pictures(count: int = 4, side: int = 40, channels: int = 3) -> Tensor:
    """Bytes: slopes, noise, pure black, white and colours, so that every branch of a formula has
    its pixels.
    """
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side]
    waves = [128 + 140 * np.sin(x / (5 + c)) * np.cos(y / (7 + c)) for c in range(channels)]
    images = np.stack(
        [
            np.stack(waves) + generator.normal(0, 15 * n, (channels, side, side))
            for n in range(count)
        ]
    )
    images[:, :, :4] = generator.integers(0, 2, (count, channels, 4, side)) * 255
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


def numbers(count: int = 4, **columns: Any) -> Tensor:
    """What changes nothing, save for the named columns."""
    neutral = torch.zeros(count, COLUMNS)
    neutral[:, photometric.FACTORS] = 1
    neutral[:, photometric.ORDER] = torch.arange(4.0)
    for name, value in columns.items():
        neutral[:, getattr(photometric, name)] = torch.as_tensor(value, dtype=torch.float32)
    return neutral


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())


def levels(image: Image.Image) -> Tensor:
    array = np.asarray(image, np.float32)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def difference(
    images: Tensor, changes: Tensor, reference: Callable[[Image.Image], Image.Image]
) -> Tensor:
    """Levels of 255 between ours and PIL's."""
    expected = torch.stack([levels(reference(as_pil(image))) for image in images])
    ours = change_colours(images, changes) * 255
    torch.testing.assert_close(ours, ours.round(), atol=1e-4, rtol=0)  # bytes again
    return (ours - expected).abs().round()


@pytest.mark.parametrize("factor", [0.6, 0.87, 1.0, 1.33])
@pytest.mark.parametrize(
    ("place", "reference"),
    list(enumerate([TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation])),
)
def test_blends_are_pils_bit_by_bit(
    place: int, reference: Callable[..., Any], factor: float
) -> None:
    factors = [1.0, 1.0, 1.0]
    factors[place] = factor
    assert (
        difference(
            pictures(), numbers(FACTORS=factors), lambda image: reference(image, factor)
        ).max()
        == 0
    )


@pytest.mark.parametrize("turn", [-0.1, -0.037, 0.0, 0.02, 0.1])
def test_the_hue_is_pils(turn: float) -> None:
    """PIL holds hue and saturation as bytes; one in a thousand falls on the other side of a
    rounding.
    """
    off = difference(
        pictures(), numbers(JITTER=1, HUE=turn), lambda image: TF.adjust_hue(image, turn)
    )
    assert off.max() <= 6
    assert (off > 0).float().mean() < 2e-3


def test_grey_and_solarized_are_pils_bit_by_bit() -> None:
    assert (
        difference(pictures(), numbers(GREY=1), lambda image: TF.to_grayscale(image, 3)).max() == 0
    )
    assert difference(pictures(), numbers(SOLARIZE=1), ImageOps.solarize).max() == 0


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.9, 1.41, 1.42, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_blur_is_pils(sigma: float, channels: int) -> None:
    """At the edges too.  PIL rounds to bytes between its six passes, which is worth up to three
    levels.
    """
    images = pictures(channels=channels)
    off = difference(
        images, numbers(SIGMA=sigma), lambda image: image.filter(ImageFilter.GaussianBlur(sigma))
    )
    assert off.max() <= 3
    assert off.mean() < 0.55


def test_rectangles_are_blurred_along_both_sides() -> None:
    images = pictures(side=40)[:, :, :, :25]
    off = difference(
        images, numbers(SIGMA=1.7), lambda image: image.filter(ImageFilter.GaussianBlur(1.7))
    )
    assert off.max() <= 2


def with_torchvision(image: Image.Image, change: Tensor) -> Image.Image:
    """One crop, one operation after the other."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    values = [*change[photometric.FACTORS].tolist(), change[photometric.HUE].item()]
    if change[photometric.JITTER]:
        for number in change[photometric.ORDER].int().tolist():
            image = operations[number](image, values[number])
    if change[photometric.GREY]:
        image = TF.to_grayscale(image, 3)
    image = image.filter(ImageFilter.GaussianBlur(change[photometric.SIGMA].item()))
    return ImageOps.solarize(image) if change[photometric.SOLARIZE] else image


def test_whole_chains_in_any_order_are_torchvisions() -> None:
    """A hue on the other side of a rounding may be stretched by what follows, hence the few larger
    differences.
    """
    changes = draw(64, np.random.default_rng(0))
    images = pictures(8).repeat(8, 1, 1, 1)
    expected = torch.stack(
        [levels(with_torchvision(as_pil(i), c)) for i, c in zip(images, changes, strict=True)]
    )
    off = (change_colours(images, changes) * 255 - expected).abs()
    assert off.mean() < 0.25
    assert (off > 2.5).float().mean() < 1e-3
    assert off.max() < 16


def test_orders_change_each_image_by_itself() -> None:
    """Rows of a batch have their own numbers and do not meet."""
    changes = draw(24, np.random.default_rng(1))
    assert len({tuple(order) for order in changes[:, photometric.ORDER].tolist()}) > 10
    images = pictures(4).repeat(6, 1, 1, 1)
    together = change_colours(images, changes)
    for row in range(24):
        alone = change_colours(images[row : row + 1], changes[row : row + 1])
        assert (
            (together[row] - alone[0]).abs() * 255
        ).max() < 1.01  # sums in another order, before rounding
        assert ((together[row] - alone[0]).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_where_nothing_is_drawn_nothing_changes(channels: int) -> None:
    images = pictures(channels=channels)
    assert torch.equal(change_colours(images, numbers()), images / 255)


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_without_three_channels_colours_stay(channels: int) -> None:
    images = pictures(channels=channels)
    changes = numbers(FACTORS=[0.6, 1.4, 1.2], HUE=0.1, JITTER=1, GREY=1)
    assert torch.equal(change_colours(images, changes), images / 255)
    changes = numbers(FACTORS=[0.6, 1.4, 1.2], HUE=0.1, JITTER=1, GREY=1, SIGMA=1.5, SOLARIZE=1)
    assert torch.equal(
        change_colours(images, changes), change_colours(images, numbers(SIGMA=1.5, SOLARIZE=1))
    )
    assert not torch.equal(change_colours(images, changes), images / 255)


def test_deeper_images_are_changed_alike_without_rounding_clipping_or_solarizing() -> None:
    images, changes = pictures(8).repeat(4, 1, 1, 1), draw(32, np.random.default_rng(2))
    changes[:, photometric.SOLARIZE] = 1
    floats = change_colours(images / 255, changes)
    assert floats.max() > 1  # brighter than the brightest byte
    assert not torch.equal(floats * 255, (floats * 255).round())
    torch.testing.assert_close(
        change_colours(images / 255 * 1000, changes), floats * 1000, rtol=1e-3, atol=0.5
    )
    dark, gentle = pictures(8) // 2, draw(8, np.random.default_rng(3))  # too dark to be clipped
    gentle[:, photometric.SOLARIZE] = 0
    off = (change_colours(dark, gentle) - change_colours(dark / 255, gentle)).abs() * 255
    assert off.mean() < 2.5  # PIL rounds down after every step, and hues to 256 places


# On a processor, one image after the other


@pytest.mark.parametrize("sides", [(40, 40), (40, 25), (60, 31), (14, 70)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_one_by_one_bytes_are_the_same_to_the_bit(sides: tuple[int, int], channels: int) -> None:
    images = pictures(8, side=70, channels=channels)[..., : sides[0], : sides[1]].contiguous()
    changes = torch.cat([draw(10, np.random.default_rng(seed)) for seed in range(8)])
    images = images.repeat(10, 1, 1, 1)
    alone = [
        change_colours(images[row : row + 1], changes[row : row + 1]) for row in range(len(images))
    ]
    assert torch.equal(changed_one_by_one(images, changes), torch.cat(alone))


def test_one_by_one_deeper_images_are_nearly_the_same() -> None:
    images, changes = pictures(8).repeat(4, 1, 1, 1) / 255, draw(32, np.random.default_rng(2))
    torch.testing.assert_close(
        changed_one_by_one(images, changes), change_colours(images, changes), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("depth", ["bytes", "floats"])
def test_one_by_one_jitter_is_the_same(depth: str) -> None:
    rng = np.random.default_rng(4)
    changes = torch.stack([draw_jitter((0.5, 0.5, 0.5, 0.05), rng.random(8)) for _ in range(8)])
    images = pictures(8) if depth == "bytes" else pictures(8) / 255
    alone = [jitter_colours(images[row : row + 1], changes[row : row + 1]) for row in range(8)]
    found = changed_one_by_one(images, changes)
    if depth == "bytes":
        assert torch.equal(found, torch.cat(alone))
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
@pytest.mark.parametrize("side", [5, 13, 24, 25, 96])
def test_a_blur_is_one_row_moved_along(side: int, sigma: float) -> None:
    (slow,) = photometric.blur_matrices(side, torch.tensor([sigma]))
    assert torch.equal(one_by_one._blur_matrix(side, sigma), slow)


def test_a_processor_takes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what torchvision gives, as the batch at once does."""
    changes, images = draw(64, np.random.default_rng(0)), pictures(8).repeat(8, 1, 1, 1)
    expected = torch.stack(
        [levels(with_torchvision(as_pil(i), c)) for i, c in zip(images, changes, strict=True)]
    )
    monkeypatch.delattr("patchmine.data.views.normalise.change_colours")
    batch = Batch(
        [images, images],
        torch.arange(64),
        torch.zeros(64, 2, 4),
        torch.zeros(64, 2, dtype=torch.bool),
        torch.stack([changes, changes], 1),
    )
    views = normalise(batch, torch.zeros(3), torch.ones(3), "cpu").views
    for view in views:
        off = (view * 255 - expected).abs()
        assert off.mean() < 0.25
        assert (off > 2.5).float().mean() < 1e-3


class NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(
            ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "unique")
        )
        return func(*args, **(kwargs or {}))


def test_the_device_is_not_waited_for() -> None:
    images, changes = pictures(), draw(4, np.random.default_rng(0))
    with NoReading():
        change_colours(images, changes)


# What is drawn
# --------------------------------------------------------------------------------------------------------


def drawn(rounds: int = 3000, crops: int = 5) -> Tensor:
    """(rounds, V, P)."""
    generator = np.random.default_rng(0)
    return torch.stack([draw(crops, generator) for _ in range(rounds)])


def test_shares_are_dinos() -> None:
    def share(values: Tensor) -> float:
        return (values != 0).float().mean().item()

    found = drawn()
    assert share(found[..., photometric.JITTER]) == pytest.approx(0.8, abs=0.02)
    assert share(found[..., photometric.GREY]) == pytest.approx(0.2, abs=0.02)
    for crop, (blur, solarize) in enumerate([(1, 0), (0.1, 0.2), (0.5, 0), (0.5, 0), (0.5, 0)]):
        assert share(found[:, crop, photometric.SIGMA]) == pytest.approx(
            blur, abs=0.03 * (blur < 1)
        )
        assert share(found[:, crop, photometric.SOLARIZE]) == pytest.approx(
            solarize, abs=0.03 * (solarize > 0)
        )


def test_values_are_uniform_in_dinos_ranges() -> None:
    found = drawn().flatten(0, 1)
    jittered = found[found[:, photometric.JITTER] == 1]
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    values = [*jittered[:, photometric.FACTORS].unbind(1), jittered[:, photometric.HUE]]
    sigmas = found[:, photometric.SIGMA]
    for value, (low, high) in zip(
        [*values, sigmas[sigmas > 0]], [*ranges, (0.1, 2.0)], strict=True
    ):
        place = (value.double().sort().values - low) / (high - low)
        expected = torch.linspace(0, 1, len(place), dtype=torch.float64)
        assert (place - expected).abs().max() < 0.03  # Kolmogorov-Smirnov; 5000 values or more
    orders, counts = jittered[:, photometric.ORDER].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert (counts / len(jittered) * 24 - 1).abs().max() < 0.2
    still = found[found[:, photometric.JITTER] == 0]
    assert (still[:, photometric.FACTORS] == 1).all()
    assert (still[:, photometric.HUE] == 0).all()


def test_crops_and_images_draw_for_themselves() -> None:
    found = drawn(2000)[..., photometric.FACTORS][..., 0]
    correlation = np.corrcoef(found.T.numpy())
    assert np.abs(correlation - np.eye(5)).max() < 0.1
