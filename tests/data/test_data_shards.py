from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from patchmine.data.sources import index, shards, stored
from patchmine.data.sources.shards import ShardSource, open_shards
from patchmine.errors import UserError


def write_tar(file: Path, *members: tuple[str, bytes], folders: bool = False) -> Path:
    with tarfile.open(file, "w") as archive:
        if folders:
            folder = tarfile.TarInfo("cat")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(700 + 37 * number)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two shards of four and three images with labels."""
    members = [
        part
        for number in range(7)
        for part in [
            (f"{number:03d}.jpg", image(number)),
            (f"{number:03d}.cls", b"dog\n" if number % 2 else b"cat"),
        ]
    ]
    return [
        write_tar(tmp_path / "a.tar", *members[:8]),
        write_tar(tmp_path / "b.tar", *members[8:]),
    ]


def items(source: ShardSource) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


def test_images_and_labels_from_any_place(pair: list[Path]) -> None:
    source = open_shards(pair, "x", None)
    assert len(source) == 7
    assert [source.read(index) for index in (5, 0, 6, 3)] == [
        image(5),
        image(0),
        image(6),
        image(3),
    ]
    assert source.path(5) == f"{pair[1]}:005.jpg"
    labels = source.labels()
    assert labels is not None
    assert labels.names == ["cat", "dog"]
    assert labels.ids.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert source.notes == ()


def test_what_belongs_together_and_what_does_not_count(tmp_path: Path) -> None:
    long_name = "long/" * 60 + "name.png"
    file = write_tar(
        tmp_path / "a.tar",
        ("./cat/1.mask.png", b"mask"),
        ("./cat/1.jpg", b"one"),
        ("./cat/1.txt", b"a caption"),
        ("./cat/._2.jpg", b"hidden"),
        ("./dog.v1/1.JPEG", b"two"),  # the dot in the folder starts no extension
        (long_name, b"three"),
        ("readme.txt", b"no image"),
        folders=True,
    )
    source = open_shards([file], "x", None)
    assert items(source) == [b"mask", b"one", b"two", b"three"]
    assert [source.key(index) for index in range(4)] == [
        "cat/1.mask.png",
        "cat/1.jpg",
        "dog.v1/1.JPEG",
        long_name,
    ]
    assert source.notes == (
        "data=x: 1 image is an item beside another of its key (cat/1.mask.png beside cat/1.jpg); "
        "to leave such out "
        "name the endings that count, as in ::jpg",
        "data=x: 3 names are passed over (ending .txt: 2, as cat/1.txt; hidden or of the system: "
        "1, as cat/._2.jpg).",
    )
    labels = source.labels()
    assert labels is not None
    assert labels.names == ["cat", "dog.v1", "long"]


def test_labels_in_json(tmp_path: Path) -> None:
    file = write_tar(
        tmp_path / "a.tar",
        ("1.json", b'{"label": 3}'),
        ("1.jpg", b"x"),
        ("2.jpg", b"y"),
        ("2.cls", b"20"),
    )
    labels = open_shards([file], "x", None).labels()
    assert labels is not None
    assert labels.names == ["3", "20"]
    bare = write_tar(
        tmp_path / "b.tar", ("1.jpg", b"x"), ("1.json", b'{"caption": "x"}'), ("2.jpg", b"y")
    )
    assert open_shards([bare], "x", None).labels() is None
    with pytest.raises(UserError, match=r"b.tar:1.jpg has no label, others have one"):
        open_shards([file, bare], "x", None).labels()
    broken = write_tar(tmp_path / "c.tar", ("1.jpg", b"x"), ("1.json", b"{"))
    with pytest.raises(UserError, match=r"the .json member of .*c.tar:1.jpg cannot be read"):
        open_shards([broken], "x", None).labels()


def test_the_index_is_used_again_until_a_shard_changes(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(index, "RECENT", -(10**18))
    first = open_shards(pair, "x", cache)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "index_shards", None)
        second = open_shards(pair, "x", cache)
    assert items(second) == items(first)
    assert second.fingerprint == first.fingerprint
    write_tar(pair[1], ("x.jpg", b"new"))
    third = open_shards(pair, "x", cache)
    assert items(third) == [*items(first)[:4], b"new"]
    assert third.fingerprint != first.fingerprint


def test_open_files_do_not_travel(pair: list[Path], tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        source = open_shards(pair, "x", cache)
        before = items(source)
        assert items(pickle.loads(pickle.dumps(source))) == before


def _read_back(
    source: ShardSource, order: list[int], answers: multiprocessing.SimpleQueue[list[bytes]]
) -> None:
    answers.put([source.read(index) for index in order])


def test_forked_processes_share_open_files_without_disturbing_each_other(pair: list[Path]) -> None:
    source = open_shards(pair, "x", None)
    source.read(0)  # opened before the fork
    context = multiprocessing.get_context("fork")
    orders = [list(range(7)) * 20, list(range(6, -1, -1)) * 20]
    answers = [context.SimpleQueue() for _ in orders]
    workers = [
        context.Process(target=_read_back, args=(source, order, answer))
        for order, answer in zip(orders, answers, strict=True)
    ]
    for worker in workers:
        worker.start()
    for order, answer in zip(orders, answers, strict=True):
        assert answer.get() == [image(index) for index in order]
    for worker in workers:
        worker.join()
    assert source.read(3) == image(3)


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_opened", lru_cache(maxsize=2)(stored._opened.__wrapped__))
    files = [
        write_tar(tmp_path / f"{number}.tar", (f"{number}.jpg", image(number)))
        for number in range(6)
    ]
    source = open_shards(files, "x", None)
    assert items(source) == [image(number) for number in range(6)]
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(os.path.realpath(link).startswith(str(tmp_path)) for link in links) == 2


@pytest.mark.parametrize("kept_items", range(4))
def test_a_cut_shard_is_named_and_its_whole_images_stay_usable(
    pair: list[Path], kept_items: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = open_shards(pair, "x", None)
    start = int(whole.index.columns["start"][kept_items])
    for cut in (
        start - 512,
        start - 100,
        start,
        start + 50,
    ):  # before and in the header, before and in the data
        data = pair[0].read_bytes()
        damaged = pair[0].with_name("cut.tar")
        damaged.write_bytes(data[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = open_shards([damaged, pair[1]], "x", None)
        assert items(source) == [image(number) for number in [*range(kept_items), 4, 5, 6]]
        assert len(caplog.messages) == 1
        assert str(damaged) in caplog.messages[0]
        assert f"its {kept_items} whole images are used" in caplog.messages[0]
        assert source.notes == tuple(caplog.messages)
        labels = source.labels()
        assert labels is not None
        assert len(labels.ids) == kept_items + 3


def test_a_shard_cut_between_image_and_label_keeps_the_labels_complete(pair: list[Path]) -> None:
    source = open_shards(pair, "x", None)
    end = int(source.index.columns["note_start"][2]) - 512
    pair[0].write_bytes(pair[0].read_bytes()[:end])
    cut = open_shards(pair, "x", None)
    assert len(cut) == 5
    labels = cut.labels()
    assert labels is not None
    assert len(labels.ids) == 5


def test_a_shard_damaged_in_the_middle_is_named(pair: list[Path]) -> None:
    data = bytearray(pair[0].read_bytes())
    start = int(open_shards(pair, "x", None).index.columns["start"][2]) - 512
    data[start : start + 512] = b"\xaa" * 512
    pair[0].write_bytes(data)
    source = open_shards(pair, "x", None)
    assert len(source) == 5
    assert f"was damaged at byte {start:,}" in source.notes[0]


def test_a_shard_that_shrinks_while_in_use_is_a_read_error(pair: list[Path]) -> None:
    source = open_shards(pair, "x", None)
    os.truncate(pair[0], int(source.index.columns["start"][2]) + 10)
    with pytest.raises(OSError, match=r"a\.tar:002\.jpg ends \d+ bytes too early"):
        source.read(2)
    pair[1].unlink()
    with pytest.raises(OSError, match=r"b\.tar"):
        source.read(5)
    os.mkfifo(pair[1])  # which would be waited for
    with pytest.raises(OSError, match="seek"):
        source.read(5)


def test_wrong_shards_are_explained(tmp_path: Path) -> None:
    text = tmp_path / "text.tar"
    text.write_bytes(b"no tar" * 300)
    with pytest.raises(UserError, match=rf"the shard {text} is no plain tar archive"):
        open_shards([text], "x", None)
    empty = tmp_path / "empty.tar"
    empty.touch()
    with pytest.raises(
        UserError, match=rf"the shard {empty} was cut within its first header \(it has 0 bytes\)"
    ):
        open_shards([empty], "x", None)
    with pytest.raises(UserError, match=r"the shard .*gone\.tar cannot be read"):
        open_shards([tmp_path / "gone.tar"], "x", None)
    bare = write_tar(tmp_path / "bare.tar", ("1.txt", b"x"))
    with pytest.raises(UserError, match=r"there is no whole image in 1 shard; images end in \.jpg"):
        open_shards([bare], "x", None)
    whole = write_tar(tmp_path / "whole.tar", ("1.jpg", image(1)))
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(
        UserError,
        match=r"no whole image in 1 shard: the shard .*whole\.tar was cut in the middle of 1\.jpg",
    ):
        open_shards([whole], "x", None)


def test_a_shard_that_may_not_be_read_is_named_before_any_work(
    pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(stored, "open_regular", refuse)
    with pytest.raises(UserError, match=r"the shard .*a\.tar cannot be read \(Permission denied\)"):
        open_shards(pair, "x", None)
