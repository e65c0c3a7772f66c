"""Which images of a folder are the frames of its video."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_files import write_files

from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import frames_in
from patchmine.data.sources.members import frames_of
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError


def numbered(*patterns: str, count: int = 4) -> list[str]:
    return [pattern.format(number) for number in range(1, count + 1) for pattern in patterns]


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (numbered("img_{:05d}.jpg", "flow_x_{:05d}.jpg", "flow_y_{:05d}.jpg"), "img_"),
        (numbered("frame{:d}.png", "frame{:d}_depth.png"), "frame#.png"),
        (numbered("{:04d}.jpg", "{:04d}_mask.png"), "#.jpg"),
        (numbered("{:04d}.jpg", "seg-{:04d}.jpg"), "#.jpg"),
        (numbered("rgb.{:d}.jpg", "depth.{:d}.png", "normals.{:d}.png"), "rgb"),
        ([*numbered("img_{:d}.jpg"), "cover.jpg", "poster.png"], "img_"),
    ],
)
def test_what_was_worked_out_from_the_frames_is_left_out(names: list[str], kept: str) -> None:
    frames, others = frames_of(names)
    assert len(frames) == 4
    assert len(others) == len(names) - 4
    assert sorted(frames + others) == sorted(names)
    assert not any(
        word in name
        for name in frames
        for word in ("flow", "depth", "mask", "seg", "normals", "er.")
    ), kept


@pytest.mark.parametrize(
    "names",
    [
        numbered("{:d}.jpg"),
        numbered("clip7_{:05d}.JPG"),
        ["0001.jpg", "0002.png", "0003.JPG"],
        ["a.jpg", "b.jpg", "cover.png"],
        ["3f2a.jpg", "bc91.jpg", "0d.jpg"],
        [
            f"2024-01-01T10.{minute:02d}.{second:02d}.jpg"
            for minute in range(3)
            for second in range(3)
        ],
        [*numbered("part1_{:d}.jpg"), "part2_9.jpg"],
        numbered("flow_{:d}.jpg"),  # a folder of nothing but flow is what a person asked for
        ["only.jpg"],
        [],
    ],
    ids=str,
)
def test_one_video_keeps_all_its_frames(names: list[str]) -> None:
    assert frames_of(names) == (names, [])


@pytest.mark.parametrize(
    "names",
    [
        numbered("left_{:d}.jpg", "right_{:d}.jpg"),
        numbered("cam1_{:04d}.jpg", "cam2_{:04d}.jpg"),
        numbered("{:04d}.jpg", "{:04d}.png"),
        numbered("flow_x_{:d}.jpg", "flow_y_{:d}.jpg"),
    ],
    ids=lambda names: names[0],
)
def test_several_videos_in_a_folder_are_refused(names: list[str]) -> None:
    with pytest.raises(
        DecodeError, match=r"holds several series of frames \(.*, .*\): keep those of one video"
    ):
        frames_of(names)


def test_a_frame_folder_beside_flow_is_a_video_of_its_frames(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "in/run/a", *numbered("img_{:d}.jpg", "flow_x_{:d}.jpg", "flow_y_{:d}.jpg")
    )
    source = open_source(tmp_path / "in", "video")
    assert [Path(path).name for path in source.read(0).paths] == [
        f"img_{number}.jpg" for number in (1, 2, 3, 4)
    ]
    assert "images of another series than the frames': 8, as run/a/flow_x_1.jpg" in source.notes[0]  # type: ignore[attr-defined]
    assert frames_in(str(folder)).paths == source.read(0).paths
    (tmp_path / "list.txt").write_text("in/run/a\n")
    listed = open_source(tmp_path / "list.txt", "video")
    assert listed.read(0).paths == source.read(0).paths
    assert "8, as in/run/a/flow_x_1.jpg" in listed.notes[0]  # type: ignore[attr-defined]


def test_frames_of_several_videos_in_a_folder_end_the_start(tmp_path: Path) -> None:
    write_files(tmp_path / "in/a", "left_1.jpg", "right_1.jpg")
    with pytest.raises(UserError, match=r"the folder .*in/a holds several series of frames"):
        open_source(tmp_path / "in", "video")
    write_files(tmp_path / "in/a", "left_1.jpg", "right_1.jpg")
    (tmp_path / "list.txt").write_text("in/a\n")
    with pytest.raises(UserError, match=r"line 1 .*in/a.* holds several series of frames"):
        open_source(tmp_path / "list.txt", "video")


def test_chosen_endings_choose_a_series(tmp_path: Path) -> None:
    write_files(tmp_path / "a", *numbered("{:d}.jpg", "{:d}.png"))
    source = open_source(f"{tmp_path}::png", "video")
    assert [source.key(index) for index in range(len(source))] == ["a"]
    assert [Path(path).name for path in source.read(0).paths] == [
        "1.png",
        "2.png",
        "3.png",
        "4.png",
    ]
