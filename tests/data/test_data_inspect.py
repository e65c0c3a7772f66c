from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_files import add
from PIL import Image
from torch.utils.data import Dataset

from patchmine.data.inspect import inspect, render
from patchmine.data.inspecting import findings
from patchmine.data.sources.source import open_source


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Six RGB images of two sizes (one twice), one grey, one 16-bit, two broken."""
    generator = np.random.default_rng(0)
    for number in range(5):
        shape = (20, 30, 3) if number < 3 else (40, 16, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    shutil.copy(tmp_path / "1.png", tmp_path / "twin.png")
    Image.fromarray(np.full((20, 30), 51, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((20, 30), 13107, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.jpg").write_text("no image")
    out = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(out.getvalue()[:1500])
    return tmp_path


def test_everything_is_counted(mixed: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = inspect(open_source(mixed), progress=lambda done, total: steps.append((done, total)))
    assert (report.count, report.read) == (10, 10)
    assert report.sizes == {(20, 30): 6, (40, 16): 2}
    assert report.channels == {3: 6, 1: 2}
    assert report.dtypes == {"uint8": 7, "uint16": 1}
    assert report.duplicates == [[str(mixed / "1.png"), str(mixed / "twin.png")]]
    assert [Path(path).name for path, _ in report.broken] == ["text.jpg", "truncated.jpg"]
    assert all(reason for _, reason in report.broken)
    colour = [
        np.asarray(Image.open(f)) / 255
        for f in sorted(mixed.glob("*.png"))
        if f.stem not in ("grey", "deep")
    ]
    pixels = np.concatenate([image.reshape(-1, 3) for image in colour])
    np.testing.assert_allclose(report.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(report.std, pixels.std(0), rtol=1e-6)
    assert steps[-1] == (10, 10)
    assert report.classes is None


def test_a_sample_is_spread_over_the_source(image_folder: Path) -> None:
    source = open_source(image_folder)
    report = inspect(source, sample=3)
    assert (report.count, report.read) == (36, 3)
    assert report.classes == {"circle": 12, "square": 12, "stripes": 12}
    assert inspect(source, sample=3, full=True).read == 36
    assert "36 in" in render(report)
    assert "3 of them read" in render(report)
    assert str(report) == render(report)


def test_a_file_that_is_gone_is_broken(mixed: Path) -> None:
    source = open_source(mixed)
    (mixed / "0.png").unlink()
    report = inspect(source)
    assert report.broken[0][0] == str(mixed / "0.png")
    assert "No such file" in report.broken[0][1]


def test_the_text_names_what_is_wrong(mixed: Path) -> None:
    report = inspect(open_source(mixed))
    report.notes = ("the shard x.tar was cut",)
    text = render(report, width=300)
    assert f"{mixed / '1.png'} = {mixed / 'twin.png'}" in text
    assert f"{mixed / 'text.jpg'}: is no readable image" in text
    assert "2 of 10 (20.0%)" in text
    assert "20 to 40 pixels, median 20" in text
    assert "the shard x.tar was cut" in text
    report.broken = [("[red]x.jpg", "is broken")] * 30  # square brackets are no markup
    assert "[red]x.jpg: is broken" in render(report)
    assert "and 20 more" in render(report)


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    report = inspect(open_source(tmp_path))
    assert report.mean == ()
    assert "1 of 1 (100.0%)" in render(report)


def test_channels_that_are_pages_are_seen(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    stack = np.random.default_rng(0).integers(0, 256, (5, 20, 30), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    report = inspect(open_source(tmp_path))
    assert (report.channels, report.sizes) == ({5: 1}, {(20, 30): 1})
    np.testing.assert_allclose(report.mean, stack.mean((1, 2)) / 255, rtol=1e-6)


def test_files_that_need_a_package_are_told_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (30, 20))
    for number in range(3):
        pillow_heif.from_pillow(image).save(tmp_path / f"{number}.heic")
        image.save(tmp_path / f"{number}.png")
    files = tmp_path / "list.txt"
    files.write_text("\n".join(path.name for path in sorted(tmp_path.iterdir())))
    assert len(inspect(open_source(files)).broken) == 0
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    report = inspect(open_source(files))
    assert len(report.broken) == 3
    assert "3 of them need a package that is not installed: pip install pillow-heif" in render(
        report
    )


def test_pipes_and_large_images_are_broken_items(mixed: Path) -> None:
    (mixed / "text.jpg").unlink()
    source = open_source(mixed)
    (mixed / "truncated.jpg").unlink()
    os.mkfifo(mixed / "truncated.jpg")
    report = inspect(source, max_pixels=20 * 30)
    reasons = {Path(path).name: reason for path, reason in report.broken}
    assert "not a file" in reasons["truncated.jpg"]
    assert "max_pixels=640 or more" in reasons["3.png"]


def test_sums_in_blocks_are_those_of_the_whole(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inspect(open_source(mixed))
    monkeypatch.setattr(findings, "_BLOCK", 100)
    np.testing.assert_allclose(inspect(open_source(mixed)).std, whole.std, rtol=1e-9)


def test_labels_that_cannot_be_read_are_a_note(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        picture = io.BytesIO()
        Image.new("RGB", (20, 10)).save(picture, "PNG")
        for name, data in (
            ("1.png", picture.getvalue()),
            ("1.json", b"{"),
            ("2.png", picture.getvalue()),
        ):
            add(archive, name, data)
    source = open_source(tmp_path / "x.tar")
    report = inspect(source)
    assert (report.read, report.classes, len(report.broken)) == (2, None, 0)
    assert "the .json member of" in report.notes[-1]
    assert [source.key(index) for index in range(2)] == ["1.png", "2.png"]


def test_items_of_a_dataset_that_are_no_images_are_said_to_be_what_they_are() -> None:
    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return {"image": index}

    report = inspect(open_source(Rows()))
    assert [reason for _, reason in report.broken] == [
        "is a dict; an image is bytes, an array, a tensor or a PIL image"
    ] * 2
    assert report.duplicates == []
