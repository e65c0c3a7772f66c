"""Some items of a source with targets of their own."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from patchmine.data.loader import plain_batches
from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.selected import Selected
from patchmine.data.sources.source import open_source
from patchmine.data.views.images import PlainView


@pytest.fixture
def source(image_folder) -> Source:
    return open_source(image_folder)


def classes(source: Source, indices: list[int], targets: list[int], names: str = "ab") -> Selected:
    return Selected(source, np.array(indices), np.array(targets), list(names))


def numbers(source: Source, indices: list[int], names: str = "xy") -> Selected:
    table = np.arange(2 * len(indices), dtype=np.float32).reshape(-1, 2) / 4
    return Selected(source, np.array(indices), table, list(names))


def test_items_are_those_of_the_source_and_targets_its_own(source: Source) -> None:
    chosen = classes(source, [30, 2, 7], [1, 0, 1])
    assert len(chosen) == 3
    for place, index in enumerate([30, 2, 7]):
        assert chosen.read(place) == source.read(index)
        assert chosen.key(place) == source.key(index)
        assert chosen.path(place) == source.path(index)
    assert [chosen.target(place) for place in range(3)] == [1, 0, 1]
    labels = chosen.labels()
    assert (labels.names, labels.ids.tolist()) == (["a", "b"], [1, 0, 1])
    assert chosen.name == source.name
    assert chosen.encoded


def test_numbers_are_no_classes(source: Source) -> None:
    chosen = numbers(source, [5, 6])
    assert chosen.labels() is None
    assert chosen.target(1).tolist() == [0.5, 0.75]
    assert chosen.target(1).dtype == np.float32


def test_targets_must_fit_the_items(source: Source) -> None:
    with pytest.raises(ValueError, match="2 items have 1 targets"):
        classes(source, [1, 2], [0])


def test_fingerprint_is_that_of_the_source_only_where_all_items_are_taken(source: Source) -> None:
    everything = list(range(len(source)))
    whole = classes(source, everything, [0] * len(source))
    assert whole.fingerprint == source.fingerprint
    assert numbers(source, everything).fingerprint == source.fingerprint
    others = [classes(source, chosen, [0] * len(chosen)) for chosen in ([0, 1], [1, 0], [0, 2])]
    others.append(classes(source, everything[::-1], [0] * len(source)))
    assert len({source.fingerprint, *(each.fingerprint for each in others)}) == 5


def test_digest_of_targets_covers_values_type_and_names(source: Source) -> None:
    one = classes(source, [0, 1], [0, 1])
    assert one.target_digest == classes(source, [4, 5], [0, 1]).target_digest
    floats = numbers(source, [0, 1])
    others = [
        classes(source, [0, 1], [1, 1]),
        classes(source, [0, 1], [0, 1], "ac"),
        floats,
        numbers(source, [0, 1], "xz"),
        Selected(source, floats.indices, np.nextafter(floats.targets, np.float32(9)), floats.names),
        Selected(source, floats.indices, np.zeros((2, 1), np.float32), ["x"]),
        classes(source, [0, 1], [0, 0], "x"),
    ]
    assert len({one.target_digest, *(each.target_digest for each in others)}) == 8


def test_a_worker_gets_the_same(source: Source) -> None:
    for chosen in (classes(source, [3, 1], [1, 0]), numbers(source, [3, 1])):
        again = pickle.loads(pickle.dumps(chosen))
        assert again.read(0) == chosen.read(0)
        assert again.fingerprint == chosen.fingerprint
        assert again.target_digest == chosen.target_digest
        assert np.array_equal(again.target(1), chosen.target(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_bring_classes_or_numbers(source: Source, workers: int) -> None:
    view = PlainView(InputSettings(image_size=(16, 16)), 1.0)
    chosen = classes(source, [9, 8, 7], [1, 0, 1]), numbers(source, [9, 8, 7])
    chosen[1].targets.flags.writeable = False  # as those of a mapped file
    found = [
        next(plain_batches(each, view, batch_size=3, workers=workers, targets=True)).target
        for each in chosen
    ]
    assert found[0].dtype == torch.int64
    assert found[0].tolist() == [1, 0, 1]
    assert found[1].dtype == torch.float32
    assert found[1].tolist() == [[0.0, 0.25], [0.5, 0.75], [1.0, 1.25]]
