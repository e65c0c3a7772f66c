"""Class maps of images without labels, as users meet them."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import patchmine
from fixtures.label_maps import COLOURS
from fixtures.segmenter import draw_maps, teach_tiny
from fixtures.small_runs import refused_prediction
from patchmine.data.decoding.decode import decode
from patchmine.data.sources.source import open_source
from patchmine.data.views.geometry import resize
from patchmine.errors import UserError
from patchmine.ops.windows import window_starts
from patchmine.runs.folder import RunFolder
from spoken import patchmine_says

QUIET: dict[str, Any] = {"workers": 0, "device": "cpu", "say": lambda _: None}
PALETTE = {"ground": [9, 8, 7], "tree": [200, 0, 0], "sea": [0, 0, 200]}


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_maps(tmp_path_factory.mktemp("maps") / "maps")


@pytest.fixture(scope="module")
def taught(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> patchmine.Run:
    out = tmp_path_factory.mktemp("taught") / "run"
    return teach_tiny(maps, out, classes=list(PALETTE))


@pytest.fixture(scope="module")
def images(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several sizes and depths in a folder; smaller and larger than a window."""
    root = tmp_path_factory.mktemp("images")
    (root / "a" / "b").mkdir(parents=True)
    source = sorted((maps / "test" / "images").iterdir())
    picture = Image.open(source[0])
    picture.resize((61, 90)).save(root / "a" / "b" / "large.tif")
    picture.resize((17, 9)).save(root / "small.webp")
    shutil.copy(source[1], root / "a" / "two.jpg")
    return root


@torch.no_grad()
def window_by_window(run: patchmine.Run, image: torch.Tensor) -> torch.Tensor:
    """(K, H, W) of an image (3, H, W) of bytes: each window alone, scores averaged."""
    config, network = run.config, RunFolder(run.path).segmenter().network().eval()
    mean, std = (torch.tensor(each)[:, None, None] for each in (config.mean, config.std))
    height, width = image.shape[-2:]
    pixels = torch.zeros(3, max(24, height), max(24, width))
    pixels[:, :height, :width] = (image / 255 - mean) / std
    sums = torch.zeros(len(config.classes), *pixels.shape[-2:])
    counts = torch.zeros(pixels.shape[-2:])
    for top in window_starts(pixels.shape[1], 24, 16):
        for left in window_starts(pixels.shape[2], 24, 16):
            window = (slice(top, top + 24), slice(left, left + 24))
            sums[(slice(None), *window)] += network(pixels[(slice(None), *window)][None])[0]
            counts[window] += 1
    return (sums / counts)[:, :height, :width]


def pixels_of(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_a_folder_of_maps_overlays_and_a_table(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "predictions"
    said = patchmine_says("predict", str(taught.path), str(images), f"out={out}", "workers=0")
    assert "3 of 3 images" in said
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    names = ["a/b/large", "a/two", "small"]
    overlays = [f"overlays/{name}.jpg" for name in names]
    assert files == sorted([*(f"{name}.png" for name in names), *overlays, "classes.csv"])
    source, rows = open_source(images), read_csv(out / "classes.csv")
    assert [row["file"] for row in rows[::3]] == ["a/b/large.tif", "a/two.jpg", "small.webp"]
    for place, name in enumerate(names):
        pixels, classes = pixels_of(source.path(place)), pixels_of(out / f"{name}.png")
        whole = window_by_window(taught, torch.tensor(pixels).permute(2, 0, 1)).argmax(0).numpy()
        assert classes.shape == pixels.shape[:2]
        assert (classes == whole).mean() > 0.999  # sums of other orders may tie
        counts = Counter(classes.ravel().tolist())
        own = rows[3 * place : 3 * place + 3]
        assert [row["class"] for row in own] == list(PALETTE)
        assert [int(row["pixels"]) for row in own] == [counts[k] for k in range(3)]
        shares = [float(row["share"]) for row in own]
        assert shares == pytest.approx([counts[k] / classes.size for k in range(3)])
        assert pixels_of(out / "overlays" / f"{name}.jpg").shape == pixels.shape


def test_classes_are_told_from_python_too(taught: patchmine.Run, images: Path) -> None:
    found = taught.predict(images, **QUIET)
    assert found["file"] == ["a/b/large.tif", "a/two.jpg", "small.webp"]
    assert [each.shape for each in found["classes"]] == [(90, 61), (40, 48), (9, 17)]
    assert all(each.dtype == np.uint8 for each in found["classes"])
    one = taught.predict(images / "a" / "two.jpg", batch_size=1, **QUIET)
    np.testing.assert_array_equal(one["classes"][0], found["classes"][1])


def test_images_are_resized_as_the_run_was_tested(maps: Path, tmp_path: Path) -> None:
    run = teach_tiny(maps, tmp_path / "run", steps=4, short_side=30)
    image = maps / "test" / "images" / "000.jpg"
    (classes,) = run.predict(image, **QUIET)["classes"]
    small = resize(decode(image.read_bytes(), 3, 10**9), (30, 36), run.config.interpolation)
    scores = F.interpolate(window_by_window(run, small)[None], (40, 48), mode="bilinear")
    assert classes.shape == (40, 48)
    assert (classes == scores[0].argmax(0).numpy()).mean() > 0.999


def test_colours_of_the_palette_are_drawn(maps: Path, tmp_path: Path) -> None:
    data = shutil.copytree(maps, tmp_path / "maps")
    for file in data.rglob("*.png"):
        labels = pixels_of(file)
        colours = np.array(list(PALETTE.values()), np.uint8)
        Image.fromarray(colours[np.where(labels == 255, 0, labels)]).save(file)
    run = teach_tiny(data, tmp_path / "run", palette=PALETTE)
    image = data / "test" / "images" / "000.jpg"
    out = run.predict(image, tmp_path / "p", **QUIET)
    classes = pixels_of(out / "000.png")
    assert len(np.unique(classes)) == 3
    painted = pixels_of(out / "overlays" / "000.jpg").astype(int)
    for number, colour in enumerate(PALETTE.values()):
        wanted = (np.array(COLOURS[number]) + colour) / 2
        assert np.abs(painted[classes == number].mean(0) - wanted).max() < 30


def test_names_that_would_meet_are_told(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    for name in ("same.jpg", "same.png"):
        shutil.copy(images / "a" / "two.jpg", tmp_path / name)
    with pytest.raises(UserError, match=r"same\.jpg and same\.png would both become same\.png"):
        taught.predict(tmp_path, out, **QUIET)
    assert not out.exists()


def test_images_outside_of_one_folder_are_named_from_the_one_that_holds_all(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    given = [images / "a" / "two.jpg", images / "small.webp"]
    out = taught.predict(given, tmp_path / "files", **QUIET)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {
        "a/two.png",
        "small.png",
    }
    listed = tmp_path / "list.txt"
    listed.write_text(f"{images / 'a' / 'two.jpg'}\n{images / 'a' / 'b' / 'large.tif'}\n")
    out = taught.predict(listed, tmp_path / "listed", **QUIET)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {
        "two.png",
        "b/large.png",
    }


def test_broken_images_are_left_out_up_to_a_share(
    taught: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(images, tmp_path / "images")
    (data / "empty.png").write_bytes(b"")
    Image.new("RGB", (3, 50)).save(data / "tiny.png")  # smaller than a patch
    with pytest.raises(UserError, match=r"2 of 5 images .* max_bad_share"):
        taught.predict(data, tmp_path / "p", **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    out = taught.predict(data, tmp_path / "p", max_bad_share=0.5, **QUIET)
    assert len(list(out.rglob("*.jpg"))) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["top=2"], "top=2 is for classes of whole images"),
        (["all=true"], "all=true is for classes of whole images"),
        (["segments=2"], "segments=2 is for"),
        (["crops=3"], "crops=3 is for"),
        (["out=p.csv"], "its maps go to a folder, as out=p/"),
        (["out=p.png"], "out"),
        (["out=full"], "out=full holds other things (kept.txt): name a new folder"),
        (["out=full/kept.txt/p"], "cannot be written"),
        (["data=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    words: list[str],
    named: str,
    taught: patchmine.Run,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused_prediction(taught, images, words)


def test_without_out_a_folder_is_written(
    taught: patchmine.Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    patchmine_says("predict", str(taught.path), str(images / "small.webp"), "workers=0")
    assert (tmp_path / "predictions" / "small.png").is_file()
