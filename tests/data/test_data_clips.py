"""Clips: which frames are taken, one crop for all of them, several clips of one opening."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loading import clips, start

from patchmine.data import samples
from patchmine.data.badfiles import BadFiles
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import open_video
from patchmine.data.loader import plain_batches
from patchmine.data.settings import Clip
from patchmine.data.sources.contract import Labels
from patchmine.data.views.clips import (
    PlainClips,
    TestClips,
    TrainClips,
    even_crops,
    even_windows,
    scaled_crop,
    window,
)

SCALES = (1.0, 0.875, 0.75, 0.66)


def numbered(frames: int, height: int = 24, width: int = 32) -> np.ndarray:
    """(F, H, W, 3) uint8: red is the number of the frame, green the row, blue the column."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 0] = np.arange(frames)[:, None, None]
    video[..., 1] = np.arange(height)[None, :, None]
    video[..., 2] = np.arange(width)
    return video


def test_a_window_takes_every_stride_th_frame() -> None:
    assert window(100, 7, 4, 5, "hold") == [7, 12, 17, 22]
    assert window(23, 7, 4, 5, "refuse") == [7, 12, 17, 22]  # the last one that it needs is there


def test_what_becomes_of_a_video_that_is_shorter_than_the_clip() -> None:
    assert window(10, 0, 6, 3, "hold") == [0, 3, 6, 9, 9, 9]
    assert window(10, 0, 6, 3, "loop") == [0, 3, 6, 9, 2, 5]
    assert window(1, 0, 3, 4, "hold") == [0, 0, 0]
    with pytest.raises(
        DecodeError, match=r"has 10 frames where a clip of 6, 3 apart, needs 16; .*clip\.short=hold"
    ):
        window(10, 0, 6, 3, "refuse")


def test_training_windows_begin_everywhere_and_fit() -> None:
    video, view = numbered(70), TrainClips(clips(24, 16, 4, scales=[1.0]))
    seen = Counter()
    for seed in range(200):
        sample = view(video, np.random.default_rng(seed))
        (pixels,), flip = sample.views, sample.flip
        frames = pixels[0, :, 0, 0].tolist()
        assert pixels.shape == (3, 16, 24, 24)
        assert pixels.is_contiguous()
        assert np.diff(frames).tolist() == [4] * 15
        seen[frames[0]] += 1
        assert not flip
    assert sorted(seen) == list(range(7))  # 70 - 64 + 1


def test_one_crop_serves_all_frames_and_the_box_says_which() -> None:
    video, view = numbered(20), TrainClips(clips(24, 8, 1, scales=list(SCALES), flip=0.5))
    flips = 0
    for seed in range(30):
        sample = view(video, np.random.default_rng(seed))
        (pixels,), box, flip = sample.views, sample.box, int(sample.flip)
        assert (pixels[1:] == pixels[1:, :1]).all()  # rows and columns do not move
        top, left, height, width = (box * torch.tensor([24, 32, 24, 32])).round().int().tolist()
        crop = torch.from_numpy(video[0, top : top + height, left : left + width]).permute(2, 0, 1)
        expected = F.interpolate(crop[None].float(), (24, 24), mode="bilinear", antialias=True)[0]
        assert (pixels[1:, 0].float() - expected[1:]).abs().max() <= 1
        flips += flip
    assert 5 < flips < 25


def test_crops_have_neighbouring_scales_at_thirteen_places() -> None:
    generator = np.random.default_rng(0)
    crops = {scaled_crop(256, 340, (224, 224), SCALES, generator) for _ in range(4000)}
    sides = {(height, width) for _, _, height, width in crops}
    # 0.875 of 256 is 224 already; 0.66 of it is 168.
    scaled = [256, 224, 192, 168]
    assert sides == {
        (a, b) for i, a in enumerate(scaled) for j, b in enumerate(scaled) if abs(i - j) <= 1
    }
    corners = {(top, left) for top, left, height, width in crops if (height, width) == (192, 192)}
    assert corners == {
        (16 * row, 37 * column)
        for row, column in (
            *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4)),
            *((4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)),
        )
    }


def test_a_side_that_nearly_fits_is_taken_as_it_is_wanted() -> None:
    generator = np.random.default_rng(0)
    assert scaled_crop(226, 300, (224, 224), (1.0,), generator)[2:] == (224, 224)
    assert scaled_crop(227, 300, (224, 224), (1.0,), generator)[2:] == (227, 227)
    assert scaled_crop(223, 300, (224, 224), (1.0,), generator)[2:] == (
        223,
        224,
    )  # no pixel is made up


def test_the_plain_clip_lies_in_the_middle() -> None:
    sample = PlainClips(clips(24, 4, 5))(numbered(40), np.random.default_rng(0))
    (pixels,), box, flip = sample.views, sample.box, sample.flip
    assert pixels[0, :, 0, 0].tolist() == [10, 15, 20, 25]
    assert pixels[2, 0, 0].tolist() == list(range(4, 28))
    assert torch.equal(box, torch.tensor([0.0, 0.125, 1.0, 0.75]))
    assert not flip
    view = PlainClips(clips(12, 4, 5, channels=1), crop_pct=None)
    sample = view(numbered(40), np.random.default_rng(0))
    (whole,), box = sample.views, sample.box
    assert whole.shape == (1, 4, 12, 12)
    assert box.tolist() == [0, 0, 1, 1]


def test_test_clips_cover_the_video_from_end_to_end() -> None:
    assert [w[0] for w in even_windows(300, Clip(frames=16, stride=4), 5)] == [
        0,
        56,
        116,
        176,
        236,
    ]  # of 75 listed frames
    assert [w[0] for w in even_windows(30, Clip(frames=16, stride=4), 5)] == [0] * 5
    assert even_crops(24, 32, (24, 24), 3) == [(0, 0), (0, 4), (0, 8)]
    assert even_crops(32, 24, (24, 24), 1) == [(4, 0)]
    video = numbered(60)
    sample = TestClips(clips(24, 4, 5), segments=3, crops=2)(video, np.random.default_rng(0))
    (pixels,), boxes = sample.views, sample.box
    assert pixels.shape == (6, 3, 4, 24, 24)
    assert pixels[:, 0, 0, 0, 0].tolist() == [0, 0, 20, 20, 40, 40]  # segments outermost
    assert pixels[:, 2, 0, 0, 0].tolist() == [0, 8] * 3
    assert boxes[:, 1].tolist() == [0, 0.25] * 3
    for number, first in enumerate((0, 20, 40)):
        expected = torch.from_numpy(video[first : first + 20 : 5, :, :24]).permute(3, 0, 1, 2)
        assert torch.equal(pixels[2 * number], expected)


class Videos:
    """Clips in memory that count how often they are read."""

    name, fingerprint, notes = "clips", "clips", ()

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken, self.reads = count, broken, Counter[int]()

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        self.reads[index] += 1
        return numbered(4 if index in self.broken else 40)

    def path(self, index: int) -> str:
        return f"clips[{index}]"

    def labels(self) -> Labels | None:
        return None


def batches(
    source: Videos, repeats: int, *, first: int = 0, rank: int = 0, world: int = 1
) -> list[samples.Batch]:
    view = TrainClips(clips(24, 8, 1, short="refuse", flip=0.5, repeats=repeats))
    options = dict(seed=3, batch_size=4, steps_per_epoch=len(source) * repeats // 4)
    parts = dict(start_step=first, total_steps=6, rank=rank, world_size=world)
    return list(start(source, view, **options, **parts, bad=BadFiles(None, 1.0)))


def test_several_clips_come_of_one_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(
        samples, "open_video", lambda raw, *rest: opened.append(raw) or open_video(raw, *rest)
    )
    source = Videos(6)
    made = batches(source, repeats=2)
    assert len(made) == 6
    assert len(opened) == 12
    assert set(source.reads.values()) == {2}  # once an epoch
    for batch in made:
        assert batch.views[0].shape == (4, 3, 8, 24, 24)
        assert torch.equal(batch.index[0::2], batch.index[1::2])
        assert not torch.equal(
            batch.views[0][0::2], batch.views[0][1::2]
        )  # other windows, other crops
    epoch = torch.cat([batch.index for batch in made[:3]])
    assert Counter(epoch.tolist()) == dict.fromkeys(range(6), 2)


def test_batches_of_clips_resume_and_divide_exactly() -> None:
    whole = batches(Videos(6), repeats=2)
    for batch, again in zip(whole[2:], batches(Videos(6), repeats=2, first=2), strict=True):
        assert torch.equal(batch.views[0], again.views[0])
        assert torch.equal(batch.flip, again.flip)
    halves = [batches(Videos(6), repeats=2, rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch.views[0], torch.cat([part.views[0] for part in parts]))


def test_a_video_that_is_refused_is_listed_and_replaced(tmp_path: Path) -> None:
    source, bad = Videos(8, broken=(5,)), BadFiles(tmp_path / "bad.txt", 0.5, "video")
    view = TrainClips(clips(24, 8, 1, short="refuse", repeats=2))
    made = list(start(source, view, batch_size=4, total_steps=4, bad=bad))
    assert len(made) == 4
    assert all(5 not in batch.index for batch in made)
    assert (tmp_path / "bad.txt").read_text().startswith("clips[5]\thas 4 frames where a clip of 8")
    plain = list(plain_batches(source, PlainClips(clips(24, 8, 1)), batch_size=5))
    assert [len(batch) for batch in plain] == [5, 3]  # by default the last frame is held
