"""Views of labelled items: timm's RandAugment and erasing, whatever the worker, and global random
states that stay as they were.
"""

# ruff: noqa: NPY002  timm draws from the global generators, which these tests set

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from loading import clips, seen, start
from PIL import Image, ImageOps
from pydantic import ValidationError
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from patchmine.data.items import CLIP, IMAGE
from patchmine.data.settings import AugmentSettings, SupervisedSettings, ViewSettings
from patchmine.data.sources.contract import Labels
from patchmine.data.views.clips import LabelledClips
from patchmine.data.views.geometry import Geometry
from patchmine.data.views.images import TrainView, crop_box
from patchmine.data.views.supervised import SupervisedView, erase_box
from patchmine.errors import UserError
from patchmine.types import Sample

POLICY = "rand-m9-mstd0.5-inc1"


def supervised(base: ViewSettings, **settings: Any) -> SupervisedSettings:
    return SupervisedSettings(**base.model_dump(), **settings)


def image(channels: int = 3, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    pixels = np.random.default_rng(seed).integers(0, top, (40, 52, channels), dtype, endpoint=True)
    return pixels[..., 0] if channels == 1 else pixels


def posterized(picture: Image.Image, bits: int) -> Image.Image:
    """As Pillow did it until it refused to keep no bits."""
    kept = [value & ~(2 ** (8 - bits) - 1) for value in range(256)]
    return picture.point(kept * len(picture.getbands()))


def equal(left: Sample, right: Sample) -> bool:
    pairs = zip(left.views, right.views, strict=True)
    erased = left.erase is None or right.erase is None or torch.equal(left.erase, right.erase)
    same = torch.equal(left.box, right.box) and torch.equal(left.flip, right.flip)
    return same and erased and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("policy", "interpolation"), [(POLICY, "bicubic"), ("rand-n3-p0.9-tweights", "bilinear")]
)
def test_operations_are_timms(
    channels: int, policy: str, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = seen(24, 32, channels=channels, interpolation=interpolation)
    settings = supervised(base, auto_augment=policy)
    view, crop = IMAGE.supervised_view(settings, 1), TrainView(base)
    fill = (124, 116, 104) if channels == 3 else 128
    resample = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[interpolation]
    hints = {"translate_const": 10, "img_mean": fill, "interpolation": resample}
    transform, changed = rand_augment_transform(policy, hints), 0
    monkeypatch.setattr(ImageOps, "posterize", posterized)
    for seed in range(12):
        raw, generator = image(channels, seed), np.random.default_rng(seed)
        cropped = crop(raw, generator, "label")
        word = int(generator.integers(2**32, size=2)[0])
        random.seed(word)
        np.random.seed(word)
        pixels = cropped.views[0].permute(1, 2, 0).numpy()
        expected = np.asarray(transform(Image.fromarray(pixels.squeeze())))
        found = view(raw, np.random.default_rng(seed), "label")
        assert found.views[0].shape == (channels, 24, 32)
        assert found.views[0].is_contiguous()
        assert np.array_equal(found.views[0].permute(1, 2, 0).numpy().squeeze(), expected)
        assert torch.equal(found.box, cropped.box)
        assert torch.equal(found.flip, cropped.flip)
        assert found.target == "label"
        changed += not torch.equal(found.views[0], cropped.views[0])
    assert changed > 4


def test_without_augmentation_a_view_is_that_of_pre_training() -> None:
    base = seen(24, channels=5)
    view = IMAGE.supervised_view(supervised(base), 1)
    for seed in range(3):
        found = view(image(5), np.random.default_rng(seed))
        assert found.erase is None
        assert equal(found, TrainView(base)(image(5), np.random.default_rng(seed)))
    with_boxes = IMAGE.supervised_view(supervised(base, erase_prob=1), 1)
    assert equal(
        with_boxes(image(5), np.random.default_rng(0)), view(image(5), np.random.default_rng(0))
    )


def test_the_least_side_is_that_of_pre_training() -> None:
    settings = supervised(seen(24), auto_augment=POLICY)
    for item in (IMAGE, CLIP):
        assert item.supervised_view(settings, 48).crop.smallest_side == 48


def test_global_random_states_stay_as_they_were() -> None:
    view = IMAGE.supervised_view(supervised(seen(24), auto_augment=POLICY, erase_prob=0.5), 1)
    random.seed(3)
    np.random.seed(4)
    expected = random.gauss(0, 1), random.random(), np.random.randn(3).tolist()
    random.seed(3)
    np.random.seed(4)
    first = random.gauss(0, 1)  # leaves its pair behind, as the state knows
    view(image(), np.random.default_rng(0))
    with pytest.raises(UserError):
        view(image(dtype=np.uint16), np.random.default_rng(0))
    assert (first, random.random(), np.random.randn(3).tolist()) == expected


def test_an_image_of_which_no_bit_is_kept_is_black() -> None:
    settings = supervised(seen(24), auto_augment="rand-m10-n9-p1-inc1")
    view, black = IMAGE.supervised_view(settings, 1), 0
    for seed in range(12):
        (pixels,) = view(image(), np.random.default_rng(seed)).views
        black += int(pixels.float().std() == 0)
    assert black > 0


class Pictures:
    """Twelve images."""

    name = "pictures"
    fingerprint = "pictures"

    def __len__(self) -> int:
        return 12

    def read(self, index: int) -> Any:
        return image(seed=index)

    def path(self, index: int) -> str:
        return f"{index}.png"

    def labels(self) -> Labels | None:
        return None


def test_samples_are_the_same_for_any_worker_and_process() -> None:
    view = IMAGE.supervised_view(supervised(seen(24), auto_augment=POLICY, erase_prob=0.5), 1)
    view = pickle.loads(pickle.dumps(view))

    def batches(**place: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        steps = {"batch_size": 4, "steps_per_epoch": 3, "total_steps": 6}
        found = list(start(Pictures(), view, **steps, **place))
        assert all(batch.erase is not None for batch in found)
        return [(batch.index, batch.views[0], batch.erase) for batch in found]

    whole = batches()
    boxes = torch.cat([erase for _, _, erase in whole])
    assert boxes.dtype == torch.int64
    assert boxes.shape == (24, 4)
    assert 0 < (boxes[:, 2] == 0).sum() < 24
    halves = [batches(world_size=2, rank=rank) for rank in range(2)]
    joined = [
        tuple(torch.cat(pair) for pair in zip(*both, strict=True))
        for both in zip(*halves, strict=True)
    ]
    for other in (batches(workers=2), joined):
        for left, right in zip(whole, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_frames_of_a_clip_are_changed_alike() -> None:
    base = clips(24, 4, 1, repeats=2)
    view = CLIP.supervised_view(supervised(base, auto_augment="rand-n4-p1", erase_prob=1), 1)
    assert view.repeats == 2
    video = np.repeat(image()[None], 6, 0)  # whose frames are all the same
    for seed in range(4):
        generator = np.random.default_rng(seed)
        found, again = view(video, generator), view(video, generator)
        (pixels,) = found.views
        assert pixels.shape == (3, 4, 24, 24)
        assert pixels.is_contiguous()
        assert (pixels == pixels[:, :1]).all()
        assert found.erase.shape == (4,)
        assert not torch.equal(pixels, again.views[0])
        (plain,) = LabelledClips(base)(video, np.random.default_rng(seed)).views
        assert not torch.equal(pixels, plain)


def test_whole_frames_of_a_clip_are_changed_and_then_cropped() -> None:
    policy, scale, ratio = "rand-m7-n4-mstd0.5-inc1", (0.08, 1.0), (3 / 4, 4 / 3)
    base = clips(16, 3, 1, crop_scale=scale, crop_ratio=ratio, interpolation="bicubic")
    view = CLIP.supervised_view(supervised(base, auto_augment=policy), 1)
    hints = {"translate_const": 7, "img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    transform, changed = rand_augment_transform(policy, hints), 0
    video = np.stack([image(seed=number) for number in range(3)])  # (3, 40, 52, 3)
    for seed in range(12):
        generator = np.random.default_rng(seed)
        generator.integers(1)  # the window
        geometry = Geometry(crop_box(40, 52, scale, ratio, generator), (16, 16))
        generator.random()  # the flip
        word = int(generator.integers(2**32, size=2)[0])
        expected = []
        for frame in video:
            random.seed(word)
            np.random.seed(word)
            pixels = np.array(transform(Image.fromarray(frame)))
            expected.append(geometry.apply(torch.from_numpy(pixels).permute(2, 0, 1), "bicubic"))
        (found,) = view(video, np.random.default_rng(seed)).views
        assert torch.equal(found, torch.stack(expected, 1))
        (plain,) = LabelledClips(base)(video, np.random.default_rng(seed)).views
        changed += not torch.equal(found, plain)
    assert changed > 4


def test_a_labelled_clip_has_one_crop_by_area_and_shape() -> None:
    scale, ratio = (0.08, 0.2), (3 / 4, 4 / 3)
    base = clips(16, 3, 1, crop_scale=scale, crop_ratio=ratio, interpolation="bicubic")
    pixels = image()  # (40, 52, 3)
    video = np.stack([pixels] * 3)
    for seed in range(20):
        found = CLIP.supervised_view(supervised(base), 1)(video, np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        generator.integers(1)  # the window
        box = top, left, height, width = crop_box(40, 52, scale, ratio, generator)
        assert found.box.tolist() == pytest.approx([top / 40, left / 52, height / 40, width / 52])
        assert 0.07 < height * width / (40 * 52) < 0.21  # sides are whole pixels
        cut = Geometry(box, (16, 16)).apply(torch.from_numpy(pixels).permute(2, 0, 1), "bicubic")
        (clip,) = found.views
        assert all(torch.equal(frame, cut) for frame in clip.unbind(1))


def test_boxes_to_erase_are_timms() -> None:
    for height, width, probability in ((48, 64, 1.0), (33, 20, 0.4), (3, 3, 1.0)):
        peer = RandomErasing(probability, mode="const", device="cpu")
        random.seed(7)
        draws = random.Random(7)
        for _ in range(60):
            expected = peer(torch.ones(1, height, width))[0]
            top, left, tall, wide = erase_box(height, width, probability, draws)
            found = torch.ones(height, width)
            found[top : top + tall, left : left + wide] = 0
            assert torch.equal(found, expected)
        assert draws.random() == random.random()  # as many were drawn


def test_deep_images_are_refused_where_they_cannot_be_changed() -> None:
    deep = image(dtype=np.uint16)
    plain = IMAGE.supervised_view(supervised(seen(24), erase_prob=0.5), 1)
    assert plain(deep, np.random.default_rng(0)).views[0].dtype == torch.float32
    view = IMAGE.supervised_view(supervised(seen(24), auto_augment=POLICY), 1)
    with pytest.raises(UserError, match=rf"auto_augment={POLICY} .*auto_augment=null.* 8 bits"):
        view(deep, np.random.default_rng(0))


def test_other_channels_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ValidationError, match=r"channels=5.*auto_augment=null"):
        supervised(seen(24, channels=5), auto_augment=POLICY)


@pytest.mark.parametrize(
    "policy",
    [
        *("augmix-m5", "rand", "rand-", "rand-m", "rand-m9.5", "rand-x3", "rand-m9-foo", "randm9"),
        *(
            "rand-p2",
            "rand-p.5",
            "rand-n0",
            "rand-n99",
            "rand-mmax0",
            "rand-tnothing",
            "original",
            "",
        ),
    ],
)
def test_words_that_are_no_rand_augment_are_refused(policy: str) -> None:
    with pytest.raises(ValidationError, match=f"auto_augment: given {policy}; .*rand-m9"):
        AugmentSettings(auto_augment=policy)


@pytest.mark.parametrize(
    "policy",
    [
        *(POLICY, "rand-m7-n4-mstd0.5-inc1", "rand-m15-mmax20", "rand-mstd101", "rand-p0.25-n9"),
        *("rand-n9-tweights-p1", "rand-n9-t3a-p1-m10", "rand-n9-t3aw-p1", "rand-p0"),
        "rand-n9-p1-m99-mmax99-inc0",
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_words_that_pass_are_understood_by_timm(policy: str, channels: int) -> None:
    settings = supervised(seen(16, channels=channels), auto_augment=policy)
    view = SupervisedView(settings, TrainView(settings))
    for seed in range(4):
        (pixels,) = view(image(channels), np.random.default_rng(seed)).views
        assert pixels.shape == (channels, 16, 16)


def test_numbers_of_mixing_have_bounds() -> None:
    for name in ("mixup", "cutmix"):
        for value in (-0.1, math.inf, 1e9):
            with pytest.raises(ValidationError):
                AugmentSettings(**{name: value})
