"""Which items stand for a large source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_files import PNG, write_files
from torch.utils.data import Dataset

from patchmine.data.inspect import inspect
from patchmine.data.loader import data_statistics
from patchmine.data.sampling import changed_stamps, content_stamps, spread_indices
from patchmine.data.settings import InputSettings
from patchmine.data.sources.combine import DatasetSource
from patchmine.data.sources.source import open_source


class BlackAndWhiteInTurn(Dataset[torch.Tensor]):
    """600 images: a black one, then a white one, and so on."""

    def __len__(self) -> int:
        return 600

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1, 2, 2), 255 * (index % 2), dtype=torch.uint8)


def test_statistics_and_inspect_see_both_halves_of_a_list_that_alternates() -> None:
    source = DatasetSource(BlackAndWhiteInTurn())
    mean, _ = data_statistics(source, InputSettings(channels=1), sample=60)
    assert 0.3 < float(mean) < 0.7
    assert 0.3 < inspect(source, sample=60).mean[0] < 0.7


@pytest.mark.parametrize("period", [2, 7, 10, 24, 1000])
def test_a_list_that_goes_through_its_classes_in_turn_gives_all_of_them(period: int) -> None:
    classes = np.arange(20_000) % period
    chosen = classes[spread_indices(20_000, 2_000)]
    counts = np.bincount(chosen % 10, minlength=10)
    assert len(np.unique(chosen)) >= 0.85 * period
    assert counts[: min(10, period)].min() > 0.7 * 2_000 / min(10, period)


def test_the_choice_is_ascending_without_repeats_and_repeatable() -> None:
    chosen = spread_indices(1_000, 100, seed=3)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < 1_000
    assert np.array_equal(chosen, spread_indices(1_000, 100, seed=3))
    assert not np.array_equal(chosen, spread_indices(1_000, 100, seed=4))


def test_more_wanted_items_hold_the_fewer_ones() -> None:
    assert set(spread_indices(500, 20)) < set(spread_indices(500, 60))


def test_stamps_tell_contents_and_nothing_else(tmp_path: Path) -> None:
    write_files(tmp_path, *(f"{number}.jpg" for number in range(100)))
    before = content_stamps(open_source(tmp_path))
    assert len(before) == 64
    for number in range(100):
        (tmp_path / f"{number}.jpg").touch()
    assert changed_stamps(before, content_stamps(open_source(tmp_path))) == 0
    write_files(tmp_path, *(f"{number}.jpg" for number in range(0, 100, 2)), data=PNG)
    assert 20 < changed_stamps(before, content_stamps(open_source(tmp_path))) < 44
    source = open_source(tmp_path)
    for number in range(100):
        (tmp_path / f"{number}.jpg").unlink()
    assert changed_stamps(before, content_stamps(source)) == 0  # unreadable ones are told elsewhere
    assert content_stamps(DatasetSource(BlackAndWhiteInTurn())) == []


@pytest.mark.parametrize("before", [None, 7, [], ["a"], "ab", [1, 2], [None, None], [["x"], {}]])
def test_stamps_that_are_none_tell_nothing(before: object) -> None:
    assert changed_stamps(before, ["", ""]) == 0


@pytest.mark.parametrize(("count", "wanted"), [(0, 5), (3, 3), (3, 10), (7, 0)])
def test_small_sources(count: int, wanted: int) -> None:
    assert spread_indices(count, wanted).tolist() == list(range(min(count, wanted)))
