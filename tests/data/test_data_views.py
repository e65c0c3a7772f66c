"""Crops are drawn as torchvision draws them, pixels are resized as PIL resizes them, boxes say
where they came from.
"""

from __future__ import annotations

import pickle
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loading import seen
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional as F
from torchvision import transforms

from patchmine.data.decoding.decode import DecodeError
from patchmine.data.views.geometry import resize
from patchmine.data.views.images import PlainView, TrainView, View, crop_box
from patchmine.errors import UserError

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


class Sequence:
    """Stands in for a generator and hands out given shares of every interval."""

    def __init__(self, shares: list[float]) -> None:
        self.shares = list(shares)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.shares.pop(0)

    def integers(self, low: int, high: int) -> int:
        return low + int((high - low) * self.shares.pop(0))

    def random(self) -> float:
        return self.shares.pop(0)


def photo(height: int = 120, width: int = 160, channels: int = 3) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x / (5 + c)) * np.cos(y / (7 + c)) for c in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (3, 7)])
def test_the_fallback_is_torchvisions(height: int, width: int) -> None:
    """Shares of 1 ask for more area than fits in ten tries, so both end with the centred crop."""
    greedy = cast(np.random.Generator, Sequence([1.0] * 100))
    expected = transforms.RandomResizedCrop.get_params(
        torch.zeros(1, height, width), [5.0, 5.0], list(RATIO)
    )
    assert crop_box(height, width, (5.0, 5.0), RATIO, greedy) == tuple(expected)


def test_crops_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    rng, image = generator(), torch.zeros(1, 90, 200)
    ours = np.array([crop_box(90, 200, SCALE, RATIO, rng) for _ in range(4000)])
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(4000)]
    )
    for column in range(4):
        shared = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        below = [
            np.searchsorted(np.sort(part[:, column]), shared, side="right") / 4000
            for part in (ours, theirs)
        ]
        assert np.abs(below[0] - below[1]).max() < 0.043  # Kolmogorov-Smirnov, p = 0.001


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 10_000))
def test_a_crop_lies_inside(height: int, width: int, seed: int) -> None:
    top, left, crop_height, crop_width = crop_box(height, width, SCALE, RATIO, generator(seed))
    assert top >= 0 and left >= 0 and crop_height > 0 and crop_width > 0  # noqa: PT018
    assert top + crop_height <= height
    assert left + crop_width <= width


def test_the_whole_image_is_a_possible_crop() -> None:
    assert crop_box(90, 90, (1.0, 1.0), (1.0, 1.0), generator()) == (0, 0, 90, 90)


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (200, 230)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_bytes_are_resized_as_pil_resizes_them(
    size: tuple[int, int], interpolation: str, channels: int
) -> None:
    pixels = photo(channels=channels)
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[
        interpolation
    ]
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    got = resize(image, size, interpolation)
    for channel in range(channels):
        expected = np.asarray(
            Image.fromarray(pixels[..., channel]).resize(size[::-1], resample)
        ).astype(int)
        difference = np.abs(got[channel].numpy().astype(int) - expected)
        assert difference.max() <= 2  # torch keeps weights in 16 bits, PIL in 32
        assert difference.mean() < 0.1


def test_memory_layout_does_not_change_pixels() -> None:
    """Decoders hand out pixels side by side, planes, crops of either, or one plane seen three
    times.
    """
    pixels = torch.from_numpy(photo())
    side_by_side, planes = pixels.permute(2, 0, 1), pixels.permute(2, 0, 1).contiguous()
    crops = [image[:, 10:90, 5:140] for image in (side_by_side, planes)]
    assert torch.equal(resize(crops[0], (32, 32)), resize(crops[1], (32, 32)))
    one = planes[:1].expand(3, -1, -1)
    assert torch.equal(resize(one, (32, 32)), resize(one.contiguous(), (32, 32)))
    assert torch.equal(resize(crops[0], (80, 135)), crops[0])


def test_floats_are_resized_like_bytes_without_rounding() -> None:
    image = torch.from_numpy(photo().transpose(2, 0, 1).copy())
    expected = F.interpolate(image[None].float() / 255, (50, 60), mode="bicubic", antialias=True)[0]
    got = resize(image.float() / 255, (50, 60))
    assert torch.equal(got, expected)
    assert (got - resize(image, (50, 60)).float() / 255).abs().max() < 1.5 / 255


def test_the_box_says_which_pixels_were_taken() -> None:
    view = TrainView(seen(24, 32, flip=0.5))
    pixels = photo()
    for seed in range(20):
        sample = view(pixels, generator(seed))
        (got,), box, flip = sample.views, sample.box, sample.flip
        rng = generator(seed)
        top, left, height, width = crop_box(120, 160, SCALE, RATIO, rng)
        assert flip == (rng.random() < 0.5)
        assert torch.allclose(box, torch.tensor([top / 120, left / 160, height / 120, width / 160]))
        crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(
            2, 0, 1
        )
        assert torch.equal(got, resize(crop, (24, 32)))  # not mirrored: the device does that
        assert got.shape == (3, 24, 32)
        assert got.is_contiguous()
        assert got.dtype == torch.uint8


@pytest.mark.parametrize(("flip", "expected"), [(0.0, 0), (1.0, 50)])
def test_flip_is_a_probability(flip: float, expected: int) -> None:
    view = TrainView(seen(8, flip=flip))
    assert sum(int(view(photo(20, 20), generator(seed)).flip) for seed in range(50)) == expected


@pytest.mark.parametrize(
    ("height", "width"), [(120, 160), (160, 120), (100, 100), (33, 47), (20, 300)]
)
def test_the_plain_view_is_resize_and_centre_crop(height: int, width: int) -> None:
    pixels = photo(height, width)
    sample = PlainView(seen(28))(pixels, generator())
    (got,), box, flip = sample.views, sample.box, sample.flip
    both = [transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(28)]
    expected = np.asarray(transforms.Compose(both)(Image.fromarray(pixels))).astype(int)
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert not flip
    assert box[2] == pytest.approx(28 / 32 * min(1, width / height), abs=0.02)
    assert box[0] == pytest.approx((1 - box[2].item()) / 2, abs=0.02)


@pytest.mark.parametrize(("height", "width"), [(120, 160), (160, 120), (50, 50)])
def test_a_plain_view_may_be_a_rectangle(height: int, width: int) -> None:
    sample = PlainView(seen(24, 48), 0.8)(photo(height, width), generator())
    (got,), box = sample.views, sample.box
    assert got.shape == (3, 24, 48)
    assert (box >= 0).all()
    assert max(box[2].item(), box[3].item()) == pytest.approx(0.8, abs=0.02)  # one side just fits


def test_the_plain_view_can_squash() -> None:
    image = torch.from_numpy(photo().transpose(2, 0, 1).copy())
    sample = PlainView(seen(16), None)(image, generator())
    (got,), box = sample.views, sample.box
    assert torch.equal(got, resize(image, (16, 16)))
    assert box.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "view", [TrainView(seen(32), smallest_side=16), PlainView(seen(32), smallest_side=16)]
)
def test_an_image_smaller_than_a_patch_is_refused(view: View) -> None:
    with pytest.raises(
        DecodeError, match=r"is 40x15 pixels, smaller than a patch of 16x16; .* patch_size"
    ):
        view(photo(15, 40), generator())
    assert view(photo(16, 16), generator()).views[0].shape == (3, 32, 32)
    assert pickle.loads(pickle.dumps(view)) == view


def test_mistaken_settings_are_named() -> None:
    with pytest.raises(ValidationError, match=r"interpolation\n.*'bicubic'"):
        seen(8, interpolation="nearest")
    with pytest.raises(UserError, match=r"crop_pct=1\.2"):
        PlainView(seen(8), crop_pct=1.2)
