"""Datasets of Hugging Face's `datasets`, where that package is at hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchmine.data.sources.source import open_source
from patchmine.errors import UserError

datasets = pytest.importorskip("datasets", reason="needs the package datasets")

CLASSES = ["dog", "cat", "ant"]


def image(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def made(numbers: Any, **columns: Any) -> Any:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    pictures = [{"bytes": image(number), "path": None} for number in numbers]
    values = {"image": pictures, "label": [number % 3 for number in numbers], **columns}
    features |= {name: datasets.Value("int64") for name in columns}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def test_rows_in_any_order_are_stored_images_with_classes() -> None:
    rows = made(range(9))
    source = open_source(rows)
    assert [source.read(index) for index in range(9)] == [image(number) for number in range(9)]
    chosen = open_source(rows.select([5, 2, 7]))
    assert [chosen.read(index) for index in range(3)] == [image(5), image(2), image(7)]
    labels = chosen.labels()
    assert labels is not None
    assert [labels.names[number] for number in labels.ids] == ["ant", "ant", "cat"]
    assert chosen.path(1) == "Dataset[1]"
    with pytest.raises(IndexError):
        chosen.read(3)


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    rows = made(range(9))
    same = [rows.with_format("torch"), made(range(9))]
    rows.save_to_disk(tmp_path / "rows")
    same.append(datasets.load_from_disk(tmp_path / "rows"))
    expected = open_source(rows).fingerprint
    assert {open_source(each).fingerprint for each in same} == {expected}
    others = [made(range(8)), made([0, *range(2, 9), 1])]
    assert expected not in {open_source(each).fingerprint for each in others}


def test_a_transform_is_not_used_and_that_is_told() -> None:
    (note,) = open_source(made(range(2)).with_transform(lambda rows: rows)).notes
    assert "the dataset's own transform is not used" in note


def test_a_picture_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(image(3))
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "x.png"), str(tmp_path / "gone.png")]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    source = open_source(rows)
    assert source.read(0) == image(3)
    with pytest.raises(OSError, match=r"gone\.png"):
        source.read(1)


def test_what_has_no_rows_or_no_images_is_refused() -> None:
    rows = made(range(2))
    for other in (datasets.DatasetDict(train=rows), rows.to_iterable_dataset()):
        with pytest.raises(UserError, match=r"no rows by number.*; give one part"):
            open_source(other)
    with pytest.raises(UserError, match="the dataset has no rows"):
        open_source(rows.select([]))
    with pytest.raises(UserError, match=r"no column holds images .* label \(int64\)"):
        open_source(rows.select_columns(["label"]))
    twice = rows.add_column("mask", [b"1", b"2"])
    assert open_source(twice).read(0) == image(0)  # the one that is called an image
