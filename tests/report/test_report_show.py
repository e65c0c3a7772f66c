from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchmine.errors import UserError
from patchmine.report.show import run_progress, show
from patchmine.run import Run, build_method
from patchmine.train.checkpoint import save

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with settings, metrics and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "hpm"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "data: photos\nmodel: vit_tiny_patch16_224\nmodel_args: {depth: 1, embed_dim: 32, num_heads: 2}\n"
        "method: {name: hpm, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}\n"
        "image_size: [32, 48]\npatch_size: 8\nepochs: 10\nbatch_size: 8\n"
    )
    (folder / "metrics.jsonl").write_text('{"step": 40, "epoch": 2.0, "samples": 320, "loss": 1.0}\n')
    save(folder / "checkpoints", 50, build_method(Run(folder).config).state_dict(), {}, {}, keep=1)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, size in zip(paths, [(100, 60), (40, 90)], strict=True):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return paths


def test_a_sheet_of_the_users_pictures(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = show(trained, pictures, tmp_path / "new" / "panel.png")
    with Image.open(out) as sheet:
        assert sheet.height > 2 * 160


def test_the_seed_decides_the_masks(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    first, again, other = (
        show(trained, pictures, tmp_path / f"{i}.png", seed=seed).read_bytes() for i, seed in enumerate([1, 1, 2])
    )
    assert first == again != other


def test_progress_is_that_of_the_checkpoint(trained: Path) -> None:
    progress = run_progress(Run(trained))
    assert (progress.step, progress.total_steps, progress.steps_per_epoch) == (49, 200, 20)


def test_weights_without_metrics_count_as_finished(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    assert run_progress(Run(tmp_path)).fraction == 0.0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000800.safetensors").touch()
    assert run_progress(Run(tmp_path)).fraction == pytest.approx(1.0, abs=0.01)


def test_mistakes_are_named(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(pictures[1].read_bytes()[:200])
    for files, out, message in [
        ([tmp_path / "none.jpg"], "p.png", "none.jpg"),
        ([tmp_path], "p.png", "cannot be read"),
        ([tmp_path / "broken.jpg"], "p.png", "broken.jpg"),
        (pictures, "p.txt", "out="),
        ([], "p.png", "at least one"),
    ]:
        with pytest.raises(UserError, match=message):
            show(trained, files, tmp_path / out)
        assert not (tmp_path / out).exists()


def test_a_run_without_checkpoint_is_refused(make_run: MakeRun, pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint"):
        show(make_run(), pictures, tmp_path / "p.png")
