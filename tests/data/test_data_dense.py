"""Crops of images with label maps, and whole images, against their colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fixtures.label_maps import COLOURS, scene
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.samples import collate
from patchmine.data.settings import DenseViewSettings
from patchmine.data.views.dense import SegmentView, WholeView
from patchmine.data.views.normalise import normalise

IGNORED = 255


def settings(**given: Any) -> DenseViewSettings:
    base = dict(image_size=(32, 24), mean=[0.0] * 3, std=[1.0] * 3, colour_jitter=0)
    return DenseViewSettings(**{**base, **given})


def seen(view: Any, seed: int, size: tuple[int, int] = (40, 48)) -> tuple[torch.Tensor, Any]:
    """Pixels (3, H, W) in [0, 255] as the network has them, mirrored; and labels."""
    pixels, labels = scene(np.random.default_rng(seed), *size)
    sample = view(pixels, np.random.default_rng(seed), labels.astype(np.int32))
    batch = normalise(collate([sample]), torch.zeros(3), torch.ones(3), "cpu")
    return 255 * batch.views[0][0], batch.target[0]


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.4, 0.8), (1.5, 3.0)])
def test_labels_stay_on_their_pixels(scale: tuple[float, float]) -> None:
    view = SegmentView(settings(scale=scale, crop_max_share=1.0), IGNORED)
    for seed in range(12):
        pixels, labels = seen(view, seed)
        assert pixels.shape == (3, 32, 24)
        assert labels.shape == (32, 24)
        nearest = (pixels[None] - torch.tensor(COLOURS).float()[:, :, None, None]).square().sum(1)
        known = labels != IGNORED
        right = (nearest.argmin(0) == labels)[known].float().mean()
        assert right > (0.93 if scale != (1.0, 1.0) else 0.999)  # edges are mixtures


def test_what_is_smaller_than_a_crop_is_padded_with_nothing() -> None:
    view = SegmentView(settings(scale=(0.5, 0.5), flip=0.0), IGNORED)  # 40x48 becomes 20x24
    pixels, labels = seen(view, 1)
    assert (labels[20:] == IGNORED).all()
    assert (labels[:20] != IGNORED).all()
    assert (pixels[:, 20:] == 0).all()


def test_the_short_side_decides_the_scale() -> None:
    view = SegmentView(settings(image_size=(80, 80), short_side=80, scale=(1, 1)), IGNORED)
    _, labels = seen(view, 2)
    assert (labels != IGNORED).all()  # 40x48 covers 80x80 at twice its size


def test_crops_of_one_class_are_drawn_again() -> None:
    labels = np.zeros((64, 64), np.int32)
    labels[:, :8] = 1
    pixels = np.zeros((64, 64, 3), np.uint8)
    small = settings(image_size=(16, 16), scale=(1, 1))
    shares = {}
    for most in (1.0, 0.75):
        view = SegmentView(small.model_copy(update={"crop_max_share": most}), IGNORED)
        samples = [view(pixels, np.random.default_rng(seed), labels) for seed in range(40)]
        shares[most] = np.mean([len(sample.target.unique()) == 2 for sample in samples])
    assert shares[0.75] > shares[1.0] + 0.2


def test_colours_change_and_labels_do_not() -> None:
    plain = SegmentView(settings(), IGNORED)
    jittered = SegmentView(settings(colour_jitter=0.5), IGNORED)
    pixels, labels = seen(plain, 3)
    changed, same = seen(jittered, 3)
    assert torch.equal(labels, same)
    assert (pixels - changed).abs().mean() > 5


def test_whole_images_keep_the_size_of_their_labels() -> None:
    pixels, labels = seen(WholeView(settings(short_side=20)), 4)
    assert pixels.shape == (3, 20, 24)
    assert labels.shape == (40, 48)
    assert seen(WholeView(settings()), 4)[0].shape == (3, 40, 48)


def test_labels_of_another_size_are_refused() -> None:
    view = SegmentView(settings(), IGNORED)
    with pytest.raises(DecodeError, match="is 48x40 pixels, but its label map 40x40"):
        view(np.zeros((40, 48, 3), np.uint8), np.random.default_rng(0), np.zeros((40, 40)))
