from __future__ import annotations

import pickle
import socket
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage", reason="the photographs come with scikit-image")

from patchmine.data.sources import embedded
from patchmine.data.sources.embedded import PhotoCrops
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError


def area(source: PhotoCrops, photograph: int) -> np.ndarray:
    """(height, width) bool: the pixels of a photograph that crops show."""
    with embedded.open_photograph(photograph) as image:
        width, height = image.size
    seen = np.zeros((height, width), bool)
    first, left, _, _ = embedded.half_box(photograph, source.part)
    for cut in source.cuts:
        if cut.photograph == photograph:
            seen[
                first + cut.top : first + cut.top + cut.side,
                left + cut.left : left + cut.left + cut.side,
            ] = True
    return seen


def test_crops_are_balanced_repeatable_and_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    train, test = open_source("embedded:photos/train"), open_source("embedded:photos/test")
    assert (len(train), len(test)) == (3150, 900)
    for source in (train, test):
        labels = source.labels()
        assert labels is not None
        assert labels.names == sorted(labels.names)
        assert len(set(np.bincount(labels.ids).tolist())) == 1
        crop = source.read(len(source) - 1)
        assert crop.shape == (64, 64, 3)
        assert crop.dtype == np.uint8
        again = pickle.loads(pickle.dumps(source))
        assert (again.read(len(source) - 1) == crop).all()
        assert again.fingerprint == source.fingerprint
    assert len(pickle.dumps(train)) < 200_000  # no pixels travel
    assert train.path(0) == "embedded:photos/train/astronaut/00000"
    assert train.fingerprint != test.fingerprint


def test_train_and_test_show_different_halves() -> None:
    train, test = open_source("embedded:photos/train"), open_source("embedded:photos/test")
    assert isinstance(train, PhotoCrops)
    assert isinstance(test, PhotoCrops)
    for photograph in range(len(embedded.PHOTOGRAPHS)):
        seen, unseen = area(train, photograph), area(test, photograph)
        assert not (seen & unseen).any()
        assert seen.mean() > 0.3  # most of a half
    retina = embedded.PHOTOGRAPHS.index("retina.jpg")
    assert area(train, retina).sum() > 0


def test_both_together() -> None:
    both = open_source("embedded:photos")
    assert len(both) == 4050
    labels = both.labels()
    assert labels is not None
    assert len(labels.names) == 15
    assert both.name == "embedded:photos"


@pytest.mark.parametrize(
    ("count", "size"), list(product((1, 20, 70), ((64, 64), (100, 300), (500, 64))))
)
def test_a_grid_has_as_many_squares_as_asked_for_all_inside(
    count: int, size: tuple[int, int]
) -> None:
    corners = embedded.grid(*size, 64, count)
    assert len(corners) == count
    assert all(0 <= top <= size[0] - 64 and 0 <= left <= size[1] - 64 for top, left in corners)


def test_a_misspelt_name_gets_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean embedded:photos/train"):
        open_source("embedded:photo/trian")
    with pytest.raises(UserError, match="did you mean embedded:photos"):
        open_source("embedded:")
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "photo_folder", lambda: tmp_path)
        with pytest.raises(UserError, match=r"carries no readable astronaut\.png"):
            PhotoCrops("train")
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'patchmine\[demo\]'"):
        open_source("embedded:photos")
