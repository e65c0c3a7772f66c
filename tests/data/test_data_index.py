"""Kept indices are used only where nothing speaks against it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_files import JPEG, write_files, write_tar

from patchmine.data.sources import folder, index
from patchmine.data.sources.contract import Source
from patchmine.data.sources.index import Index, PathList, load, save
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError


@pytest.fixture(autouse=True)
def long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had changed in the last seconds, so that indices are trusted as soon as they
    are written.
    """
    monkeypatch.setattr(index, "RECENT", -(10**18))


def keys(source: Source) -> list[str]:
    return [source.key(number) for number in range(len(source))]


def same_times(place: Path, like: os.stat_result) -> None:
    os.utime(place, ns=(like.st_atime_ns, like.st_mtime_ns))


def swap_folder(room: Path, place: Path) -> None:
    """As ``rsync -a`` or ``tar x`` do: other names, the folder's own times."""
    info = place.stat()
    write_files(room / "other", "new.jpg", "sub/newer.jpg")
    shutil.rmtree(place)
    (room / "other").rename(place)
    same_times(place, info)


def swap_inner_folder(_: Path, place: Path) -> None:
    info = (place / "sub").stat()
    outer = place.stat()
    shutil.rmtree(place / "sub")
    write_files(place / "sub", "other.jpg")
    same_times(place / "sub", info)
    same_times(place, outer)


def add_and_turn_back_time(_: Path, place: Path) -> None:
    info = (place / "sub").stat()
    write_files(place, "sub/added.jpg")
    same_times(place / "sub", info)


def retarget(room: Path, place: Path) -> None:
    info = place.stat()
    write_files(room / "target", "other.jpg")
    (place / "linked").unlink()
    (place / "linked").symlink_to(room / "target")
    same_times(place, info)


@pytest.mark.parametrize(
    "change", [swap_folder, swap_inner_folder, add_and_turn_back_time, retarget]
)
def test_a_folder_that_was_changed_behind_equal_times_is_listed_again(
    tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    place = write_files(tmp_path / "in", "old.jpg", "sub/older.jpg")
    write_files(tmp_path / "elsewhere", "x.jpg")
    (place / "linked").symlink_to(tmp_path / "elsewhere")
    before = keys(open_source(place, cache_dir=tmp_path / "cache"))
    assert before == ["linked/x.jpg", "old.jpg", "sub/older.jpg"]
    change(tmp_path, place)
    after = open_source(place, cache_dir=tmp_path / "cache")
    assert keys(after) == keys(open_source(place))
    assert keys(after) != before
    assert all(Path(after.path(number)).is_file() for number in range(len(after)))


def test_what_was_passed_over_for_its_contents_is_looked_at_again(tmp_path: Path) -> None:
    place, target = write_files(tmp_path / "in", "1.jpg"), tmp_path / "later"
    (place / "empty").write_bytes(b"")
    (place / "file.jpg").symlink_to(target / "x.jpg")
    (place / "folder").symlink_to(target)
    write_files(tmp_path, "LICENSE", data=b"some text")
    (place / "LICENSE").symlink_to(tmp_path / "LICENSE")
    (tmp_path / "list.txt").write_text("in/1.jpg\nin/empty\n")

    def both() -> list[list[str]]:
        return [
            keys(open_source(source, cache_dir=tmp_path / "cache"))
            for source in (place, tmp_path / "list.txt")
        ]

    assert both() == both() == [["1.jpg"], ["in/1.jpg"]]
    write_files(
        target, "x.jpg"
    )  # a disk is mounted, a download comes to its end: the folder itself stays as it was
    (place / "empty").write_bytes(JPEG)
    assert both() == [["1.jpg", "empty", "file.jpg", "folder/x.jpg"], ["in/1.jpg", "in/empty"]]


def test_a_folder_with_files_that_are_no_images_is_not_listed_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(write_files(tmp_path / "in", "1.jpg"), "README", data=b"some text")
    open_source(tmp_path / "in", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(folder, "list_folder", None)
    assert keys(open_source(tmp_path / "in", cache_dir=tmp_path / "cache")) == ["1.jpg"]


def test_a_list_reached_through_a_link_has_paths_of_its_own(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    open_source(tmp_path / "list.txt", cache_dir=tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/list.txt").symlink_to(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"line 1 names 'a.jpg', which does not exist"):
        open_source(tmp_path / "other/list.txt", cache_dir=tmp_path / "cache")


def test_an_archive_swapped_at_equal_size_and_time_is_read_again(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", "1.jpg", "2.jpg")
    info = file.stat()
    for swap in (True, False):
        open_source(file, cache_dir=tmp_path / "cache")
        other = write_tar(tmp_path / "y.tar", *(f"{swap:d}.png" for _ in range(2)))
        if swap:
            other.replace(file)
        else:  # written in place
            file.write_bytes(other.read_bytes())
        same_times(file, info)
        assert file.stat().st_size == info.st_size
        assert keys(open_source(file, cache_dir=tmp_path / "cache")) == [f"{swap:d}.png"] * 2


def test_a_list_swapped_at_equal_size_and_time_is_read_again(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.jpg")
    file = tmp_path / "list.txt"
    file.write_text("a.jpg\n")
    info = file.stat()
    assert keys(open_source(file, cache_dir=tmp_path / "cache")) == ["a.jpg"]
    file.write_text("b.jpg\n")
    same_times(file, info)
    assert keys(open_source(file, cache_dir=tmp_path / "cache")) == ["b.jpg"]


@pytest.mark.parametrize("form", ["folder", "tar", "list"])
def test_what_has_just_changed_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(index, "RECENT", 2_000_000_000)
    write_files(tmp_path / "in", "1.jpg", "2.jpg")
    place = {"folder": tmp_path / "in", "tar": tmp_path / "x.tar", "list": tmp_path / "list.txt"}[
        form
    ]

    def write(number: int) -> None:
        if form == "folder":
            write_files(place, f"{number}{number}.jpg")
        elif form == "tar":
            write_tar(place, f"{number}.jpg")
        else:
            place.write_text(f"in/{number}.jpg\n")

    write(1)
    before = keys(open_source(place, cache_dir=tmp_path / "cache"))
    write(2)
    monkeypatch.setattr(index, "mark_of", lambda _: [1, 1, 1, 1])  # a clock so coarse
    assert keys(open_source(place, cache_dir=tmp_path / "cache")) == keys(open_source(place))
    assert keys(open_source(place)) != before


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Path]:
    """A folder and the file of its kept index."""
    place = write_files(tmp_path / "in", *(f"{number}.jpg" for number in range(40)), "notes.txt")
    open_source(place, cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    return place, file


def test_every_flipped_byte_and_every_cut_makes_the_index_anew(
    kept: tuple[Path, Path], tmp_path: Path
) -> None:
    place, file = kept
    whole = file.read_bytes()
    for spot in [*range(60), *range(60, len(whole), 53)]:
        for mutant in (whole[:spot], whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :]):
            file.write_bytes(mutant)
            assert load(file) is None, spot
    assert keys(open_source(place, cache_dir=tmp_path / "cache")) == keys(open_source(place))
    assert load(file) is not None


@pytest.mark.parametrize(
    "other",
    [b"", b"\0" * 500, b"patchmine index 1\n" + bytes(200), b"\x93NUMPY" + bytes(200)],
    ids=lambda other: other[:9],
)
def test_what_is_no_index_of_this_version_is_no_index(
    kept: tuple[Path, Path], tmp_path: Path, other: bytes
) -> None:
    place, file = kept
    file.write_bytes(other)
    assert keys(open_source(place, cache_dir=tmp_path / "cache")) == keys(open_source(place))


def test_an_index_that_is_no_file_is_no_index(kept: tuple[Path, Path], tmp_path: Path) -> None:
    place, file = kept
    for make in (os.mkfifo, os.mkdir):
        file.unlink()
        make(file)
        assert len(open_source(place, cache_dir=tmp_path / "cache")) == 40
        shutil.rmtree(file) if file.is_dir() else None
        file.touch()


def test_the_columns_come_back_as_they_were(tmp_path: Path) -> None:
    paths = PathList()
    for name in (b"a", b"", b"caf\xe9", b"line\nbreak"):
        paths.add(name)
    columns = {
        **paths.columns(),
        "label": np.arange(4, dtype=np.int32),
        "none": np.zeros(0, np.int64),
    }
    saved = save(
        Index(columns, {"fingerprint": "f", "names": ["\udce9"]}), tmp_path / "deep/x.index"
    )
    assert saved.file is not None
    assert [saved.path(number) for number in range(4)] == ["a", "", "caf\udce9", "line\nbreak"]
    assert saved.stamp == {"fingerprint": "f", "names": ["\udce9"]}
    for name, values in columns.items():
        assert saved.columns[name].dtype == values.dtype
        assert np.array_equal(saved.columns[name], values)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.index"]


def test_the_note_of_what_was_passed_over_is_kept_too(
    kept: tuple[Path, Path], tmp_path: Path
) -> None:
    place, _ = kept
    again = open_source(place, cache_dir=tmp_path / "cache")
    assert "ending .txt: 1, as notes.txt" in again.notes[0]  # type: ignore[attr-defined]


def test_writers_side_by_side_do_not_disturb_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = write_files(tmp_path / "in", *(f"{number}.jpg" for number in range(50)))
    cache = tmp_path / "cache"

    def write() -> None:
        for _ in range(20):
            assert len(folder.open_folder(place, "x", cache)) == 50

    other = multiprocessing.get_context("fork").Process(target=write)
    other.start()
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            assert len(open_source(place, cache_dir=cache)) == 50
    other.join(60)
    assert other.exitcode == 0
    assert not caplog.messages
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_kept_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_files(tmp_path / "in", "1.jpg")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert len(open_source(place, cache_dir=tmp_path / "cache")) == 1
    assert len(caplog.messages) == 1
    assert "could not be kept" in caplog.messages[0]


def test_contents_that_change_under_equal_names_do_not_make_a_listing_old(
    kept: tuple[Path, Path],
) -> None:
    """Folders are looked at, not files: a million files cost no million looks."""
    place, file = kept
    before = file.stat().st_ino
    (place / "1.jpg").write_bytes(JPEG + b"other")
    open_source(place, cache_dir=file.parent)
    assert file.stat().st_ino == before
