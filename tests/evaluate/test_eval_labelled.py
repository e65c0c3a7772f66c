"""Which images are learnt from and which are tested on."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.evaluate.labelled import everything, open_labelled, split_by_class, stratified


def paths(part):
    return {
        part.source.path(i).split("/", maxsplit=part.source.path(i).count("/") - 1)[-1]
        for i in part.indices
    }


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


def test_a_sample_of_classes_in_turn_keeps_all_classes():
    """Every tenth of 20,000 items of ten classes in turn was one class."""
    for labels in (np.arange(20_000) % 10, np.arange(20_000) // 2_000):
        drawn = stratified(labels, 2_000)
        assert len(np.unique(drawn)) == 2_000
        assert np.bincount(labels[drawn]).tolist() == [200] * 10
        assert np.array_equal(drawn, np.sort(drawn))
        assert np.array_equal(drawn, stratified(labels, 2_000))
        assert not np.array_equal(drawn, stratified(labels, 2_000, seed=1))
        assert len(np.unique(np.diff(drawn))) > 5, "a draw, no even spacing"


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_each_class_keeps_its_share_and_at_least_one(sizes, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = max(1, round(share * len(labels)))
    found = np.bincount(labels[stratified(labels, count, seed)], minlength=len(sizes))
    assert found.sum() == count
    if count < len(sizes):
        assert set(found.tolist()) == {0, 1}
        assert min(s for s, n in zip(sizes, found, strict=True) if n) >= max(
            s for s, n in zip(sizes, found, strict=True) if not n
        )
    else:
        assert found.min() >= 1
        ideal = count * np.array(sizes) / len(labels)
        assert (np.abs(found - ideal) <= 1 + np.maximum(0, 1 - ideal).sum()).all()


def test_parts_are_sampled_with_and_without_labels(image_folder):
    part = open_labelled(image_folder).train.sampled(6)
    assert np.bincount(part.labels[part.indices]).tolist() == [2, 2, 2]
    bare = everything(open_source(image_folder / "circle"))
    assert bare.labels is None
    assert len(set(bare.sampled(5).indices.tolist())) == 5
    assert bare.sampled(99) is bare


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


def says(*given):
    with pytest.raises(UserError) as error:
        open_labelled(*given)
    return str(error.value)


def test_classes_that_are_tested_and_not_learnt(tmp_path, image_folder):
    other = write(tmp_path / "other", ["circel", "square", "zebra"])
    said = says(image_folder, other)
    assert f"the class 'circel' of test={other} (circel/0.png; 2 such) is not" in said
    assert "is not among the 3 classes" in said
    assert f"data={image_folder}; near: 'circle'" in said
    said = says(image_folder, write(tmp_path / "more", ["zebra"]))
    assert "they are 'circle', 'square', 'stripes'" in said


def test_classes_that_are_learnt_and_not_tested_are_told(tmp_path, image_folder):
    data = open_labelled(image_folder, write(tmp_path / "one", ["square"]))
    assert "2 classes have no image to be tested on: 'circle', 'stripes'" in data.how
    folder = write(tmp_path / "some", "ab")
    write(folder, ["rare"], count=1)
    data = open_labelled(folder)
    assert "1 class has one image, which is learnt from and never tested: 'rare'" in data.how
    assert set(data.train.labels[data.train.indices]) == {0, 1, 2}
    assert "class" not in open_labelled(image_folder).how.replace("each class", "")


def test_a_class_in_two_spellings(tmp_path, image_folder):
    twice = write(tmp_path / "twice", ["Cat", "cat", "dog"])
    said = says(twice)
    assert said.startswith(f"data={twice}: the classes 'Cat', 'cat' differ only in case")
    test = write(tmp_path / "test", ["square", "square "])
    assert says(image_folder, test).startswith(f"test={test}: the classes 'square', 'square ' ")
    assert open_labelled(write(tmp_path / "letters", "aA")).classes == ["A", "a"]
