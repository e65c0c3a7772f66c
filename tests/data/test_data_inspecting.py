"""What `data inspect` advises, draws and writes: every finding, and that it is silent without."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from patchmine.config import resolve
from patchmine.config.schema import PretrainConfig
from patchmine.data.inspect import inspect, render
from patchmine.data.inspecting import alike, sheet
from patchmine.data.inspecting.alike import fingerprint, keepers, near
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from spoken import call

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def picture(seed: int, height: int = 240, width: int = 240) -> np.ndarray:
    """(H, W, 3) uint8: soft blobs of photographs' brightness, no two seeds alike."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255
    noise = generator.normal(0, 0.02, (height, width, 3))
    values = (soft - 0.5) / soft.std() * STD + MEAN + noise
    return (values.clip(0, 1) * 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photographs about which there is nothing to say."""
    for number in range(10):
        save(tmp_path / "photos" / f"{number}.png", picture(number))
    return tmp_path / "photos"


def advice_on(folder: Path, **options: Any) -> str:
    return "\n".join(inspect(open_source(folder), **options).advice)


def test_usual_photographs_need_no_advice(photos: Path) -> None:
    report = inspect(open_source(photos))
    assert report.advice == ()
    assert report.near_duplicates == []
    assert report.command == f"patchmine pretrain my-images data={photos} out=runs/mine"


# Files that are left out or broken


def test_files_that_may_hold_images_are_told_with_what_to_do(photos: Path) -> None:
    for name in ("a.mha", "b.mha", "c.czi", "notes.txt"):
        (photos / name).write_bytes(b"x")
    text = advice_on(photos)
    assert "2 files are left out that may hold images, medical images (.mha (2)): save each" in text
    assert "1 file is left out that may hold images, microscopes' files (.czi (1))" in text
    assert ".txt" not in text
    assert "ending .txt: 1" in render(inspect(open_source(photos)), width=300)
    both = open_source([str(photos), str(photos)])
    assert any("4 files are left out" in sentence for sentence in inspect(both).advice)


def test_empty_files_and_a_share_that_ends_a_run(photos: Path) -> None:
    (photos / "empty.jpg").touch()
    text = advice_on(photos)
    assert "1 file is empty (0 bytes): copy them again" in text
    assert "9% are broken, and a run stops above max_bad_share=0.05" in text
    for number in range(10, 30):
        save(photos / f"{number}.png", picture(number, 64, 64))
    assert "max_bad_share" not in advice_on(photos)


# Label masks


def mask(seed: int, classes: int = 5) -> np.ndarray:
    page = Image.new("L", (240, 240))
    draw, generator = ImageDraw.Draw(page), np.random.default_rng(seed)
    for value in range(1, classes):
        left, top = generator.integers(0, 160, 2).tolist()
        draw.ellipse((left, top, left + 70, top + 70), fill=value)
    return np.asarray(page)


def test_masks_of_another_ending_are_left_out_by_endings(photos: Path) -> None:
    for number in range(10):
        save(photos / f"{number}.gif", mask(number))
    report = inspect(open_source(photos))
    assert f"all that end in .gif: leave them out with data={photos}::png" in report.advice[0]
    assert len(report.advice) == 1, "the rest is about the photographs alone"
    assert len(open_source(f"{photos}::png")) == 10
    assert f"data={photos}::png" in report.command


@pytest.mark.parametrize("name", ["masks/{}.png", "train/labels/{}.png", "{}_mask.png"])
def test_the_command_that_leaves_masks_out_lists_the_photographs(
    photos: Path, name: str, tmp_path: Path
) -> None:
    for number in range(10):
        save(photos / name.format(number), mask(number))
    save(photos / name.format("none"), np.zeros((240, 240), np.uint8))  # no object
    report = inspect(open_source(photos))
    command = report.advice[0].split("`")[1]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    kept = open_source(tmp_path / "images.txt")
    assert {Path(kept.path(number)).name for number in range(len(kept))} == {
        f"{number}.png" for number in range(10)
    }
    assert "data=images.txt" in report.command


def test_photographs_in_a_folder_called_masks_are_none(photos: Path) -> None:
    for number in range(20, 25):
        save(photos / "masks" / f"{number}.png", picture(number))
    assert advice_on(photos) == ""


def test_masks_of_many_objects_in_16_bits_and_of_colours(photos: Path) -> None:
    numbered = np.kron(
        np.arange(400, dtype=np.uint16).reshape(20, 20), np.ones((12, 12), np.uint16)
    )
    save(photos / "objects_mask.png", numbered)
    colours = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
    save(photos / "colours_mask.png", colours[mask(1)])
    assert "2 of 12 images are of few values in flat areas" in advice_on(photos)


def test_a_set_of_drawings_is_not_told_as_masks_among_photographs(tmp_path: Path) -> None:
    for number in range(10):
        save(tmp_path / f"{number}.png", mask(number))
    report = inspect(open_source(tmp_path))
    assert "if they are label masks, name the folder of the photographs" in report.advice[0]
    assert "channels=1" in report.command


def test_images_of_one_colour(photos: Path) -> None:
    save(photos / "shut.png", np.full((240, 240, 3), 40, np.uint8))
    assert "1 image is of a single colour, as " in advice_on(photos)


# Duplicates


def test_copies_that_are_resized_or_compressed_are_near_duplicates(photos: Path) -> None:
    first = Image.open(photos / "3.png")
    first.save(photos / "3-again.jpg", quality=60)
    first.resize((400, 380), Image.Resampling.BICUBIC).save(photos / "3-large.png")
    recoloured = np.asarray(Image.open(photos / "4.png")).copy()
    recoloured[..., 0] //= 2
    save(photos / "4-red.png", recoloured)
    report = inspect(open_source(photos))
    (group,) = report.near_duplicates
    assert [Path(path).name for path in group] == ["3-large.png", "3-again.jpg", "3.png"]
    assert "2 images are repeats (0 equal to another, 2 nearly so)" in report.advice[0]
    assert "0, and 2 nearly so" in render(report)


def related(generator: np.random.Generator, number: int) -> np.ndarray:
    """(N,) hashes, most of which are a few bits from others."""
    base = generator.integers(0, 2**64, number // 6, dtype=np.uint64)
    bits = base[generator.integers(0, len(base), number)]
    for _ in range(5):
        flipped = np.uint64(1) << generator.integers(0, 64, number).astype(np.uint64)
        bits = bits ^ np.where(generator.random(number) < 0.6, flipped, np.uint64(0))
    return bits


def by_brute_force(bits: np.ndarray, colours: np.ndarray) -> list[int]:
    kept: list[int] = []
    for place in range(len(bits)):
        first = (
            other
            for other in range(place)
            if kept[other] == other
            and (int(bits[place]) ^ int(bits[other])).bit_count() <= alike.DISTANCE
            and near(bits, colours, other, np.array([place]))[0]
        )
        kept.append(next(first, place))
    return kept


@pytest.mark.parametrize("crowd", [64, 2])
def test_the_search_finds_what_brute_force_finds(
    crowd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alike, "_CROWD", crowd)  # smaller: buckets that are too full
    generator = np.random.default_rng(0)
    bits, colours = related(generator, 300), np.full((300, 3), 0.5, np.float32)
    colours[generator.random(300) < 0.2] = 0.7
    found = keepers(bits, colours)
    assert found.tolist() == by_brute_force(bits, colours)
    assert 30 < (found != np.arange(300)).sum() < 200


def test_a_crowd_of_equal_hashes_is_one_group_however_large() -> None:
    bits, colours = np.full(10_000, 7, np.uint64), np.full((10_000, 3), 0.5, np.float32)
    assert not keepers(bits, colours).any()
    assert keepers(bits[:0], colours[:0]).tolist() == []


def test_a_hash_stands_any_size_and_brightness() -> None:
    pixels = picture(0).transpose(2, 0, 1).astype(np.float32) / 255
    darker = fingerprint(pixels * 0.5)
    assert darker.bits == fingerprint(pixels).bits
    assert darker.colour[0] == pytest.approx(fingerprint(pixels).colour[0] / 2, rel=1e-5)
    for shape in ((1, 1, 1), (1, 5, 40), (7, 33, 31)):
        assert 0 <= fingerprint(np.ones(shape, np.float32)).bits < 2**64


# The list of what to keep


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv"])
def test_the_list_names_one_of_each_and_data_reads_it(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my photos"
    for number in range(6):
        save(folder / ("cat" if number % 2 else "dog one") / f"{number} #,a.png", picture(number))
    save(folder / "cat" / "again.jpg", picture(1), quality=70)
    save(folder / "cat" / "copy.png", picture(3))
    (folder / "cat" / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    report = inspect(open_source("my photos"), sample=1, dedup=f"kept.{ending}")
    assert report.read == report.count == 9
    assert report.listed == (f"kept.{ending}", 6)
    kept = open_source(f"kept.{ending}")
    names = {Path(kept.path(number)).name for number in range(len(kept))}
    assert len(names) == len(kept) == 6
    assert {f"{number} #,a.png" for number in (0, 2, 4, 5)} < names
    labels = kept.labels()
    assert labels is not None
    assert labels.names == ["cat", "dog one"]
    folders = [Path(kept.path(number)).parent.name for number in range(6)]
    assert [labels.names[number] for number in labels.ids] == folders
    assert f"data=kept.{ending}" in report.command
    assert "dedup=" not in "".join(report.advice)
    assert f"kept.{ending}: a list of the 6 items to keep" in render(report)
    again = inspect(kept, full=True)
    assert (again.duplicates, again.near_duplicates, again.broken) == ([], [], [])


def test_a_name_that_no_list_can_hold_is_refused_and_nothing_is_left(photos: Path) -> None:
    (photos / "0.png").rename(photos / 'a "b.png')
    with pytest.raises(UserError, match=r"cannot stand in this list.*or as \.csv"):
        inspect(open_source(photos), dedup=photos.parent / "kept.txt")
    assert sorted(path.name for path in photos.parent.iterdir()) == ["photos"]
    inspect(open_source(photos), dedup=photos.parent / "kept.csv")
    assert len(open_source(photos.parent / "kept.csv")) == 10


def test_items_that_are_no_files_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no files that a list could name"):
        inspect(open_source("embedded:photos/test"), dedup=tmp_path / "kept.txt")


# Channels, statistics, sizes


def test_grey_pictures_stored_in_colour_take_one_channel(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / f"{number}.png", picture(number)[..., :1].repeat(3, axis=2))
    report = inspect(open_source(tmp_path))
    assert "5 of 5 are stored in colour but grey in every pixel" in report.advice[0]
    assert report.command.endswith(" channels=1 out=runs/mine")


def test_mixed_channels_and_types(photos: Path) -> None:
    save(photos / "grey.png", picture(20)[..., 0])
    deep = picture(21)[..., 0].astype(np.uint16) * 257
    save(photos / "deep.png", deep)
    np.save(photos / "bands.npy", np.random.default_rng(0).random((5, 240, 240), np.float32))
    text = advice_on(photos)
    assert "numbers of channels differ (3 (10), 1 (2), 5 (1)): channels=3 repeats grey" in text
    assert "1 of them count as broken, and a run stops above max_bad_share" in text
    assert "types of values differ (uint8 (11), float32 (1), uint16 (1))" in text


def test_many_bands_are_the_channels(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", generator.normal(900, 80, (6, 64, 64)).astype("f4"))
    report = inspect(open_source(tmp_path))
    assert "channels=6" in report.command
    assert "with channels=6 pretrain takes mean and std from the data" in report.advice[0]


def test_four_channels_may_be_kept(tmp_path: Path) -> None:
    for number in range(3):
        alpha = np.full((240, 240, 1), 128 + number, np.uint8)
        save(tmp_path / f"{number}.png", np.concatenate([picture(number), alpha], 2))
    report = inspect(open_source(tmp_path))
    assert report.advice == (
        "all have 4 channels: channels=3 drops the last as alpha, channels=4 keeps it",
    )


def test_dark_pictures_bring_their_statistics(tmp_path: Path) -> None:
    dark = [(picture(number) * [0.2, 0.15, 0.1]).astype(np.uint8) for number in range(5)]
    for number, pixels in enumerate(dark):
        save(tmp_path / f"{number}.png", pixels)
    report = inspect(open_source(tmp_path))
    assert (
        "the images are dark and of little contrast: pretrain takes ImageNet's" in report.advice[0]
    )
    words = [word for word in shlex.split(report.command) if word.startswith(("mean", "std"))]
    assert all(word in report.advice[0] for word in words)
    given = resolve.parse("my-images", ["data=x", *words])
    values = np.concatenate([pixels.reshape(-1, 3) for pixels in dark]) / 255
    np.testing.assert_allclose(given.mean, values.mean(0), rtol=1e-3)
    np.testing.assert_allclose(given.std, values.std(0), rtol=1e-3)


def test_twelve_bits_in_sixteen(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png", picture(number)[..., 0].astype(np.uint16) * 16)
    assert "(12 bits) of 65,535, which is scaled to 1: with channels=1 pretrain takes" in advice_on(
        tmp_path
    )


def test_pages_of_tiffs(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    stack = np.stack([picture(number)[..., 0] for number in range(5)])
    colour = np.stack([picture(number) for number in range(3)])
    tifffile.imwrite(tmp_path / "grey.tif", stack, photometric="minisblack", metadata=None)
    tifffile.imwrite(tmp_path / "colour.tif", colour, photometric="rgb", metadata=None)
    tifffile.imwrite(tmp_path / "one.tif", colour[0], photometric="rgb", metadata=None)
    text = advice_on(tmp_path)
    assert "1 TIFF of 5 pages" in text
    assert "5 pages are the channels of one image (channels=5)" in text
    assert f"1 TIFF of 3 pages (as {tmp_path / 'colour.tif'}): only one is read" in text
    assert "one.tif" not in text


@pytest.mark.parametrize(
    ("side", "words"),
    [
        (240, []),
        (180, ["image_size=176"]),
        (96, ["image_size=96", "patch_size=8"]),
        (32, ["image_size=32", "patch_size=4"]),
        (9, ["image_size=16", "patch_size=4"]),
    ],
)
def test_the_command_is_one_that_pretrain_takes(
    side: int, words: list[str], tmp_path: Path
) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png", picture(number, side, side + 3))
    settings = shlex.split(inspect(open_source(tmp_path)).command)[3:]
    assert [word for word in settings if "size" in word] == words
    config = resolve.parse("my-images", settings)
    assert isinstance(config, PretrainConfig)


def test_small_large_and_long_images(photos: Path) -> None:
    save(photos / "tiny.png", picture(20, 12, 12))
    save(photos / "small.png", picture(21, 100, 100))
    save(photos / "long.png", picture(22, 120, 600))
    text = advice_on(photos)
    assert f"1 image is smaller than a patch of 16 pixels, as {photos / 'tiny.png'}" in text
    assert f"1 image is less than half of image_size=224, as {photos / 'small.png'}" in text
    assert f"1 image is over 4 times as long as wide, as {photos / 'long.png'}" in text
    assert "shrunk" not in text


def test_large_images_are_told_with_a_crop_scale(tmp_path: Path) -> None:
    save(tmp_path / "large.jpg", picture(0, 1500, 1600))
    text = advice_on(tmp_path)
    assert "crops are shrunk 3 to 7 times" in text
    scale = text.split("'")[1]
    config = resolve.parse("my-images", ["data=x", scale])
    assert isinstance(config, PretrainConfig)
    assert config.crop_scale == pytest.approx((224**2 / 2.4e6, 8 * 224**2 / 2.4e6), rel=0.05)


# The sheet


def test_the_sheet_shows_images_and_their_crops(tmp_path: Path) -> None:
    for number in range(3):
        pixels = np.zeros((240, 320, 3), np.uint8)
        pixels[..., number] = 200
        pixels[:, ::2, number] = 210
        save(tmp_path / "photos" / f"{number}.png", pixels)
    inspect(open_source(tmp_path / "photos"), sheet=tmp_path / "sheet.png")
    page = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    step, row = sheet.CELL + sheet.GAP, sheet.CELL + sheet.HEAD + sheet.GAP
    head = sheet.HEAD + sheet.GAP
    assert page.shape == (row * 3 + head, step * (1 + sheet.CROPS) + sheet.GAP, 3)
    for number in range(3):
        for place in range(1, 1 + sheet.CROPS):
            top, left = head + number * row + sheet.HEAD, sheet.GAP + place * step
            cell = page[top + 2 : top + sheet.CELL - 2, left + 2 : left + sheet.CELL - 2]
            assert cell[..., number].min() > 190
            assert np.delete(cell, number, axis=2).max() < 10


def test_the_sheet_of_bands_and_without_images(tmp_path: Path) -> None:
    bands, drawn = tmp_path / "bands", tmp_path / "sheet.png"
    bands.mkdir()
    np.save(bands / "x.npy", np.random.default_rng(0).random((6, 64, 64)).astype(np.float32))
    inspect(open_source(bands), sheet=drawn)
    with Image.open(drawn) as page:
        assert page.mode == "RGB"
    drawn.unlink()
    (bands / "x.npy").write_bytes(b"")
    for mistake, options in {
        "no image of data=.* can be shown": {"sheet": drawn},
        "video=true reads videos": {"sheet": drawn, "video": True},
        "would be one of the images of data=": {"sheet": bands / "sheet.png"},
    }.items():
        with pytest.raises(UserError, match=f"^sheet.*{mistake}"):
            inspect(open_source(bands), **options)
    assert [path.name for path in tmp_path.rglob("*")] == ["bands", "x.npy"]


# The command line


def test_the_command_prints_the_report_and_writes_both_files(photos: Path, tmp_path: Path) -> None:
    list_file, drawn = tmp_path / "kept.txt", tmp_path / "sheet.png"
    result = call("data", "inspect", str(photos), f"dedup={list_file}", f"sheet={drawn}")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].split()[:3] == ["images", "10", "in"]
    assert f"  patchmine pretrain my-images data={list_file} out=runs/mine\n" in result.stdout
    assert "Reading: 10 of 10" in result.stderr
    assert list_file.exists()
    assert drawn.exists()


@pytest.mark.parametrize("word", ["dedup=kept.json", "sheet=sheet.pdf"])
def test_files_of_other_endings_are_refused(photos: Path, word: str) -> None:
    result = call("data", "inspect", str(photos), word)
    assert result.exit_code == 2
    assert word.partition("=")[0] in result.stderr
    assert "ends in" in result.stderr
