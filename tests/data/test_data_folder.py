from __future__ import annotations

import logging
import os
import pickle
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from patchmine.data.sources import folder, index
from patchmine.data.sources.contract import IMAGE_SUFFIXES, Kind
from patchmine.data.sources.folder import FileSource, open_folder
from patchmine.data.sources.index import save
from patchmine.errors import UserError


def make(root: Path, *names: str) -> None:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())


@pytest.fixture
def long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had changed in the last seconds, so that listings are trusted."""
    monkeypatch.setattr(index, "RECENT", -(10**18))


def keys(source: FileSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


NAMES = (
    "b.jpg",
    "a.JPG",
    "a/b.png",
    "a-b/c.webp",
    "a/b/c/d.npy",
    "a.b/x.tif",
    "ä ö.jpeg",
    "a/b.txt",
    "z/deep/er/1.bmp",
)


def test_all_images_in_the_order_of_their_paths(tmp_path: Path) -> None:
    make(tmp_path, *NAMES, ".hidden.jpg", ".thumbs/1.jpg", "notes.txt")
    source = open_folder(tmp_path, "x", None)
    found = [
        p.relative_to(tmp_path).as_posix()
        for p in tmp_path.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES
    ]
    obvious = sorted(
        os.fsencode(p) for p in found if not any(part.startswith(".") for part in Path(p).parts)
    )
    assert [os.fsencode(key) for key in keys(source)] == obvious
    assert source.read(0) == obvious[0]
    assert source.path(0) == str(tmp_path / os.fsdecode(obvious[0]))
    with pytest.raises(IndexError):
        source.path(len(source))
    with pytest.raises(IndexError):
        source.path(-1)


def test_links_are_followed_unless_they_lead_nowhere_or_in_a_circle(tmp_path: Path) -> None:
    make(tmp_path / "real", "1.jpg", "sub/2.jpg")
    make(tmp_path / "elsewhere", "3.jpg")
    (tmp_path / "real" / "sub" / "up").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "real" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "real" / "other").symlink_to(tmp_path / "elsewhere")
    assert keys(open_folder(tmp_path / "real", "x", None)) == ["1.jpg", "other/3.jpg", "sub/2.jpg"]


def test_labels_are_the_first_folders(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "cat/more/2.jpg", "cat-like/3.jpg", "dog/4.jpg")
    labels = open_folder(tmp_path, "x", None).labels()
    assert labels is not None
    assert labels.names == ["cat", "cat-like", "dog"]
    assert [labels.names[i] for i in labels.ids] == [
        "cat-like",
        "cat",
        "cat",
        "dog",
    ]  # in the order of the paths
    make(tmp_path, "stray.jpg")
    assert open_folder(tmp_path, "x", None).labels() is None


def test_folders_of_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    make(tmp_path, "10/a.jpg", "9/a.jpg")
    labels = open_folder(tmp_path, "x", None).labels()
    assert labels is not None
    assert labels.names == ["9", "10"]
    assert labels.ids.tolist() == [1, 0]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were really listed."""
    listed: list[Path] = []
    real = folder.list_folder

    def list_folder(root: Path, kind: Kind) -> folder.Index:
        listed.append(root)
        return real(root, kind)

    monkeypatch.setattr(folder, "list_folder", list_folder)
    return listed


@pytest.mark.usefixtures("long_ago")
def test_the_index_is_used_again_until_a_folder_changes(tmp_path: Path, walks: list[Path]) -> None:
    root, cache = tmp_path / "images", tmp_path / "cache"
    make(root, *NAMES)
    first = open_folder(root, "x", cache)
    second = open_folder(root, "x", cache)
    assert len(walks) == 1
    assert keys(first) == keys(second)
    assert first.fingerprint == second.fingerprint
    assert not second.index.columns["blob"].flags.owndata  # mapped from the file
    make(root, "a/b/c/new.png")
    third = open_folder(root, "x", cache)
    assert len(walks) == 2
    assert "a/b/c/new.png" in keys(third)
    assert third.fingerprint != first.fingerprint
    open_folder(root, "x", cache)
    (root / "a/b.png").unlink()
    assert "a/b.png" not in keys(open_folder(root, "x", cache))


def test_a_folder_that_has_just_changed_is_not_trusted(tmp_path: Path) -> None:
    make(tmp_path / "images", "1.jpg")
    open_folder(tmp_path / "images", "x", tmp_path / "cache")
    changed = (tmp_path / "images").stat().st_mtime_ns
    make(tmp_path / "images", "2.jpg")
    os.utime(tmp_path / "images", ns=(changed, changed))  # within the same tick of the clock
    assert len(open_folder(tmp_path / "images", "x", tmp_path / "cache")) == 2


@pytest.mark.usefixtures("long_ago")
@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_damaged_index_is_made_again(tmp_path: Path, keep: int) -> None:
    make(tmp_path / "images", *NAMES)
    before = keys(open_folder(tmp_path / "images", "x", tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    assert keys(open_folder(tmp_path / "images", "x", tmp_path / "cache")) == before


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "images/1.jpg", "cache")
    assert len(open_folder(tmp_path / "images", "x", tmp_path / "cache")) == 1  # "cache" is a file
    assert "could not be kept" in caplog.text


@pytest.mark.usefixtures("long_ago")
def test_a_kept_index_travels_by_name(tmp_path: Path) -> None:
    make(tmp_path / "images", *(f"{number:05d}.jpg" for number in range(500)))
    source = open_folder(tmp_path / "images", "x", tmp_path / "cache")
    sent = pickle.dumps(source)
    assert len(sent) < 1500
    assert keys(pickle.loads(sent)) == keys(source)
    loose = open_folder(tmp_path / "images", "x", None)
    assert keys(pickle.loads(pickle.dumps(loose))) == keys(source)
    make(tmp_path / "images", "new.jpg")
    open_folder(tmp_path / "images", "x", tmp_path / "cache")
    with pytest.raises(UserError, match="was replaced"):
        pickle.loads(sent)


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(root: Path, _: Kind) -> folder.Index:
        raise PermissionError(13, "Permission denied", str(root / "secret"))

    monkeypatch.setattr(folder, "list_folder", refuse)
    with pytest.raises(UserError, match=r"secret cannot be listed \(Permission denied\)"):
        open_folder(tmp_path, "x", None)


def test_folders_linked_to_each_other_are_visited_once(tmp_path: Path) -> None:
    for number in range(12):
        make(tmp_path / "in" / f"d{number}", "x.jpg")
        make(tmp_path / "out" / f"o{number}", "y.jpg")
    for root, letter in ((tmp_path / "in", "d"), (tmp_path / "out", "o")):
        for one in range(12):
            for other in range(12):
                (root / f"{letter}{one}" / f"to{other}").symlink_to(root / f"{letter}{other}")
    (tmp_path / "in" / "z").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "out" / "o3")
    source = open_folder(tmp_path / "in", "x", None)
    names = keys(source)
    assert names == sorted(names)
    assert [name for name in names if name.startswith("d")] == sorted(
        f"d{number}/x.jpg" for number in range(12)
    )
    outside = [
        os.path.realpath(source.path(index))
        for index in range(len(source))
        if names[index][0] in "az"
    ]
    assert sorted(outside) == sorted(
        str(tmp_path / "out" / f"o{number}" / "y.jpg") for number in range(12)
    )
    assert "link to a folder that is listed anyway: " in source.notes[0]


def test_links_upwards_do_not_leave_the_folder(tmp_path: Path) -> None:
    make(tmp_path / "up" / "in", "1.jpg", "sub/2.jpg")
    make(tmp_path / "up", "stranger.jpg")
    (tmp_path / "up" / "in" / "parent").symlink_to("..")
    (tmp_path / "up" / "in" / "root").symlink_to("/")
    (tmp_path / "up" / "in" / "sub" / "self").symlink_to(".")
    source = open_folder(tmp_path / "up" / "in", "x", None)
    assert keys(source) == ["1.jpg", "sub/2.jpg"]
    assert "link to a folder that it lies in: 2, as " in source.notes[0]


def test_links_into_hidden_folders_are_followed(tmp_path: Path) -> None:
    make(tmp_path, ".store/cats/1.jpg", ".store/2.jpg")
    (tmp_path / "cats").symlink_to(tmp_path / ".store/cats")
    (tmp_path / "2.jpg").symlink_to(tmp_path / ".store/2.jpg")
    assert keys(open_folder(tmp_path, "x", None)) == ["2.jpg", "cats/1.jpg"]


def test_a_folder_reached_by_a_link_is_listed_as_such(tmp_path: Path) -> None:
    make(tmp_path / "real", "1.jpg", "sub/2.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "link")
    assert keys(open_folder(tmp_path / "link", "x", None)) == ["1.jpg", "sub/2.jpg"]


def test_folders_nested_deeper_than_calls_may_be(tmp_path: Path) -> None:
    make(tmp_path, "/".join(["d"] * 500 + ["x.jpg"]))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        source = open_folder(tmp_path, "x", None)
    finally:
        sys.setrecursionlimit(limit)
    assert len(source.key(0)) == 2 * 500 + 5


def test_folders_that_may_not_be_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/1.jpg", "secret/2.jpg")
    real = os.scandir

    def scandir(place: bytes) -> Iterator[os.DirEntry[bytes]]:
        if place.endswith(b"secret/"):
            raise PermissionError(13, "Permission denied", os.fsdecode(place))
        return real(place)

    monkeypatch.setattr(folder, "os", SimpleNamespace(**{**vars(os), "scandir": scandir}))
    source = open_folder(tmp_path, "x", tmp_path / "cache")
    assert keys(source) == ["a/1.jpg"]
    assert "folder that may not be read: 1, as secret/" in source.notes[0]


class Entry:
    """What ``os.scandir`` gives, without a disk."""

    __slots__ = ("folder", "name")

    def __init__(self, name: bytes, folder: bool) -> None:
        self.name, self.folder = name, folder

    def is_symlink(self) -> bool:
        return False

    def is_dir(self) -> bool:
        return self.folder

    def is_file(self) -> bool:
        return not self.folder


class Scan:
    def __init__(self, entries: Iterator[Entry]) -> None:
        self.entries = entries

    def __enter__(self) -> Iterator[Entry]:
        return self.entries

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 1000])
def test_a_million_files_are_indexed_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    per_class = 1_000_000 // classes
    root = os.fsencode(tmp_path)

    def scandir(place: bytes) -> Scan:
        if place == root:
            return Scan(Entry(b"n%08d" % number, True) for number in range(classes))
        start = place.rpartition(b"/")[2]
        return Scan(
            Entry(start + b"_%08d.JPEG" % (number * 7919 % per_class), False)
            for number in range(per_class)
        )

    class Info:
        st_dev, st_ino, st_size, st_mtime_ns, st_ctime_ns = 0, 0, 0, 0, 0

    def stat(place: bytes) -> Info:
        info = Info()
        info.st_ino = hash(place)
        return info

    # The room's own `os`, so that nobody else meets the made-up disk.
    monkeypatch.setattr(
        folder, "os", SimpleNamespace(**{**vars(os), "scandir": scandir, "stat": stat})
    )
    tracemalloc.start()
    try:
        index = folder.list_folder(tmp_path)
        building = tracemalloc.get_traced_memory()[1]
        saved = save(index, tmp_path / "kept.index")
        del index
        kept, saving = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    figures = f"{classes} folders: {building / 1e6:.0f} MB while listing, {saving / 1e6:.0f} MB while saving"
    logging.getLogger(__name__).info("%s, %.1f MB kept", figures, kept / 1e6)
    assert len(saved) == 1_000_000
    assert saved.path(123_456) < saved.path(123_457)
    assert building < 150e6
    assert saving < 200e6
    assert kept < 5e6  # the rest is mapped from the file
