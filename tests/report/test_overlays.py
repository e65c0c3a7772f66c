"""Colours of classes, and classes over pictures."""

from __future__ import annotations

import numpy as np
import pytest

from patchmine.report import overlays
from patchmine.report.overlays import class_colours, overlay


def test_colours_are_the_palettes_or_far_from_each_other() -> None:
    names = ["ground", "tree"]
    own = {"ground": (1, 2, 3), "ignore": (0, 0, 0), "tree": (4, 5, 6)}
    assert class_colours(names, own).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert len(class_colours(names, {"ground": 0, "tree": 255})) == 2
    colours = class_colours([str(number) for number in range(40)], {}).astype(int)
    distances = np.abs(colours[:, None] - colours[None]).max(-1)
    assert distances[~np.eye(40, dtype=bool)].min() >= 40
    assert (class_colours(names, {}) == colours[:2]).all()  # a class more changes no other
    assert class_colours([], {}).shape == (0, 3)


def test_an_overlay_is_half_the_picture_and_has_borders() -> None:
    picture = np.full((4, 6, 3), 100, np.uint8)
    classes = np.zeros((4, 6), np.uint8)
    classes[:, 3:] = 1
    drawn = overlay(picture, classes, np.array([(0, 0, 0), (200, 100, 0)], np.uint8))
    assert drawn[0, 0].tolist() == [50, 50, 50]
    assert drawn[2, 3].tolist() == [200, 100, 0]
    assert drawn[2, 4].tolist() == [150, 100, 50]


def test_a_large_picture_is_painted_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (3, 23, 9), np.uint8).transpose(1, 2, 0)
    classes = generator.integers(0, 3, (23, 9)).repeat(2, axis=1)[:, :9].astype(np.uint8)
    colours = class_colours(list("abc"), {})
    whole = overlay(picture, classes, colours)
    monkeypatch.setattr(overlays, "_ROWS", 5)
    assert (overlay(picture, classes, colours) == whole).all()
