"""Which images are learnt from and which are tested on."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from patchmine.errors import UserError
from patchmine.evaluate.labelled import open_labelled, split_by_class


def paths(part):
    return {part.source.path(i).split("/", maxsplit=part.source.path(i).count("/") - 1)[-1] for i in part.indices}


def write(folder, classes, count=3):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_one_folder_is_split_class_by_class_and_this_is_said(image_folder):
    data = open_labelled(image_folder)
    assert (len(data.train), len(data.test)) == (30, 6)  # 12 a class: a fifth is 2
    assert not set(data.train.indices) & set(data.test.indices)
    assert np.bincount(data.test.labels[data.test.indices]).tolist() == [2, 2, 2]
    assert all(name.endswith(("0010.jpg", "0011.png")) for name in paths(data.test))
    assert "last fifth" in data.how
    again = open_labelled(image_folder)
    assert np.array_equal(data.test.indices, again.test.indices)


@pytest.mark.parametrize("name", ["test", "val"])
def test_folders_train_and_test_are_used_as_they_are(tmp_path, name):
    write(tmp_path / "train", "ab")
    write(tmp_path / name, "b")
    data = open_labelled(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (6, 3, ["a", "b"])
    assert data.test.labels.tolist() == [1, 1, 1]  # numbered as in train, though class a is absent


def test_a_separate_test_set_wins(tmp_path, image_folder):
    data = open_labelled(image_folder, write(tmp_path, ["square"]))
    assert (len(data.train), len(data.test)) == (36, 3)
    assert data.test.labels.tolist() == [1, 1, 1]


def test_embedded_photographs_bring_both_halves():
    pytest.importorskip("skimage")
    data = open_labelled("embedded:photos")
    assert len(data.train) > len(data.test) > 0
    assert len(data.classes) > 5


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_split_equals_a_loop(share):
    labels = np.random.default_rng(0).integers(0, 6, 50)
    labels[7] = 6  # alone in its class
    first, last = split_by_class(labels, share)
    wanted = []
    for number in range(7):
        places = [i for i in range(50) if labels[i] == number]
        count = 0 if len(places) == 1 else max(1, round(share * len(places)))
        wanted += places[len(places) - count :]
    assert last.tolist() == sorted(wanted)
    assert sorted([*first, *last]) == list(range(50))


def test_thinned_keeps_every_class(image_folder):
    part = open_labelled(image_folder).train.thinned(6)
    assert np.bincount(part.labels[part.indices]).tolist() == [2, 2, 2]


def test_mistakes_are_explained(tmp_path, image_folder):
    flat = tmp_path / "flat"
    shutil.copytree(image_folder / "circle", flat)
    with pytest.raises(UserError, match="has no labels"):
        open_labelled(flat)
    with pytest.raises(UserError, match="only one class"):
        open_labelled(write(tmp_path / "one", "a"))
    with pytest.raises(UserError, match="not among"):
        open_labelled(image_folder, write(tmp_path / "other", "ab"))
    with pytest.raises(UserError, match="one image per class"):
        open_labelled(write(tmp_path / "few", "ab", count=1))
