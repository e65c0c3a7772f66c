"""Folders, lists, shards and folders of frames are sources of videos by the rules of images."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchmine.data.decoding import pyav
from patchmine.data.decoding.video import FrameFiles, VideoFile, backend_name, open_video
from patchmine.data.inspect import inspect, render
from patchmine.data.loader import data_statistics
from patchmine.data.settings import InputSettings
from patchmine.data.sources.source import decoder_of, open_source
from patchmine.data.views.clips import middle_frame
from patchmine.errors import UserError


def gif(path: Path, level: int, frames: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (
        Image.new("RGB", (16, 12), (level + number, level, 0)) for number in range(frames)
    )
    first.save(path, save_all=True, append_images=rest, duration=40)
    return path


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Six animations in two classes."""
    pytest.importorskip("av")
    for number in range(6):
        gif(tmp_path / "clips" / ("run", "walk")[number % 2] / f"{number}.gif", 20 * number)
    return tmp_path / "clips"


def test_a_folder_of_videos_has_its_classes_in_folders(clips: Path, tmp_path: Path) -> None:
    source = open_source(clips, "video", cache_dir=tmp_path / "cache")
    assert len(source) == 6
    assert source.labels().names == ["run", "walk"]
    assert source.read(3) == VideoFile(str(clips / "walk" / "1.gif"))
    assert open_video(source.read(0)).num_frames == 5
    assert decoder_of(source) == backend_name()
    assert [source.path(i) for i in range(6)] == [
        open_source(clips, "video", cache_dir=tmp_path / "cache").path(i) for i in range(6)
    ]


def test_indices_of_images_and_of_videos_are_kept_apart(clips: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(clips / "still.png")
    assert len(open_source(clips, "video", cache_dir=tmp_path / "cache")) == 6
    assert len(open_source(clips, cache_dir=tmp_path / "cache")) == 7  # animations are images too
    assert len(open_source(clips, "video", cache_dir=tmp_path / "cache")) == 6


@pytest.mark.usefixtures("clips")
def test_a_list_names_videos_and_folders_of_frames(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 12), (number, 0, 0)).save(frames / f"{number}.png")
    (tmp_path / "list.txt").write_text("clips/run/0.gif run\nframes walk\n")
    source = open_source(tmp_path / "list.txt", "video")
    assert source.labels().ids.tolist() == [0, 1]
    assert open_video(source.read(1)).frames([2])[0, 0, 0, 0] == 2
    (tmp_path / "list.txt").write_text("clips/run/0.gif\nclips/gone.gif\n")
    with pytest.raises(UserError, match=r"line 2 names 'clips/gone\.gif', which does not exist"):
        open_source(tmp_path / "list.txt", "video")
    (tmp_path / "list.txt").write_text("frames\n")
    with pytest.raises(UserError, match="names 'frames', which is a folder"):
        open_source(tmp_path / "list.txt")


def test_shards_hold_videos_with_their_classes(clips: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for file in sorted(clips.rglob("*.gif")):
            archive.add(file, f"{file.stem}.gif")
            (tmp_path / "note.cls").write_text(file.parent.name)
            archive.add(tmp_path / "note.cls", f"{file.stem}.cls")
    source = open_source(tmp_path / "shard.tar", "video")
    assert len(source) == 6
    assert source.labels().names == ["run", "walk"]
    assert torch.equal(
        open_video(source.read(0)).frames([4]),
        open_video(VideoFile(f"{clips}/run/0.gif")).frames([4]),
    )


def test_folders_of_frames_are_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("run/a", 11), ("run/b", 3), ("walk/c", 2)):
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 12), (10 * number, 0, 0)).save(
                tmp_path / name / f"frame{number}.png"
            )
    source = open_source(tmp_path, "video")
    assert [source.key(i) for i in range(3)] == ["run/a", "run/b", "walk/c"]
    assert source.labels().ids.tolist() == [0, 0, 1]
    raw = source.read(0)
    assert isinstance(raw, FrameFiles)
    assert open_video(raw).frames([10, 2])[:, 0, 0, 0].tolist() == [100, 20]
    assert source.path(2) == str(tmp_path / "walk" / "c")
    monkeypatch.setattr(pyav, "version", lambda: None)
    assert decoder_of(source) is None  # which needs no decoder of videos


def test_what_is_no_source_of_videos_is_answered_with_what_is(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"no video and no tar shard in this folder; files that count end in \.mp4"
    ):
        open_source(tmp_path / "empty", "video")
    with pytest.raises(UserError, match="this is a single video"):
        open_source(clips / "run" / "0.gif", "video")
    with pytest.raises(UserError, match="give a folder of videos or of folders of frames"):
        open_source(tmp_path / "gone", "video")


def test_videos_that_nothing_decodes_are_refused_before_any_work(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyav, "version", lambda: None)
    backend_name.cache_clear()
    try:
        with pytest.raises(UserError, match="pip install av"):
            open_source(clips, "video")
    finally:
        backend_name.cache_clear()


def test_statistics_and_inspection_look_at_one_frame_of_each(clips: Path) -> None:
    (clips / "run" / "bad.gif").write_bytes(b"GIF89a")
    source = open_source(clips, "video")
    mean, std = data_statistics(source, InputSettings(), middle_frame)
    assert mean.tolist() == pytest.approx([52 / 255, 50 / 255, 0], abs=0.01)
    report = inspect(source, video=True)
    assert report.frames == {5: 6}
    assert report.sizes == {(12, 16): 6}
    assert report.mean == pytest.approx(mean.tolist(), abs=0.002)
    assert [path for path, _ in report.broken] == [str(clips / "run" / "bad.gif")]
    text = render(report)
    assert "7 in" in text
    assert "5 frames" in text
    assert std[0] > 0.1


def test_videos_with_equal_contents_are_told(clips: Path) -> None:
    file = min(clips.rglob("*.gif"))
    twin = file.with_name("twin.gif")
    twin.write_bytes(file.read_bytes())
    assert inspect(open_source(clips, "video"), video=True).duplicates == [
        sorted([str(file), str(twin)])
    ]


def test_a_dataset_gives_arrays_of_frames() -> None:
    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.full((4, 8, 8, 3), index, np.uint8), index

    source = open_source(Clips(), "video")
    assert source.labels().ids.tolist() == [0, 1]
    assert decoder_of(source) is None
    assert open_video(source.read(1)).frames([3]).unique().tolist() == [1]
