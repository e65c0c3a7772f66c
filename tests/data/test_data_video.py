"""Videos are read frame by number, the same by either decoder; damaged ones are told in one
sentence.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchmine.data.decoding import pyav
from patchmine.data.decoding.bounds import check_frames
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.orientation import upright_tensor
from patchmine.data.decoding.pyav import PyAVReader
from patchmine.data.decoding.video import (
    FrameFiles,
    VideoFile,
    VideoReader,
    backend_name,
    fit_frames,
    frames_in,
    open_video,
)
from patchmine.data.settings import MAX_PIXELS
from patchmine.errors import UserError

FRAMES, HEIGHT, WIDTH = 40, 48, 64


@pytest.fixture(scope="module")
def av() -> Any:
    return pytest.importorskip("av")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """(40, 48, 64, 3) uint8: a square that moves, on a grey that gets brighter with every frame."""
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:] = 20 + 5 * number
        frame[8:24, number : number + 16] = (250, 40, 40)
    return frames


@pytest.fixture(scope="module")
def write(av: Any) -> Callable[..., Path]:
    """Encodes frames; ``times`` are their numbers on a clock of 25 a second."""

    def write(
        path: Path,
        frames: np.ndarray,
        *,
        codec: str = "libx264",
        times: Sequence[int] | None = None,
        **options: str,
    ) -> Path:
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream(codec, rate=25, options={"g": "12", "bf": "2"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.codec_context.time_base = Fraction(1, 25)
            for number, frame in zip(times or range(len(frames)), frames, strict=True):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts, picture.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture(scope="module")
def clip(
    tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Path], pictures: np.ndarray
) -> Path:
    """40 frames in MP4, a key frame every 12, its table of contents in front."""
    return write(tmp_path_factory.mktemp("video") / "clip.mp4", pictures, movflags="faststart")


def all_frames(av: Any, path: Path) -> torch.Tensor:
    """(F, 3, H, W) the slow way: one after the other, in the order in which the decoder gives them."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts"])
def test_any_frames_are_those_of_reading_all(
    name: str, tmp_path: Path, av: Any, write: Callable[..., Path], pictures: np.ndarray
) -> None:
    path = write(tmp_path / name, pictures, codec="mpeg4" if name.endswith("avi") else "libx264")
    expected = all_frames(av, path)
    reader = PyAVReader(str(path))
    assert reader.num_frames == FRAMES
    for indices in ([0], [39], [5, 3, 3, 30], list(range(1, 40, 4)), [11, 12, 13], [23, 35]):
        assert torch.equal(reader.frames(indices), expected[indices])
    # The grey that gets brighter, by 5 a frame, tells which frame it is.
    assert expected.float().mean((1, 2, 3)).diff().min() > -1


def test_uneven_times_leave_the_numbers_of_frames_as_they_are(
    tmp_path: Path, av: Any, write: Callable[..., Path], pictures: np.ndarray
) -> None:
    times = np.cumsum(np.random.default_rng(0).integers(1, 6, FRAMES)).tolist()
    path = write(tmp_path / "uneven.mp4", pictures, times=times)
    expected = all_frames(av, path)
    for reader in (PyAVReader(str(path)), open_video(VideoFile(str(path)))):
        assert reader.num_frames == FRAMES
        assert torch.equal(reader.frames([1, 20, 39]), expected[[1, 20, 39]])


def test_the_shared_clips_decode_as_all_their_frames_do(
    shared: Path, tmp_path: Path, av: Any
) -> None:
    if not (shared / "data" / "video.tar").is_file():
        pytest.skip("the shared clips are missing")
    with tarfile.open(shared / "data" / "video.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    files = sorted((tmp_path / "video").iterdir())
    assert len(files) == 5
    for file in files:
        reader = open_video(VideoFile(str(file)))
        wanted = [0, 9, reader.num_frames // 2]
        assert torch.equal(reader.frames(wanted), all_frames(av, file)[wanted]), file.name


MATRICES = {  # a, b, c, d of the eight orientations, in the order in which a file holds them
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip


def with_matrix(data: bytes, orientation: int, *, of_film: bool = False) -> bytes:
    """An MP4 that asks for an orientation, in the header of its track or of the whole film."""

    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        return np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()

    place = (data.index if of_film else data.rindex)(
        matrix(1, 0, 0, 1)
    )  # the film's header comes first
    return data[:place] + matrix(*MATRICES[orientation]) + data[place + 36 :]


@pytest.mark.parametrize("orientation", MATRICES)
def test_pictures_are_turned_and_mirrored_as_the_file_asks(
    orientation: int, tmp_path: Path, clip: Path
) -> None:
    stored = PyAVReader(str(clip)).frames([3, 20])
    expected = upright_tensor(stored, orientation)
    assert orientation == 1 or expected.shape != stored.shape or not torch.equal(expected, stored)
    path = tmp_path / "turned.mp4"
    path.write_bytes(with_matrix(clip.read_bytes(), orientation))
    for source in (str(path), path.read_bytes()):
        assert torch.equal(PyAVReader(source).frames([3, 20]), expected)
    assert torch.equal(open_video(VideoFile(str(path))).frames([3, 20]), expected)


def test_the_films_matrix_counts_too(tmp_path: Path, clip: Path) -> None:
    path = tmp_path / "both.mp4"
    path.write_bytes(with_matrix(with_matrix(clip.read_bytes(), 2), 6, of_film=True))
    expected = upright_tensor(upright_tensor(PyAVReader(str(clip)).frames([3]), 2), 6)
    assert torch.equal(PyAVReader(str(path)).frames([3]), expected)
    assert torch.equal(open_video(VideoFile(str(path))).frames([3]), expected)


# Bounds
# ---------------------------------------------------------------------------------------------------------------


def test_frames_are_held_to_max_pixels(clip: Path) -> None:
    with pytest.raises(
        DecodeError,
        match=f"max_pixels={HEIGHT * WIDTH - 1} allows; set max_pixels={HEIGHT * WIDTH} or",
    ):
        PyAVReader(str(clip), max_pixels=HEIGHT * WIDTH - 1)
    assert PyAVReader(str(clip), max_pixels=HEIGHT * WIDTH).frames([0]).shape == (
        1,
        3,
        HEIGHT,
        WIDTH,
    )
    with pytest.raises(DecodeError, match="max_pixels=5"):
        open_video(VideoFile(str(clip)), max_pixels=5)


def test_a_frame_larger_than_the_header_says_is_not_decoded(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyav, "check_frames", lambda *_: None)  # a header that says nothing or lies
    with pytest.raises(DecodeError, match="stops decoding before frame 0"):
        PyAVReader(str(clip), max_pixels=1000).frames([0])


def test_many_large_frames_of_a_small_file_are_refused_before_they_are_decoded() -> None:
    check_frames(2160, 3840, 16, MAX_PIXELS, 1000)
    check_frames(4320, 7680, 16, MAX_PIXELS, 10_000_000)
    with pytest.raises(DecodeError, match="to decode from a file"):
        check_frames(4320, 7680, 16, MAX_PIXELS, 1000)
    check_frames(0, None, 16, MAX_PIXELS, 1000)


def test_a_pipe_among_videos_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="not a file"):
        open_video(VideoFile(str(tmp_path / "pipe.mp4")))
    with pytest.raises(OSError, match="not a file"):
        open_video(FrameFiles((str(tmp_path / "pipe.mp4"),))).frames([0])


def test_mutants_of_a_video_give_frames_or_a_decode_error(clip: Path) -> None:
    data, rng = clip.read_bytes(), np.random.default_rng(0)
    head = data.index(b"mdat")
    for number in range(60):
        mutant = bytearray(data)
        for place in rng.integers(4, head if number % 3 else len(data), rng.integers(1, 6)):
            mutant[place] = rng.choice([0, 255, 127, 128, rng.integers(256)])
        with contextlib.suppress(DecodeError):
            reader = open_video(bytes(mutant))
            reader.frames([0, reader.num_frames // 2])


def test_the_index_of_a_file_is_made_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav, "_indices", type(pyav._indices)())
    first = open_video(VideoFile(str(clip)))
    monkeypatch.setattr(pyav, "_make_index", None)
    again = open_video(VideoFile(str(clip)))
    assert torch.equal(first.frames([7]), again.frames([7]))


def test_the_file_used_longest_ago_is_forgotten_first(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyav, "_indices", type(pyav._indices)())
    monkeypatch.setattr(pyav, "MOST_FRAMES", 2 * FRAMES)
    for key in ("a", "b", "a", "c"):
        PyAVReader(str(clip), key)
    assert list(pyav._indices) == ["a", "c"]


def test_damaged_files_are_told_in_a_sentence(tmp_path: Path, av: Any, clip: Path) -> None:
    data = clip.read_bytes()

    def complaint(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DecodeError) as error:
            read_all(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert complaint("empty.mp4", b"") == "is empty (0 bytes); fetch it again or remove it"
    assert complaint("text.mp4", b"no video at all" * 20).startswith(
        "cannot be opened as a video ("
    )
    assert complaint("half.mp4", data[: len(data) * 6 // 10]).startswith("stops ")
    holed = bytearray(data)
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    holed[middle : middle + 400] = bytes(255 - byte for byte in holed[middle : middle + 400])
    assert complaint("holed.mp4", bytes(holed)).startswith("stops decoding before frame ")
    assert complaint("sound.mp4", _sound(av)) == "has no pictures, only sound or text; remove it"
    with pytest.raises(OSError, match=r"gone\.mp4"):
        open_video(VideoFile(str(tmp_path / "gone.mp4")))


def read_all(path: Path) -> torch.Tensor:
    reader = open_video(VideoFile(str(path)))
    return reader.frames(range(reader.num_frames))


def _sound(av: Any) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def test_without_a_decoder_the_way_out_is_named(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyav, "version", lambda: None)
    backend_name.cache_clear()
    try:
        with pytest.raises(UserError, match=r"pip install av$"):
            open_video(VideoFile(str(clip)))
    finally:
        backend_name.cache_clear()


def test_frames_in_files_come_in_counting_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").touch()
    raw = frames_in(str(tmp_path))
    assert [Path(path).name for path in raw.paths] == ["frame1.png", "frame2.png", "frame10.png"]
    reader = open_video(raw)
    assert reader.num_frames == 3
    assert reader.frames([2, 0])[:, 0, 0, 0].tolist() == [10, 1]
    Image.new("RGB", (8, 4)).save(tmp_path / "frame2.png")
    with pytest.raises(DecodeError, match="frames of different sizes"):
        reader.frames([0, 1])
    (tmp_path / "frame2.png").write_bytes(b"x")
    with pytest.raises(DecodeError, match="has a frame, number 1, that is no readable image"):
        reader.frames([1])


def test_arrays_are_read_with_channels_first_or_last(pictures: np.ndarray) -> None:
    frames: list[VideoReader] = [
        open_video(raw)
        for raw in (
            pictures,
            torch.from_numpy(pictures),
            np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)),
        )
    ]
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)[[5, 1]]
    assert all(torch.equal(reader.frames([5, 1]), expected) for reader in frames)
    assert open_video(pictures[..., 0]).frames([0]).shape == (1, 1, HEIGHT, WIDTH)
    with pytest.raises(DecodeError, match="values of type float32"):
        open_video(pictures.astype(np.float32))
    with pytest.raises(DecodeError, match="has shape"):
        open_video(pictures[0, 0])
    with pytest.raises(DecodeError, match="holds no frame"):
        open_video(FrameFiles(()))


def test_frames_get_the_channels_of_the_run(pictures: np.ndarray) -> None:
    frames = open_video(pictures).frames([0, 1, 2])
    grey = fit_frames(frames, 1)
    assert grey.shape == (3, 1, HEIGHT, WIDTH)
    assert torch.equal(fit_frames(grey, 3)[:, 0], grey[:, 0])
    with pytest.raises(DecodeError, match="set channels=3"):
        fit_frames(frames, 13)
