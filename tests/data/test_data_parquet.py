"""Images in Parquet files: columns by their metadata, types or names, and rows at any place."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loading import seen, start
from PIL import Image

from patchmine.data.sharding import write_shards
from patchmine.data.sources import parquet, stored
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import TrainView
from patchmine.errors import UserError

CLASSES = ["dog", "cat", "ant"]  # not in order, as a data set may have them


def image(number: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(
    file: Path,
    numbers: range,
    rows: int = 3,
    labels: dict[str, list[Any]] | None = None,
    images: str = "image",
    **features: Any,
) -> Path:
    """A file as Hugging Face's `datasets` writes it: structs of bytes and path, and metadata."""
    labels = {"label": [number % 3 for number in numbers]} if labels is None else labels
    features = features or {"label": {"names": CLASSES, "_type": "ClassLabel"}}
    features |= {images: {"_type": "Image"}}
    pictures = [{"bytes": image(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table({"id": list(map(str, numbers)), images: pictures, **labels})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=rows)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in two files of row groups of three rows."""
    place = tmp_path / "set"
    place.mkdir()
    write(place / "train-00000-of-00002.parquet", range(7))
    write(place / "train-00001-of-00002.parquet", range(7, 10))
    return place


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough to be known by their times."""
    monkeypatch.setattr("patchmine.data.sources.index.RECENT", -(1 << 62))


@pytest.mark.usefixtures("settled")
def test_a_folder_a_file_and_a_pattern(folder: Path) -> None:
    whole = open_source(folder)
    order = np.random.default_rng(0).permutation(10).tolist()
    assert [whole.read(index) for index in order] == [image(index) for index in order]
    assert whole.notes == ()
    labels = whole.labels()
    assert labels is not None
    assert labels.names == ["ant", "cat", "dog"]
    assert [labels.names[number] for number in labels.ids] == [CLASSES[i % 3] for i in range(10)]
    second = folder / "train-00001-of-00002.parquet"
    assert whole.path(8) == f"{second}:1"
    assert whole.key(8) == "train-00001-of-00002/1"
    assert open_source(second).read(1) == image(8)
    assert open_source(f"{folder}/train-*.parquet").fingerprint == whole.fingerprint
    assert open_source(f"{folder}::image").fingerprint == whole.fingerprint
    assert open_source(second).fingerprint != whole.fingerprint
    assert whole.identity(8) != whole.identity(7)
    with pytest.raises(IndexError):
        whole.read(10)


@pytest.mark.usefixtures("settled")
def test_the_index_is_kept_until_a_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_source(folder, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_index", None)
        again = open_source(folder, cache_dir=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert pickle.loads(pickle.dumps(again)).read(9) == image(9)
    write(folder / "train-00001-of-00002.parquet", range(7, 12))
    assert len(open_source(folder, cache_dir=tmp_path / "cache")) == 12
    stored._opened.cache_clear()
    with pytest.raises(OSError, match="the file was changed meanwhile"):
        again.read(9)


def test_files_of_any_writer(tmp_path: Path) -> None:
    pictures = [image(number) for number in range(4)]
    names = ["b", "a", "b", "c"]
    table = pa.table({"jpg": pictures, "class": pa.array(names).dictionary_encode(), "n": range(4)})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd")
    source = open_source(tmp_path / "x.parquet")
    assert [source.read(index) for index in range(4)] == pictures
    labels = source.labels()
    assert labels is not None
    assert [labels.names[number] for number in labels.ids] == names
    numbered = open_source(f"{tmp_path / 'x.parquet'}::n").labels()
    assert numbered is not None
    assert numbered.names == ["0", "1", "2", "3"]
    pq.write_table(table.select(["jpg"]), tmp_path / "x.parquet")
    assert open_source(tmp_path / "x.parquet").labels() is None


def test_columns_that_may_both_be_meant(tmp_path: Path) -> None:
    classes = {"names": ["x", "y"], "_type": "ClassLabel"}
    labels = {"fine_label": [0, 1, 0], "coarse_label": [1, 1, 0]}
    file = write(
        tmp_path / "x.parquet", range(3), labels=labels, fine_label=classes, coarse_label=classes
    )
    with pytest.raises(
        UserError,
        match=r"\(fine_label, coarse_label\); name one behind ::, as in .*x.parquet::image,fine_label",
    ):
        open_source(file).labels()
    coarse = open_source(f"{file}::coarse_label").labels()
    assert coarse is not None
    assert coarse.ids.tolist() == [1, 1, 0]
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), file)
    with pytest.raises(
        UserError,
        match=r"several columns may be the images \(a, b\); name one behind ::, as in .*::a",
    ):
        open_source(file)
    assert open_source(f"{file}::b").read(0) == b"2"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"id": [1], "text": ["x"]},
            r"no column holds images .*; the columns are id \(int64\), text \(string\)",
        ),
        (
            {"image": [{"path": "x.png"}]},
            r"no column holds images .* image \(struct<path: string>\)",
        ),
        ({"image": pa.array([], pa.binary())}, "there are no rows in it"),
    ],
)
def test_files_without_images(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.parquet")


def test_what_cannot_be_read_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"lable is no column of images or classes \(did you mean label\?\)"
    ):
        open_source(f"{folder}::lable")
    with pytest.raises(UserError, match="Parquet files hold images here, no videos"):
        open_source(folder, "video")
    with pytest.raises(UserError, match=r"no such file or folder \(did you mean .*train-00000"):
        open_source(folder / "train-0000-of-00002.parquet")
    pq.write_table(pa.table({"jpg": [b"1"]}), folder / "train-00002.parquet")
    with pytest.raises(UserError, match=r"train-00002\.parquet lacks column image\.bytes"):
        open_source(folder)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more than that")
    with pytest.raises(
        UserError, match=r"broken\.parquet cannot be read as Parquet \(.*write it again"
    ):
        open_source(broken)


@pytest.mark.parametrize(("label", "told"), [(-1, "-1"), (None, "None"), (3, "3")])
def test_rows_without_a_class(tmp_path: Path, label: int | None, told: str) -> None:
    file = write(tmp_path / "x.parquet", range(3), labels={"label": [0, label, 1]})
    with pytest.raises(
        UserError, match=rf"column label holds no class but {told} at .*x\.parquet:1"
    ):
        open_source(file).labels()
    write(file, range(3), labels={"label": [-1, -1, -1]})
    assert open_source(file).labels() is None


def test_a_row_without_an_image_is_a_broken_one(tmp_path: Path) -> None:
    pictures = [{"bytes": image(0), "path": None}, {"bytes": None, "path": "x.png"}, None]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.read(0) == image(0)
    for index in (1, 2):
        with pytest.raises(OSError, match=r"column image\.bytes is empty there"):
            source.read(index)


def test_parts_that_are_read_together_are_told(folder: Path) -> None:
    write(folder / "test-00000-of-00001.parquet", range(3))
    (note,) = open_source(folder).notes
    assert note.endswith(
        "files of train and of test are read together: name one part by a pattern, as in train-*.parquet"
    )


def test_row_groups_beyond_the_memory_are_read_in_pieces(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "HELD", 1000)
    monkeypatch.setattr(parquet, "_PIECE", 1000)
    source = open_source(folder)
    for order in (range(10), reversed(range(10)), (3, 3, 5, 0, 9)):
        for index in order:
            assert source.read(index) == image(index)


def test_few_row_groups_stay_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "HELD", 3 * 3 * len(image(0)))
    source = open_source(folder)
    assert [source.read(index) for index in range(10)] == [image(index) for index in range(10)]
    assert isinstance(source, parquet.ParquetSource)
    assert source._reader is not None
    assert len(source._reader._groups) == 2


def test_workers_and_shards_give_the_same_batches(folder: Path, tmp_path: Path) -> None:
    source = open_source(folder)
    source.read(0)  # which opens a file, whose position forked workers must not share
    write_shards(source, tmp_path / "shards")
    view = TrainView(seen(16), 4)
    several = start(source, view, batch_size=4, steps_per_epoch=2, total_steps=4, workers=2)
    shards = start(
        open_source(tmp_path / "shards"), view, batch_size=4, steps_per_epoch=2, total_steps=4
    )
    for one, other in zip(several, shards, strict=True):
        assert torch.equal(one.views[0], other.views[0])
