"""Numbers of features without labels: spread and collapsed ones, neighbours that stay and go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchmine.evaluate.features import Features
from patchmine.evaluate.label_free import Neighbours, label_free


def features(x: Tensor) -> Features:
    return Features(x, None, torch.arange(len(x)))


@pytest.fixture
def spread() -> Tensor:
    return torch.randn(500, 16, generator=torch.Generator().manual_seed(0))


def test_features_in_all_directions_have_full_rank_and_deviation(spread: Tensor) -> None:
    found = label_free(features(spread))
    assert 15.5 < found["rankme"] <= 16.001
    assert found["feature_std"] == pytest.approx(1 / math.sqrt(16), rel=0.02)


def test_collapsed_features_have_rank_one_and_no_deviation(spread: Tensor) -> None:
    lengths = spread[:, :1].abs() + 1  # they differ in length only
    found = label_free(features(lengths * spread[0]))
    assert found["rankme"] == pytest.approx(1, abs=0.01)
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)


def test_neighbours_are_kept_by_turning_and_lost_by_drawing_anew(spread: Tensor) -> None:
    start = Neighbours.of(features(spread), "images")
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    assert Neighbours.of(features(3 * spread @ turn), "images").kept(start) == pytest.approx(
        100, abs=1
    )
    anew = torch.randn(500, 16, generator=torch.Generator().manual_seed(2))
    kept = Neighbours.of(features(anew), "images").kept(start)
    assert kept == pytest.approx(100 * 10 / 499, abs=1)


@pytest.mark.parametrize("count", [3, 8, 40])
def test_of_few_images_not_all_are_neighbours(spread: Tensor, count: int) -> None:
    _, k = Neighbours.of(features(spread[:count]), "images").places.shape
    assert 1 <= k < count - 1


def test_what_is_written_is_read_and_damage_is_nothing(spread: Tensor, tmp_path: Path) -> None:
    own, path = (
        Neighbours.of(features(spread), "images"),
        tmp_path / "monitor" / "start.safetensors",
    )
    assert Neighbours.read(path) is None
    own.write(path)
    found = Neighbours.read(path)
    assert found is not None
    assert own.kept(found) == 100
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:100])
    assert Neighbours.read(path) is None


def test_neighbours_of_other_images_are_not_compared(spread: Tensor) -> None:
    own = Neighbours.of(features(spread), "images")
    assert own.kept(Neighbours.of(features(spread), "others")) is None
    assert own.kept(Neighbours.of(features(spread[1:]), "images")) is None
    moved = Features(spread, None, torch.arange(len(spread)) + 1)  # the first cannot be read
    assert own.kept(Neighbours.of(moved, "images")) is None
