"""The parquet file of embeddings."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchmine.data.source import open_source
from patchmine.errors import UserError
from patchmine.evaluate.embed import EmbedSettings, embed
from patchmine.evaluate.features import extract
from patchmine.evaluate.targets import open_target


def settings(target, data, out, **more):
    return EmbedSettings(target=str(target), data=str(data), out=str(out), workers=0, batch_size=10, **more)


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
    features = extract(open_target(run_folder), open_source(image_folder), workers=0)
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), features.x.numpy(), rtol=1e-4, atol=1e-5)
    assert "36 embeddings" in said[-1]


def test_a_resnet_is_embedded_as_it_pools(resnet_folder, image_folder, tmp_path):
    embed(settings(resnet_folder, image_folder / "circle", tmp_path / "e.parquet"))
    table = pq.read_table(tmp_path / "e.parquet")
    features = extract(open_target(resnet_folder), open_source(image_folder / "circle"), workers=0)
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), features.x.numpy(), rtol=1e-4, atol=1e-5)


def test_without_classes_there_is_no_label_and_broken_images_have_no_row(run_folder, image_folder, tmp_path):
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
    with pytest.raises(UserError, match="is a folder"):
        embed(settings(run_folder, image_folder, tmp_path))
