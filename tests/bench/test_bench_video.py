"""The benchmark of decoding gives all readers the same frames to read, and says what it compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from patchmine.bench import video as bench
from patchmine.data.decoding import pyav
from patchmine.errors import UserError


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    for number in range(3):
        first, *rest = (
            Image.new("RGB", (40, 32), (9 * time, 60 * number, 0)) for time in range(12)
        )
        first.save(tmp_path / f"{number}.gif", save_all=True, append_images=rest)
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    return tmp_path


@pytest.fixture
def against(script: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("av")
    return script("video_against_pyav")


def test_it_reports_times(clips: Path) -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    result = bench.bench_video(clips, image_size=16, frames=4, stride=2, repeats=2, say=said.append)
    assert result["videos"] == 3
    assert set(result["milliseconds"]) == {"frames", "view"}
    assert all(value > 0 for value in result["milliseconds"].values())
    assert len([line for line in said if "ms per clip" in line]) == 2
    assert torch.get_num_threads() == threads


def test_all_readers_are_timed(clips: Path, against: ModuleType) -> None:
    result = against.compare(clips, frames=4, stride=2, repeats=2)
    assert set(result["milliseconds"]) == {"sequential", "until", "ours"}
    for found in result["times_as_fast"].values():
        assert 0 < found["least"] <= found["median"] <= found["most"]


def test_a_ratio_is_of_one_video_at_a_time(against: ModuleType) -> None:
    repeats = [
        {"a": [10.0, 6.0, 8.0], "b": [1.0, 3.0, 2.0]},
        {"a": [20.0, 6.0, 8.0], "b": [1.0, 3.0, 2.0]},
    ]
    assert against.ratio(repeats, "a", "b") == {"median": 4.0, "least": 2.0, "most": 15.0}


def test_all_readers_give_the_same_frames(clips: Path, against: ModuleType) -> None:
    job = str(clips / "1.gif"), [2, 4, 9]
    expected = against.sequential(job)
    assert torch.equal(against.until(job), expected)
    assert torch.equal(bench.read_frames(job).permute(0, 2, 3, 1), expected)


def test_what_cannot_be_timed_is_refused(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = tmp_path / "frames" / "a"
    frames.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(frames / "0.png")
    with pytest.raises(UserError, match="holds no encoded videos"):
        bench.bench_video(tmp_path / "frames")
    monkeypatch.setattr(pyav, "version", lambda: None)
    with pytest.raises(UserError, match="pip install av"):
        bench.bench_video(clips)
