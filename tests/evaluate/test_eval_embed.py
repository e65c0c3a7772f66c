"""The parquet file of embeddings."""

from __future__ import annotations

import csv
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from patchmine.cli.commands import read_words
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.evaluate.embed import embed
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.evaluate.features import extract
from patchmine.evaluate.settings import EmbedSettings


def settings(target, data, out, **more):
    return EmbedSettings(
        target=str(target), data=str(data), out=str(out), workers=0, batch_size=10, **more
    )


def test_table_holds_path_index_label_and_the_features(run_folder, image_folder, tmp_path):
    out = tmp_path / "new" / "e.parquet"
    said = []
    assert embed(settings(run_folder, image_folder, out), said.append) == out
    table = pq.read_table(out)
    assert table.schema.names == ["path", "index", "label", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 24)
    assert table["index"].to_pylist() == list(range(36))
    assert table["label"].to_pylist()[::12] == ["circle", "square", "stripes"]
    assert table["path"][0].as_py().endswith("circle/0000.jpg")
    assert pq.ParquetFile(out).num_row_groups == 4
    features = extract(open_evaluated(run_folder), open_source(image_folder), workers=0)
    np.testing.assert_allclose(
        np.array(table["embedding"].to_pylist()), features.x.numpy(), rtol=1e-4, atol=1e-5
    )
    assert "36 embeddings" in said[-1]


def test_a_resnet_is_embedded_as_it_pools(resnet_folder, image_folder, tmp_path):
    embed(settings(resnet_folder, image_folder / "circle", tmp_path / "e.parquet"))
    table = pq.read_table(tmp_path / "e.parquet")
    features = extract(
        open_evaluated(resnet_folder), open_source(image_folder / "circle"), workers=0
    )
    np.testing.assert_allclose(
        np.array(table["embedding"].to_pylist()), features.x.numpy(), rtol=1e-4, atol=1e-5
    )


def test_without_classes_there_is_no_label_and_broken_images_have_no_row(
    run_folder, image_folder, tmp_path
):
    shutil.copytree(image_folder / "circle", tmp_path / "flat")
    (tmp_path / "flat" / "0002.jpg").write_bytes(b"")
    embed(settings(run_folder, tmp_path / "flat", tmp_path / "e.parquet", max_bad_share=0.5))
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.schema.names == ["path", "index", "embedding"]
    assert table["index"].to_pylist() == [i for i in range(12) if i != 2]


def test_a_failure_leaves_the_earlier_file_alone(run_folder, image_folder, tmp_path):
    shutil.copytree(image_folder / "circle", tmp_path / "flat")
    for path in (tmp_path / "flat").glob("*.png"):
        path.write_bytes(b"")
    out = tmp_path / "e.parquet"
    out.write_bytes(b"earlier work")
    with pytest.raises(UserError, match="max_bad_share"):
        embed(settings(run_folder, tmp_path / "flat", out))
    assert out.read_bytes() == b"earlier work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.parquet", "flat", "run"]
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(UserError, match="a folder has that name"):
        embed(settings(run_folder, image_folder, tmp_path / "f.csv"))


@pytest.mark.parametrize("labelled", [True, False])
def test_every_format_holds_the_same_numbers(labelled, run_folder, image_folder, tmp_path):
    data = image_folder if labelled else image_folder / "circle"
    for ending in ("parquet", "csv", "npz"):
        embed(settings(run_folder, data, tmp_path / f"e.{ending}"))
    table = pq.read_table(tmp_path / "e.parquet")
    x = np.stack(table["embedding"].to_numpy())
    with np.load(tmp_path / "e.npz") as arrays:  # no pickles in it
        assert set(arrays) == {"path", "index", "embedding"} | ({"label"} if labelled else set())
        assert arrays["embedding"].dtype == np.float32
        assert np.array_equal(arrays["embedding"], x)
        assert arrays["path"].tolist() == table["path"].to_pylist()
        assert arrays["index"].tolist() == table["index"].to_pylist()
        assert not labelled or arrays["label"].tolist() == table["label"].to_pylist()
    with (tmp_path / "e.csv").open(newline="", encoding="utf-8") as handle:
        head, *rows = list(csv.reader(handle))
    first = 3 if labelled else 2
    assert head == [
        "path",
        "index",
        *(["label"] if labelled else []),
        *(f"f{i}" for i in range(24)),
    ]
    assert np.array_equal(np.array([row[first:] for row in rows], np.float32), x)
    assert [row[0] for row in rows] == table["path"].to_pylist()
    assert not labelled or [row[2] for row in rows] == table["label"].to_pylist()


@pytest.mark.parametrize("ending", ["parquet", "csv", "npz"])
def test_features_that_are_not_finite_leave_no_file(ending, run_folder, image_folder, tmp_path):
    file = run_folder / "export" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["patch_embed.proj.weight"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"not finite for 10 of 10 images, the first of them .*0000\.jpg"
    ):
        embed(settings(run_folder, image_folder, tmp_path / f"e.{ending}"))
    tensors["patch_embed.proj.weight"].fill_(np.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight"):
        embed(settings(run_folder, image_folder, tmp_path / f"e.{ending}"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("ending", ["parquet", "csv", "npz"])
def test_names_of_any_bytes_are_written(ending, run_folder, image_folder, tmp_path):
    folder = tmp_path / "odd" / ("n" * 200)
    folder.mkdir(parents=True)
    for name in (b"caf\xe9.jpg", b"two\nlines.jpg", b'z, "quoted".jpg'):
        shutil.copy(image_folder / "circle" / "0000.jpg", os.fsencode(folder) + b"/" + name)
    embed(settings(run_folder, tmp_path / "odd", tmp_path / f"e.{ending}"))
    if ending == "npz":
        with np.load(tmp_path / "e.npz") as arrays:
            paths = arrays["path"].tolist()
    elif ending == "csv":
        with (tmp_path / "e.csv").open(newline="", encoding="utf-8") as handle:
            paths = [row["path"] for row in csv.DictReader(handle)]
    else:
        paths = pq.read_table(tmp_path / "e.parquet")["path"].to_pylist()
    names = [path.removeprefix(f"{folder}/") for path in paths]
    assert sorted(names) == [r"caf\xe9.jpg", r"two\nlines.jpg", 'z, "quoted".jpg']


@pytest.mark.parametrize("name", ["e", "e.txt", "e.parquet.gz", "e.onnx", "folder/", ".csv"])
def test_an_ending_that_says_no_format_is_refused(name):
    with pytest.raises(
        UserError, match=r"must be the name of a file that ends in \.parquet or \.csv or \.npz"
    ):
        read_words(
            EmbedSettings, ["run", "data=x", f"out={name}"], command="embed", first=["target"]
        )


def test_a_place_that_cannot_be_written_is_one_sentence(run_folder, image_folder, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(
        UserError, match=r"out=.*file/below/e\.csv cannot be written .*a part of its path is a file"
    ):
        embed(settings(run_folder, image_folder, tmp_path / "file" / "below" / "e.csv"))
    with pytest.raises(UserError, match="choose a shorter name"):
        embed(settings(run_folder, image_folder, tmp_path / ("n" * 400 + ".csv")))
