from __future__ import annotations

import gzip
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_files import write_tar
from torch.utils.data import Dataset, IterableDataset

from patchmine.data.sharding import write_shards
from patchmine.data.sources.contract import ClassNames, Labels, Source
from patchmine.data.sources.source import default_cache_dir, open_source
from patchmine.errors import UserError


def contents(source: Source) -> list[Any]:
    return [source.read(index) for index in range(len(source))]


def test_one_set_of_images_in_every_form(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_source(str(image_folder))
    shards = tmp_path / "shards"
    write_shards(folder, shards, shard_size=40_000)
    count = len(list(shards.iterdir()))
    assert count > 2
    list_file = tmp_path / "list.txt"
    list_file.write_text("".join(f"{folder.path(i)}\n" for i in range(len(folder))))
    monkeypatch.chdir(tmp_path)
    specs = [
        image_folder,
        list_file,
        shards,
        "shards",
        "shards/*.tar",
        f"shards/shard-{{000000..{count - 1:06d}}}.tar",
    ]
    for spec in [*specs, sorted(shards.iterdir()), [list_file]]:
        assert contents(open_source(spec)) == contents(folder), spec
    assert open_source("shards").name == "shards"
    assert open_source(folder) is folder


def test_indices_of_every_form_are_kept_in_the_cache_folder(
    image_folder: Path, tmp_path: Path
) -> None:
    write_shards(open_source(image_folder), tmp_path / "shards")
    (tmp_path / "list.txt").write_text(f"{image_folder / 'circle' / '0000.jpg'}\n")
    for spec in (image_folder, tmp_path / "shards", tmp_path / "list.txt"):
        open_source(spec, cache_dir=tmp_path / "cache")
    assert sorted(file.name.split("-")[0] for file in (tmp_path / "cache").iterdir()) == [
        "folder",
        "list",
        "shards",
    ]


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "patchmine"


def test_several_sources_are_one(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder / "square", tmp_path / "more" / "square")
    shutil.copytree(image_folder / "circle", tmp_path / "more" / "ring")
    both = open_source([image_folder, str(tmp_path / "more")])
    first, second = open_source(image_folder), open_source(tmp_path / "more")
    assert contents(both) == contents(first) + contents(second)
    assert both.path(len(first)) == second.path(0)
    assert both.key(len(first)) == "ring/0000.jpg"
    labels = both.labels()
    assert labels is not None
    assert labels.names == ["circle", "ring", "square", "stripes"]
    names = [labels.names[i] for i in labels.ids]
    assert names == [Path(both.path(i)).parent.name for i in range(len(both))]
    assert both.fingerprint not in (first.fingerprint, second.fingerprint)
    assert contents(pickle.loads(pickle.dumps(both))) == contents(both)
    with pytest.raises(IndexError):
        both.read(len(both))
    assert open_source([image_folder, image_folder / "circle"]).labels() is None


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 4, 4), index, dtype=torch.uint8), 10 * (index % 2)


class Targets(Pairs):
    targets = (2, 0, 0, 1, 2)
    classes = ("ant", "bee", "cow")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise AssertionError("labels need no images")


class Bare(Pairs):
    def __getitem__(self, index: int) -> Any:
        return np.full((4, 4), index, np.uint8)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_torch_datasets() -> None:
    source = open_source(Pairs())
    assert len(source) == 5
    assert source.read(3).unique().tolist() == [3]
    assert source.path(3) == "Pairs[3]"
    pairs, targets = source.labels(), open_source(Targets()).labels()
    assert pairs is not None
    assert pairs.names == ["0", "10"]
    assert pairs.ids.tolist() == [0, 1, 0, 1, 0]
    assert targets is not None
    assert [targets.names[i] for i in targets.ids] == ["cow", "ant", "ant", "bee", "cow"]
    assert open_source(Bare()).labels() is None
    with pytest.raises(UserError, match="Stream: the dataset must have a length"):
        open_source(Stream())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "imagse",
            r"data=imagse: there is no such file or folder \(did you mean images\?\); give a "
            r"folder of images",
        ),
        (
            "images/nothing",
            r"no image and no tar shard in this folder; files that count end in \.jpg, .* or "
            r"\.tar; videos",
        ),
        ("images/1.jpg", r"this is a single image; give the folder"),
        ("images/x.zip", r"a file that ends in \.zip is no source of images; give a folder"),
        ("images/*.jpg", r"a pattern may name tar shards only, but images/1\.jpg is none"),
        (
            "images/s-{00..02}.tar",
            r"the shard images/s-00\.tar cannot be read \(No such file or directory\)",
        ),
        ("images/*.tar", r"there is no such file or folder"),
        ([], r"name at least one source"),
        ("", r"data= is empty; give a folder of images, .*\(data=\. is the current folder\)"),
        (
            "pipe:curl host/x.tar",
            r"data=pipe:curl host/x\.tar: this is no place on a disk; fetch or mount",
        ),
        (7, r"data=7: a int is no source of images"),
    ],
)
def test_a_wrong_source_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, message: str
) -> None:
    (tmp_path / "images" / "nothing").mkdir(parents=True)
    for name in ("1.jpg", "x.zip"):
        (tmp_path / "images" / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_classes_are_numbered_as_another_set_has_them() -> None:
    labels = Labels(np.array([1, 0, 1]), ["bee", "cow"])
    assert labels.numbered_as(["ant", "bee", "cow"]).tolist() == [2, 1, 2]
    with pytest.raises(
        UserError, match=r"the class 'bee' \(1 such\) is not among the 2 known ones"
    ):
        labels.numbered_as(["ant", "cow"])


def test_no_classes_at_all() -> None:
    labels = ClassNames().finish()
    assert labels.names == []
    assert labels.ids.shape == (0,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x-{0..99999999999}.tar", r"stands for more than 100,000 shards"),
        ("x-{0..999}-{0..999}.tar", r"stands for more than 100,000 shards"),
        ("x-{0.." + "9" * 5_000 + "}.tar", r"stands for more than 100,000 shards"),
        ("x-{5..3}.tar", r"the range \{5\.\.3\} runs backwards; write \{3\.\.5\}"),
        ("n" * 300, r"there is no such file or folder"),
        ("a/" * 3_000, r"there is no such file or folder"),
        ("nul\0byte", r"data=nul\\x00byte: this cannot be opened"),
        ("pipe", r"this is a pipe, a socket or a device"),
        ("/dev/null", r"this is a pipe, a socket or a device"),
        ("1.jpg/inside", r"there is no such file or folder"),
        ("~nobody-of-this-name/x", r"there is no such file or folder"),
        ("caf\udce9", r"data=caf\\xe9: there is no such file or folder"),
        ("loop", r"cannot be opened"),
        ("x.mat", r"a file that ends in \.mat is no source of images"),
        ("x.parquet", r"the file x\.parquet cannot be read as Parquet"),
    ],
    ids=lambda text: (
        text[:20].encode("ascii", "backslashreplace").decode() if isinstance(text, str) else None
    ),
)
def test_what_cannot_be_a_source_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    for name in ("1.jpg", "x.mat", "x.parquet"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for kind in ("image", "video"):
        with pytest.raises(UserError, match=message if kind == "image" else "data=") as told:
            open_source(spec, kind)
        str(told.value).encode()


def test_a_user_without_a_home_keeps_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    assert default_cache_dir() is None


def test_patterns_of_shards(tmp_path: Path) -> None:
    for name in ("train-00", "train-01", "val-00"):
        write_tar(tmp_path / f"{name}.tar", f"{name}.jpg")

    def found(pattern: str) -> list[str]:
        source = open_source(f"{tmp_path}/{pattern}")
        return [source.key(index) for index in range(len(source))]

    assert found("{val,train}-00.tar") == ["val-00.jpg", "train-00.jpg"]
    assert found("train-{00..01}.tar") == ["train-00.jpg", "train-01.jpg"]
    assert found("{val,train}-*.tar") == ["val-00.jpg", "train-00.jpg", "train-01.jpg"]
    with pytest.raises(UserError, match="stands for more than 100,000 shards"):
        found("{a,b}-{00000..99999}.tar")


@pytest.mark.parametrize("pattern", ["", "*.tar.gz", "s-{0..0}.tar.gz", "s-0.tar.gz"])
def test_packed_archives_are_refused_with_what_unpacks_them(tmp_path: Path, pattern: str) -> None:
    write_tar(tmp_path / "s-0.tar", "1.jpg")
    (tmp_path / "s-0.tar.gz").write_bytes(gzip.compress((tmp_path / "s-0.tar").read_bytes()))
    (tmp_path / "s-0.tar").unlink()
    with pytest.raises(
        UserError, match=r"s-0.tar.gz is packed with gzip, .*: unpack it with gunzip"
    ):
        open_source(f"{tmp_path}/{pattern}")


class Wrong(Bare):
    """A dataset of the user's with a mistake in it: what it gives for its length, its items, its
    classes.
    """

    def __init__(self, length: Any = 3, item: Any = (b"", 0), **facts: Any) -> None:
        self.length, self.item = length, item
        self.__dict__.update(facts)

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.item, Exception):
            raise self.item
        return self.item


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Wrong(0), "data=Wrong: the dataset has no items"),
        (Wrong(-1), "data=Wrong: its length cannot be read"),
        (
            Wrong(RuntimeError("not downloaded")),
            r"data=Wrong: its length cannot be read \(not downloaded\)",
        ),
        (Wrong(item=KeyError("3.jpg")), r"data=Wrong: the classes cannot be read \('3.jpg'\)"),
        (Wrong(targets=[0, 1]), "data=Wrong: the classes must be 3 whole numbers"),
        (Wrong(targets=[[0], [1, 2], []]), "data=Wrong: the classes cannot be read"),
        (
            Wrong(targets=[0, 1, 7], classes=["a", "b"]),
            "data=Wrong: the classes are 0 to 7, and there are 2 names",
        ),
        (
            Wrong(targets=[0, 1, -1], classes=["a", "b"]),
            "data=Wrong: the classes are -1 to 1, and there are 2 names",
        ),
    ],
)
def test_a_mistake_in_a_dataset_is_one_sentence(dataset: Wrong, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(dataset).labels()


def test_targets_are_the_classes_and_their_digest_names_them(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/3.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    lists = {"a": "cat cat dog", "b": "cat dog dog", "c": "cat cat cow"}
    for name, labels in lists.items():
        files = ("cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
        rows = [f"{file} {label}" for file, label in zip(files, labels.split(), strict=True)]
        (tmp_path / "in" / f"{name}.txt").write_text("\n".join(rows))
    folder = open_source(tmp_path / "in")
    assert [folder.target(index) for index in range(3)] == [0, 0, 1]
    listed = {name: open_source(tmp_path / "in" / f"{name}.txt") for name in lists}
    assert len({source.fingerprint for source in listed.values()}) == 1
    assert len({source.target_digest for source in listed.values()}) == 3
    assert listed["a"].target_digest == folder.target_digest
    assert pickle.loads(pickle.dumps(listed["b"])).target(1) == 1
    (tmp_path / "in" / "stray.jpg").touch()
    bare = open_source(tmp_path / "in")
    assert (bare.target(0), bare.target_digest) == (None, None)


def test_a_source_of_the_users_needs_its_listing_and_reading_only() -> None:
    class Numbers(Source):
        def __len__(self) -> int:
            return 3

        def read(self, index: int) -> np.ndarray:
            return np.full((4, 4, 3), index, np.uint8)

        def path(self, index: int) -> str:
            return f"number {index}"

    own = Numbers("numbers", "fingerprint")
    assert open_source(own) is own
    assert contents(open_source([own, own]))[5].max() == 2
    assert (own.key(1), own.notes, own.target(1)) == ("number 1", (), None)
