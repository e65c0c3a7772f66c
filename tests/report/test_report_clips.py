"""Clips on contact sheets and in files that move."""

import builtins
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchmine.errors import UserError
from patchmine.report.animation import save_animation
from patchmine.report.panels import colour, draw_moments, draw_panels
from patchmine.types import Panel

ZERO, ONE = [0.0] * 3, [1.0] * 3


def grey(level: float) -> tuple[int, int, int]:
    return (round(level * 255),) * 3


def count(sheet: Image.Image, ink: tuple[int, ...]) -> int:
    return int((np.asarray(sheet) == list(ink)).all(axis=2).sum())


def ramp_of_frames(clips: int, frames: int) -> torch.Tensor:
    """(clips, 3, frames, 10, 10); the frames of a clip are evenly grey, and no two of all are
    alike.
    """
    levels = torch.arange(1, 1 + clips * frames) / (2 * clips * frames)
    return levels.reshape(clips, 1, frames, 1, 1).expand(clips, 3, frames, 10, 10)


def test_a_sheet_of_clips_shows_frames_from_left_to_right_and_clips_downwards() -> None:
    clips = ramp_of_frames(2, 4)
    sheet = np.asarray(draw_panels([Panel("input", clips)], ZERO, ONE))
    centres = []
    for level in clips[:, 0, :, 0, 0].flatten().tolist():
        down, across = np.nonzero((sheet == grey(level)).all(axis=2))
        assert len(down) == 100 * 100, "each pixel ten times as wide"
        centres.append((down.mean(), across.mean()))
    rows = [centres[:4], centres[4:]]
    for row in rows:
        assert len({down for down, _ in row}) == 1
        assert [across for _, across in row] == sorted(across for _, across in row)
    assert rows[0][0][0] < rows[1][0][0]


def test_long_clips_are_shown_by_one_frame_of_each_eighth() -> None:
    clips = ramp_of_frames(1, 16)
    sheet = draw_panels([Panel("input", clips)], ZERO, ONE)
    shown = [count(sheet, grey(level)) > 0 for level in clips[0, 0, :, 0, 0].tolist()]
    assert shown == [True, False] * 8


def test_maps_of_a_clip_share_one_scale_and_stand_under_their_frames() -> None:
    heat = (
        torch.tensor([0.0, 4.0, 8.0, math.nan]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    )  # each spans two frames
    panels = [Panel("input", torch.ones(1, 3, 8, 10, 10)), Panel("error", heat, kind="heat")]
    sheet = draw_panels(panels, ZERO, ONE)
    pixels, lefts = np.asarray(sheet), []
    for value in (0.0, 0.5, 1.0):
        across = np.nonzero((pixels == colour(np.array(value))).all(axis=2))[1]
        assert len(across) >= 2 * 100 * 100, "a map stands under both frames that it spans"
        lefts.append(float(np.median(across)))
    assert lefts == sorted(lefts)
    assert count(sheet, (176, 176, 176)) > 2000  # hatched


def test_every_frame_becomes_a_sheet_of_one_layout_with_one_scale() -> None:
    clips = ramp_of_frames(2, 4)
    heat = (
        torch.arange(4.0).reshape(1, 2, 1, 2).expand(2, 2, 1, 2)
    )  # slots of two frames, left and right half
    panels = [Panel("input", clips), Panel("predicted difficulty", heat, kind="heat")]
    sheets = list(draw_moments(panels, ZERO, ONE, labels=["a.mp4", "b.mp4"]))
    assert len(sheets) == 4
    assert len({sheet.size for sheet in sheets}) == 1
    for moment, sheet in enumerate(sheets):
        for clip, other in itertools.product(range(2), range(4)):
            level = float(clips[clip, 0, other, 0, 0])
            assert (count(sheet, grey(level)) > 0) is (other == moment)
    lightest = tuple(colour(np.array(1.0)))
    assert count(sheets[0], lightest) < 1000 < count(sheets[3], lightest)


def sheets(number: int = 3, size: tuple[int, int] = (61, 41)) -> list[Image.Image]:
    """Pictures with a light bar that wanders over a dark ground."""
    found = []
    for k in range(number):
        pixels = np.full((size[1], size[0], 3), 40, np.uint8)
        pixels[:, 10 * k : 10 * k + 10] = (250, 200, 90)
        found.append(Image.fromarray(pixels))
    return found


def test_a_gif_holds_every_frame_and_goes_round(tmp_path: Path) -> None:
    save_animation(sheets(), tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as moving:
        assert (moving.n_frames, moving.info["loop"], moving.info["duration"]) == (3, 0, 200)  # type: ignore[attr-defined]
        for k, sheet in enumerate(sheets()):
            moving.seek(k)
            assert np.abs(np.asarray(moving.convert("RGB"), int) - np.asarray(sheet, int)).max() < 8


def test_an_mp4_holds_every_frame(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    save_animation(sheets(), tmp_path / "x.mp4")
    with av.open(str(tmp_path / "x.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert [frame.shape for frame in frames] == [(40, 60, 3)] * 3
    for frame, sheet in zip(frames, sheets(), strict=True):
        away = np.abs(frame.astype(int) - np.asarray(sheet, int)[:40, :60])
        assert away.mean() < 12


def test_without_pyav_an_mp4_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Callable[..., Any] = builtins.__import__

    def without_av(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match=r"PyAV.*pip install.*x\.gif"):
        save_animation(sheets(), tmp_path / "x.mp4")
