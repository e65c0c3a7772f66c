"""What `patchmine explore` finds, keeps and refuses."""

from __future__ import annotations

import csv
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import patchmine
from patchmine.cli.commands import read_words
from patchmine.data.items import CLIP, IMAGE
from patchmine.data.loader import plain_batches
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import PlainView
from patchmine.data.views.normalise import normalise
from patchmine.errors import UserError
from patchmine.report.explore import COLUMNS, explore
from patchmine.report.findings import choose
from patchmine.report.settings import ExploreSettings
from patchmine.report.thumbnails import SIDE, ThumbnailView
from patchmine.runs.folder import RunFolder
from spoken import call

from .test_report_html import Page

EARLIER = Path(__file__).resolve().parents[1] / "fixtures" / "earlier"


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the 36 images in which one stands three times and one is all black."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    for name in ("again.jpg", "third.jpg"):
        shutil.copy(folder / "circle" / "0000.jpg", folder / name)
    Image.new("RGB", (200, 40)).save(folder / "black.png")
    return folder


def explored(target: Path | str, data: Path | str, out: Path, **more: Any) -> list[dict[str, str]]:
    """The rows of the table, by name of the file in the data."""
    settings = dict(target=str(target), data=str(data), out=str(out), workers=0, device="cpu")
    explore(ExploreSettings(**settings | more))
    with out.with_suffix(".csv").open(encoding="utf-8", newline="") as handle:
        return [
            row | {key: str(Path(row[key]).name) for key in ("file", "nearest")}
            for row in csv.DictReader(handle)
        ]


def test_the_table_has_every_image_and_knows_the_copies(
    hpm_run: Path, images: Path, tmp_path: Path
) -> None:
    rows = explored(hpm_run, images, tmp_path / "new" / "page.html", clusters=4)
    assert len(rows) == 39
    assert tuple(rows[0]) == COLUMNS
    files = [Path(path).name for path in map(open_source(images).path, range(39))]
    assert [row["file"] for row in rows] == files
    copies = [row for row in rows if row["duplicate_group"] == "1"]
    assert {"again.jpg", "third.jpg"} < {row["file"] for row in copies}
    assert len(copies) == 3
    assert all(float(row["similarity"]) > 0.9999 for row in copies)
    assert {row["cluster"] for row in rows} == {"1", "2", "3", "4"}
    assert np.median([float(row["outlier"]) for row in rows]) == pytest.approx(1, abs=0.05)


def test_difficulty_is_what_the_method_says(hpm_run: Path, images: Path, tmp_path: Path) -> None:
    rows = explored(hpm_run, images, tmp_path / "page.html")
    run = RunFolder(hpm_run)
    batch = next(plain_batches(open_source(images), PlainView(run.config), batch_size=39))
    mean, std = torch.tensor(run.config.mean), torch.tensor(run.config.std)
    expected = run.method().difficulty(normalise(batch, mean, std, "cpu").views[0])
    np.testing.assert_allclose(
        [float(row["difficulty"]) for row in rows], expected, rtol=1e-4, atol=1e-5
    )
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert {"hardest", "easiest", "duplicates", "outliers", "clusters"} < set(page.ids)


@pytest.mark.parametrize("target", ["raw-pixels", EARLIER / "mae" / "run"])
def test_other_models_say_nothing_of_difficulty(
    target: Path | str, images: Path, tmp_path: Path
) -> None:
    rows = explored(target, images, tmp_path / "page.html")
    assert {row["difficulty"] for row in rows} == {""}
    assert len({row["duplicate_group"] for row in rows}) > 1
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "duplicates" in page.ids
    assert "hardest" not in page.ids


def test_videos_are_shown_by_their_middle_frame(tmp_path: Path) -> None:
    colours = [(250, 40 * number, 0) for number in range(5)]
    for number, colour in enumerate(colours):
        folder = tmp_path / "videos" / f"{number}"
        folder.mkdir(parents=True)
        for frame in range(9):
            shown = colour if frame == 4 else (0, 0, 0)
            Image.new("RGB", (40, 30), shown).save(folder / f"{frame}.png")
    rows = explored(EARLIER / "hpm-clips" / "run", tmp_path / "videos", tmp_path / "page.html")
    assert [row["file"] for row in rows] == [f"{number}" for number in range(5)]
    assert all(float(row["difficulty"]) > 0 for row in rows)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Hardest videos" in text
    view = ThumbnailView(RunFolder(EARLIER / "hpm-clips" / "run").config, CLIP.pixels)
    raw = open_source(tmp_path / "videos", "video").read(3)
    sample = view(raw, np.random.default_rng(0))
    assert sample.views[0][:, 0, 0].tolist() == list(colours[3])


def test_a_thumbnail_is_the_whole_image_and_never_larger(hpm_run: Path, tmp_path: Path) -> None:
    config = RunFolder(hpm_run).config
    for size, expected in (((400, 100), (SIDE, 32)), ((20, 30), (20, 30)), ((1, 900), (1, SIDE))):
        Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "x.png")
        raw = (tmp_path / "x.png").read_bytes()
        sample = ThumbnailView(config, IMAGE.pixels)(raw, np.random.default_rng(0))
        height, width = (round(SIDE * share) for share in sample.box[2:].tolist())
        assert (width, height) == expected
        assert sample.views[0][:, height - 1, width - 1].tolist() == [10, 200, 30]


def test_a_thumbnail_of_deep_pixels_spans_black_to_white(hpm_run: Path, tmp_path: Path) -> None:
    deep = np.linspace(100, 5000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    view = ThumbnailView(RunFolder(hpm_run).config, IMAGE.pixels)
    sample = view((tmp_path / "deep.png").read_bytes(), np.random.default_rng(0))
    assert sample.views[0][0, 0, 0] == 0
    assert sample.views[0][0, 63, 63] == 255


def test_the_page_holds_as_many_as_asked_with_what_is_telling_first() -> None:
    neighbours = torch.tensor([[(i + 1) % 50, (i + 2) % 50, (i + 3) % 50] for i in range(50)])
    chosen = choose([[40, 41, 42], [7, 40]], neighbours, 7)
    assert list(chosen) == sorted(chosen)
    assert list(chosen.values()) == list(range(7))
    assert {40, 41, 42, 7} < set(chosen)
    assert {8, 43} < set(chosen)  # the nearest of those, then the second ones
    assert set(choose([[40, 41, 42], [7]], neighbours, 2)) == {40, 7}  # sections take turns
    assert list(choose([[40]], neighbours, 60)) == list(range(50))


def test_few_are_shown_and_the_table_still_has_all(
    hpm_run: Path, images: Path, tmp_path: Path
) -> None:
    rows = explored(hpm_run, images, tmp_path / "page.html", shown=6)
    assert len(rows) == 39
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("data:image/webp;base64,") == 6
    assert "6 of 39 images" in text


def test_the_page_is_well_formed_and_asks_for_nothing(
    hpm_run: Path, images: Path, tmp_path: Path
) -> None:
    explored(hpm_run, images, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)


def test_names_of_any_letters_are_text(hpm_run: Path, images: Path, tmp_path: Path) -> None:
    first = (images / "circle" / "0000.jpg").read_bytes()
    for name in (b"caf\xe9.jpg", b"<b onclick=x>\"a\" & 'b'.jpg"):
        Path(os.fsdecode(os.fsencode(images) + b"/" + name)).write_bytes(first)
    rows = explored(hpm_run, images, tmp_path / "page.html")
    names = {row["file"] for row in rows}
    assert {r"caf\xe9.jpg", "<b onclick=x>\"a\" & 'b'.jpg"} < names
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert page.tags.count("script") == 2
    assert "<b onclick=x>\"a\" & 'b'.jpg" in page.words
    assert r"caf\xe9.jpg" in page.words


def test_broken_images_have_no_row(hpm_run: Path, images: Path, tmp_path: Path) -> None:
    (images / "square" / "0003.png").write_bytes(b"")
    rows = explored(hpm_run, images, tmp_path / "page.html", max_bad_share=0.5)
    assert len(rows) == 38


def test_a_run_writes_it_from_python_where_it_is_told(
    hpm_run: Path, images: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    out = patchmine.Run(hpm_run).explore(
        images, tmp_path / "page.htm", csv=tmp_path / "t" / "rows.csv", workers=0, say=said.append
    )
    assert out == tmp_path / "page.htm"
    assert (tmp_path / "t" / "rows.csv").is_file()
    assert "39 images" in said[-1]


def test_mistakes_are_one_sentence_and_leave_what_was_there(
    hpm_run: Path, images: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text("earlier")

    def refused(match: str, data: Path = images, **more: Any) -> None:
        with pytest.raises(UserError, match=match):
            explored(hpm_run, data, more.pop("out", page), **more)
        assert page.read_text() == "earlier"
        assert not list(tmp_path.glob(".*new*"))

    refused(r"data=.*nowhere: there is no such file", data=tmp_path / "nowhere")
    refused(r"clusters=50, but there are 39 images that can be read", clusters=50)
    refused(r"pooling='max': .* has cls, mean", pooling="max")
    (tmp_path / "file").write_text("")
    refused(r"out=.*file/p\.html cannot be written", out=tmp_path / "file" / "p.html")
    refused(r"csv=.*file/t\.csv cannot be written", csv=str(tmp_path / "file" / "t.csv"))
    # Told before anything is read.
    refused(r"out=/proc/p\.html cannot be written", tmp_path / "nowhere", out=Path("/proc/p.html"))
    refused(r"csv=/proc/t\.csv cannot be written", tmp_path / "nowhere", csv="/proc/t.csv")
    few = tmp_path / "few"
    few.mkdir()
    for number in range(2):
        shutil.copy(images / "black.png", few / f"{number}.png")
    refused(r"data=.*few has 2 images that can be read: .* give 3 or more", data=few)
    for file in few.iterdir():
        file.write_bytes(b"nothing")
    refused(r"few has no image that can be read", data=few)


@pytest.mark.parametrize("word", ["out=page.pdf", "csv=table.xlsx", "shown=0", "similarity=1.5"])
def test_settings_are_refused_by_name(word: str) -> None:
    with pytest.raises(UserError, match=word.split("=")[0]):
        read_words(ExploreSettings, ["run", "data=x", word], command="explore", first=["target"])


def test_the_command_prints_where_the_page_is(hpm_run: Path, images: Path, tmp_path: Path) -> None:
    words = [f"data={images}", f"out={tmp_path / 'x.html'}", "workers=0", "shown=10"]
    result = call("explore", str(hpm_run), *words)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "x.html")
    assert (tmp_path / "x.csv").is_file()
