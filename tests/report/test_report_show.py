from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchmine.data.items import IMAGE
from patchmine.errors import UserError
from patchmine.report.animation import save_animation
from patchmine.report.show import _chosen, run_progress, show
from patchmine.runs.folder import RunFolder, build_method
from patchmine.train.checkpoint import save

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with settings, metrics and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "hpm"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "data: photos\nmodel: vit_tiny_patch16_224\nmodel_args: {depth: 1, embed_dim: 32, "
        "num_heads: 2}\n"
        "method: {name: hpm, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}\n"
        "image_size: [32, 48]\npatch_size: 8\nepochs: 10\nbatch_size: 8\n"
    )
    (folder / "metrics.jsonl").write_text(
        '{"step": 40, "epoch": 2.0, "samples": 320, "loss": 1.0}\n'
    )
    save(
        folder / "checkpoints",
        50,
        build_method(RunFolder(folder).config).state_dict(),
        {},
        {},
        keep=1,
    )
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, size in zip(paths, [(100, 60), (40, 90)], strict=True):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            path
        )
    return paths


def test_a_sheet_of_the_users_pictures(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = show(trained, pictures, tmp_path / "new" / "panel.png")
    with Image.open(out) as sheet:
        assert sheet.height > 2 * 160


def test_a_folder_gives_a_few_of_its_images(
    trained: Path, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for path in pictures:
        path.rename(tmp_path / "in" / path.name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    named = [tmp_path / "in" / path.name for path in pictures]
    wanted = show(trained, named, tmp_path / "named.png").read_bytes()
    assert show(trained, [tmp_path / "in"], tmp_path / "folder.png").read_bytes() == wanted
    for number in range(20):
        Image.new("RGB", (20, 20)).save(tmp_path / "in" / f"{number}.png")
    assert len(_chosen(tmp_path / "in", IMAGE)) <= 8


def test_the_seed_decides_the_masks(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    first, again, other = (
        show(trained, pictures, tmp_path / f"{i}.png", seed=seed).read_bytes()
        for i, seed in enumerate([1, 1, 2])
    )
    assert first == again != other


def test_progress_is_that_of_the_checkpoint(trained: Path) -> None:
    progress = run_progress(RunFolder(trained))
    assert (progress.step, progress.total_steps, progress.steps_per_epoch) == (49, 200, 20)


def test_weights_without_metrics_count_as_finished(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    assert run_progress(RunFolder(tmp_path)).fraction == 0.0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000800.safetensors").touch()
    assert run_progress(RunFolder(tmp_path)).fraction == pytest.approx(1.0, abs=0.01)


def test_mistakes_are_named(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(pictures[1].read_bytes()[:200])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "empty.jpg").touch()
    for files, out, message in [
        ([tmp_path / "none.jpg"], "p.png", "none.jpg"),
        ([tmp_path / "folder"], "p.png", "none of 1 images that were tried can be read"),
        ([tmp_path / "broken.jpg"], "p.png", "broken.jpg"),
        (pictures, "p.txt", "out="),
        ([], "p.png", "at least one"),
    ]:
        with pytest.raises(UserError, match=message):
            show(trained, files, tmp_path / out)
        assert not (tmp_path / out).exists()


def test_a_run_without_checkpoint_is_refused(
    make_run: MakeRun, pictures: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="checkpoint"):
        show(make_run(), pictures, tmp_path / "p.png")


@pytest.fixture(scope="module")
def trained_on_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a video run with a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "moving"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "data: videos\nmodel: video_vit_tiny_patch16\nmodel_args: {depth: 1, embed_dim: 32, "
        "num_heads: 2}\n"
        "clip: {frames: 6, stride: 1, tubelet: 2}\n"
        "method: {name: hpm, norm_pix_loss: true, decoder_embed_dim: 32, decoder_depth: 1, "
        "decoder_num_heads: 2}\n"
        "image_size: [16, 24]\npatch_size: 8\nepochs: 10\nbatch_size: 8\n"
    )
    save(
        folder / "checkpoints",
        50,
        build_method(RunFolder(folder).config).state_dict(),
        {},
        {},
        keep=1,
    )
    return folder


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A video as a folder of eight frames that grow lighter."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for k in range(8):
        Image.fromarray(np.full((20, 30, 3), 20 + 25 * k, np.uint8)).save(folder / f"{k:03d}.png")
    return folder


def test_clips_move_or_lie_side_by_side(
    trained_on_videos: Path, frames: Path, tmp_path: Path
) -> None:
    with Image.open(show(trained_on_videos, [frames], tmp_path / "x.gif")) as moving:
        assert moving.n_frames == 6  # type: ignore[attr-defined]
    with Image.open(show(trained_on_videos, [frames], tmp_path / "x.png")) as sheet:
        assert sheet.height > 5 * 100
        areas = [int((np.asarray(sheet) == 20 + 25 * k).all(axis=2).sum()) for k in range(8)]
        # A frame is drawn 112 x 168; frames 1 to 6 of 8 are the clip in the middle.
        assert [area >= 112 * 168 for area in areas] == [False, *[True] * 6, False]


def test_a_video_of_the_users(trained_on_videos: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    draw = np.random.default_rng(0)
    pictures = [
        Image.fromarray(draw.integers(0, 255, (32, 48, 3), dtype=np.uint8)) for _ in range(9)
    ]
    save_animation(pictures, tmp_path / "own.mp4")
    out = show(trained_on_videos, [tmp_path / "own.mp4"], tmp_path / "new" / "x.mp4")
    assert out.stat().st_size > 1000


def test_mistakes_with_videos_are_named(
    trained_on_videos: Path, trained: Path, frames: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    for run, source, out, message in [
        (trained_on_videos, frames, "p.txt", r"out=.*\.gif or \.mp4"),
        (
            trained_on_videos,
            tmp_path / "none.mp4",
            "p.gif",
            r"none\.mp4 cannot be read: .*name video files",
        ),
        (trained_on_videos, tmp_path / "text.mp4", "p.gif", r"text\.mp4 cannot be shown"),
        (trained_on_videos, tmp_path / "empty", "p.gif", "empty cannot be shown"),
        (trained, frames / "000.png", "p.mp4", r"out=.*p\.png"),
    ]:
        with pytest.raises(UserError, match=message):
            show(run, [source], tmp_path / out)
        assert not (tmp_path / out).exists()
