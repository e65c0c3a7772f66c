"""Several crops of one image: decoded once, drawn before anything is cut, the same whatever the
workers.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from loading import seen, start
from PIL import Image

from patchmine.data.badfiles import BadFiles
from patchmine.data.decoding import opened
from patchmine.data.decoding.decode import DecodeError, jpeg_pixels
from patchmine.data.randomness import sample_generator
from patchmine.data.settings import Crops
from patchmine.data.sources.contract import Labels
from patchmine.data.views.geometry import resize
from patchmine.data.views.images import MultiCropView
from patchmine.data.views.normalise import normalise
from patchmine.data.views.photometric import COLUMNS, change_colours
from patchmine.types import Batch, Sample

VIEW = MultiCropView(seen(16, 24, crops={"num_local": 3, "local_size": 8}))


class Pictures:
    """Noise of odd sizes; those of ``deep`` have 16 bits."""

    name = "pictures"
    fingerprint = "pictures"

    def __init__(self, broken: tuple[int, ...] = (), deep: tuple[int, ...] = ()) -> None:
        self.broken, self.deep = frozenset(broken), frozenset(deep)

    def __len__(self) -> int:
        return 16

    def read(self, index: int) -> Any:
        if index in self.broken:
            raise OSError("input/output error")
        dtype = np.uint16 if index in self.deep else np.uint8
        return np.random.default_rng(index).integers(
            0, np.iinfo(dtype).max, (30 + index, 41, 3), dtype=dtype
        )

    def path(self, index: int) -> str:
        return f"{index}.png"

    def labels(self) -> Labels | None:
        return None


def train(
    source: Pictures | None = None, view: MultiCropView = VIEW, **settings: Any
) -> list[Batch]:
    settings = {"batch_size": 4, "bad": BadFiles(None, 0.5), **settings}
    return list(start(source or Pictures(), view, **settings))


def tensors(batch: Batch) -> list[torch.Tensor]:
    assert batch.photometric is not None
    return [*batch.views, batch.index, batch.box, batch.flip, batch.photometric]


def drawn(sample: Sample) -> list[torch.Tensor]:
    assert sample.photometric is not None
    return [sample.box, sample.flip, sample.photometric]


def same(left: Batch, right: Batch) -> bool:
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(tensors(left), tensors(right), strict=True)
    )


def test_an_image_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        opened, "jpeg_pixels", lambda *given: calls.append(given) or jpeg_pixels(*given)
    )
    file = io.BytesIO()
    Image.fromarray(Pictures().read(0)).save(file, "JPEG")
    views = VIEW(file.getvalue(), sample_generator(0, 0, 0)).views
    assert len(calls) == 1
    assert [tuple(view.shape) for view in views] == [(3, 16, 24)] * 2 + [(3, 8, 8)] * 3
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in views)


def test_boxes_say_which_pixels_were_taken() -> None:
    pixels = Pictures().read(5)
    height, width = pixels.shape[:2]
    for seed in range(10):
        crops = VIEW(pixels, np.random.default_rng(seed))
        views, box, flip, photometric = crops.views, crops.box, crops.flip, crops.photometric
        assert box.shape == (5, 4)
        assert flip.shape == (5,)
        assert flip.dtype == torch.bool
        assert photometric.shape == (5, COLUMNS)
        for view, (top, left, tall, wide) in zip(views, box.tolist(), strict=True):
            top, tall = round(top * height), round(tall * height)
            left, wide = round(left * width), round(wide * width)
            crop = torch.from_numpy(pixels[top : top + tall, left : left + wide].copy()).permute(
                2, 0, 1
            )
            assert torch.equal(view, resize(crop, tuple(view.shape[-2:])))


def test_shares_of_the_image_are_those_asked_for() -> None:
    crops = Crops(num_local=2, local_size=8, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    view = MultiCropView(seen(8, crops=crops, flip=0.25))
    image = np.zeros((300, 300, 3), np.uint8)
    found = [view(image, np.random.default_rng(seed)) for seed in range(400)]
    area = torch.stack([crops.box[:, 2] * crops.box[:, 3] for crops in found])  # (400, V)
    large, small = area[:, :2], area[:, 2:]
    assert 0.39 < large.min() < 0.42
    assert large.max() > 0.95
    assert 0.045 < small.min() < 0.06
    assert 0.38 < small.max() < 0.41
    assert torch.stack([crops.flip for crops in found]).float().mean() == pytest.approx(
        0.25, abs=0.04
    )


def test_sizes_do_not_change_what_is_drawn() -> None:
    image = Pictures().read(3)
    one, other = (
        MultiCropView(seen(side, crops={"num_local": 4, "local_size": side}))(
            image, np.random.default_rng(7)
        )
        for side in (8, 24)
    )
    assert all(torch.equal(a, b) for a, b in zip(drawn(one), drawn(other), strict=True))


def test_there_need_be_no_local_crops() -> None:
    view = MultiCropView(seen(8, crops={"num_local": 0}))
    crops = view(Pictures().read(0), np.random.default_rng(0))
    assert len(crops.views) == len(crops.box) == 2


def test_mistakes_are_named_and_views_travel() -> None:
    with pytest.raises(DecodeError, match="smaller than a patch of 64x64"):
        MultiCropView(seen(64), smallest_side=64)(Pictures().read(0), np.random.default_rng(0))
    assert pickle.loads(pickle.dumps(VIEW)) == VIEW


# Batches
# --------------------------------------------------------------------------------------------------------------


def test_a_batch_holds_all_crops_in_order() -> None:
    for step, batch in enumerate(train()):
        assert [tuple(view.shape) for view in batch.views] == [(4, 3, 16, 24)] * 2 + [
            (4, 3, 8, 8)
        ] * 3
        assert len(batch) == 4
        for row, index in enumerate(batch.index.tolist()):
            alone = VIEW(Pictures().read(index), sample_generator(0, step // 4, index))
            found = [
                *(view[row] for view in batch.views),
                *(part[row] for part in tensors(batch)[-3:]),
            ]
            assert all(
                torch.equal(a, b) for a, b in zip([*alone.views, *drawn(alone)], found, strict=True)
            )


@pytest.mark.parametrize("broken", [(), (3, 9)])
def test_workers_change_nothing(broken: tuple[int, ...]) -> None:
    source = Pictures(broken=broken, deep=(1, 6))
    alone, shared = train(source), train(source, workers=2)
    assert len(alone) == 8
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_resumed_run_repeats_itself(start: int) -> None:
    whole, rest = train(), train(start_step=start, workers=1)
    assert len(rest) == 8 - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_processes_and_micro_batches_share_the_rows_of_one_batch() -> None:
    ranks = [train(rank=rank, world_size=2, accumulate=2) for rank in range(2)]
    for step, batch in enumerate(train()):
        parts = [tensors(ranks[rank][step * 2 + micro]) for micro in range(2) for rank in range(2)]
        for whole, *pieces in zip(tensors(batch), *parts, strict=True):
            assert torch.equal(torch.cat(pieces), whole)


def test_bytes_and_deeper_images_share_a_batch() -> None:
    batches = train(Pictures(deep=(2,)))
    for batch in batches:
        deep = 2 in batch.index.tolist()
        assert all(view.dtype == (torch.float32 if deep else torch.uint8) for view in batch.views)
        assert all(view.max() <= 1.5 for view in batch.views if deep)


# The device's part
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coloured", [True, False])
def test_normalise_mirrors_changes_colours_and_scales_each_crop(coloured: bool) -> None:
    (batch, *_) = train()
    if not coloured:
        batch = Batch(batch.views, batch.index, batch.box, batch.flip)
    kept = [view.clone() for view in batch.views]
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    got = normalise(batch, mean, std, "cpu")
    assert got.photometric is batch.photometric
    for number, view in enumerate(batch.views):
        assert got.views[number].shape == view.shape
        assert got.views[number].dtype == torch.float32
        for row in range(len(batch)):
            pixels = view[row : row + 1]
            pixels = pixels.flip(-1) if batch.flip[row, number] else pixels
            if batch.photometric is not None:
                pixels = change_colours(pixels, batch.photometric[row, number][None]) * 255
            expected = (pixels[0] / 255 - mean[:, None, None]) / std[:, None, None]
            off = (got.views[number][row] - expected).abs()
            assert (
                off.max() < 1.01 / 255 / 0.5
            )  # one level, where sums in another order are rounded otherwise
            assert (off > 1e-4).float().mean() < 0.01
    assert all(torch.equal(a, b) for a, b in zip(kept, batch.views, strict=True))


def test_a_batch_moves_as_a_whole() -> None:
    (batch, *_) = train()
    moved = batch.to("cpu")
    assert same(batch, moved)
    assert same(batch, batch.with_views(batch.views))
    plain = Batch([batch.views[0]], batch.index, batch.box[:, 0], batch.flip[:, 0]).to("cpu")
    assert plain.photometric is None
