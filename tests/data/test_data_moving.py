"""The moving photographs: motions that are what they are called, from disjoint halves, the same
every time.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from patchmine.data.sources.embedded import (
    FRAMES,
    MOTIONS,
    SIDE,
    MovingPhotos,
    Shot,
    draw_shot,
    film,
    levels_of,
)
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError


def ramps() -> torch.Tensor:
    """(3, 400, 400): red grows to the right, green downwards, blue is 0."""
    ramp = torch.arange(400.0) * 0.6
    return torch.stack(
        [ramp.expand(400, 400), ramp[:, None].expand(400, 400), torch.zeros(400, 400)]
    )


def shot(motion: str, amount: float) -> np.ndarray:
    return film(
        levels_of(ramps()), Shot(0, MOTIONS.index(motion), amount, 200.0, 200.0, 64.0, 0.0)
    ).astype(float)


def test_pans_show_what_lies_in_their_direction() -> None:
    for motion, channel, sign in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        levels = shot(f"pan-{motion}", 30)[..., channel].mean((1, 2))
        assert (sign * np.diff(levels) > 0).all()
        assert abs(levels[-1] - levels[0]) == pytest.approx(30 * 0.6, abs=1)
        other = shot(f"pan-{motion}", 30)[..., 1 - channel].mean((1, 2))
        assert np.ptp(other) < 0.5


def test_zooms_show_less_or_more() -> None:
    spread = np.ptp(shot("zoom-in", 1.8)[..., 0], axis=(1, 2))
    assert (np.diff(spread) <= 0).all()
    assert spread[0] / spread[-1] == pytest.approx(1.8, rel=0.05)
    assert np.ptp(shot("zoom-out", 1.8)[-1, ..., 0]) > np.ptp(shot("zoom-out", 1.8)[0, ..., 0])


def test_a_camera_that_turns_left_sees_the_world_turn_right() -> None:
    # Red grows to the right.  Turned to its left, the camera has the photograph's right below its
    # own right.
    left, right = shot("rotate-left", 60), shot("rotate-right", 60)
    downward = (left[:, -1, SIDE // 2] - left[:, 0, SIDE // 2])[:, 0]
    assert (np.diff(downward) > 0).all()
    assert np.allclose(left, right[::-1], atol=1)


def test_all_that_a_shot_shows_lies_in_the_photograph() -> None:
    sizes = [(192, 303), (350, 200), (256, 512)]
    for index in range(400):
        one = draw_shot("train", index, sizes)
        height, width = sizes[one.photograph]
        # A photograph of its own coordinates; beyond its border they would stop growing.
        rows = torch.arange(float(height))[:, None].expand(height, width)
        columns = torch.arange(float(width)).expand(height, width)
        scaled = torch.stack(
            [rows * 250 / height, columns * 250 / width, torch.zeros(height, width)]
        )
        if index % 8 >= 4 and index < 32:
            frames = film([scaled], one).astype(float)
            corners = frames[:, [0, 0, -1, -1], [0, -1, 0, -1]]
            centre = corners.mean(1)
            assert np.abs(centre[:, 0] - 250 * one.row / height).max() < 3
            assert np.abs(centre[:, 1] - 250 * one.column / width).max() < 3
        assert 0 < one.row < height
        assert 0 < one.column < width


def test_clips_are_a_function_of_their_number_and_the_halves_differ() -> None:
    pytest.importorskip("skimage")
    train, test = (MovingPhotos(part) for part in ("train", "test"))
    assert train.read(11).shape == (FRAMES, SIDE, SIDE, 3)
    assert train.read(11).dtype == np.uint8
    assert (pickle.loads(pickle.dumps(train)).read(11) == train.read(11)).all()
    assert train.fingerprint != test.fingerprint
    assert not (train.read(11) == test.read(11)).all()
    assert train.labels().names[train.labels().ids[11]] == train.key(11).split("/")[0] == "pan-down"
    assert np.bincount(test.labels().ids).tolist() == [200] * 8
    both = open_source("embedded:moving-photos", "video")
    assert len(both) == len(train) + len(test)
    assert both.labels().names == sorted(MOTIONS)
    with pytest.raises(IndexError):
        train.read(len(train))


def test_another_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean embedded:moving-photos"):
        open_source("embedded:moving-fotos", "video")
