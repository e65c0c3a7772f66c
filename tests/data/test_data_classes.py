"""Classes by folders, with one rule for folders that divide the data."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_files import write_files, write_tar

from patchmine.data.inspect import inspect
from patchmine.data.sources.contract import division_of, folder_classes, is_divided
from patchmine.data.sources.source import open_source
from patchmine.evaluate.labelled import everything, open_labelled


def classes(paths: list[str]) -> list[str] | None:
    labels = folder_classes(paths)
    return None if labels is None else [labels.names[number] for number in labels.ids]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["cat/1", "dog/deep/2"], ["cat", "dog"]),
        (["train/cat/1", "val/cat/2", "val/dog/deep/3"], ["cat", "cat", "dog"]),
        (["Train/cat/1", "TEST/dog/2"], ["cat", "dog"]),
        (["train/cat/1", "train/dog/2"], ["cat", "dog"]),
        (["train/1", "val/2"], None),
        (["train/cat/1", "val/2"], None),
        (["train/cat/1", "test/dog/1", "extra/cat/2"], None),
        (["train/1", "bus/2"], ["train", "bus"]),  # vehicles
        (["cat/1", "2"], None),
        (["1", "2"], None),
        ([], None),
    ],
)
def test_the_class_of_a_path(paths: list[str], expected: list[str] | None) -> None:
    assert classes(paths) == expected


def test_divisions() -> None:
    assert division_of(["test", "train", "val"]) == ("train", "test")
    assert division_of(["Validation", "Training"]) == ("Training", "Validation")
    assert division_of(["train", "other"]) is None
    assert is_divided(["train", "val", "other"])
    assert not is_divided(["cat", "val"])
    assert not is_divided([])


def test_every_command_takes_the_same_classes_from_a_divided_set(tmp_path: Path) -> None:
    files = [
        f"{part}/{name}/{number}.jpg"
        for part in ("train", "val")
        for name in ("cat", "dog")
        for number in range(3)
    ]
    folder = write_files(tmp_path / "in", *files)
    archive = write_tar(tmp_path / "x.tar", *files)
    evaluated = open_labelled(folder)
    assert evaluated.classes == ["cat", "dog"]
    assert (len(evaluated.train), len(evaluated.test)) == (6, 6)
    for place in (folder, archive):
        source = open_source(place)
        assert inspect(source, sample=0).classes == {"cat": 6, "dog": 6}
        assert source.labels().names == ["cat", "dog"]  # which `embed` writes beside each image
        assert len(everything(source)) == 12


def test_folders_of_frames_by_the_same_rule(tmp_path: Path) -> None:
    write_files(tmp_path, "train/run/a/1.jpg", "train/walk/b/1.jpg", "test/run/c/1.jpg")
    labels = open_source(tmp_path, "video").labels()
    assert [labels.names[number] for number in labels.ids] == ["run", "run", "walk"]
