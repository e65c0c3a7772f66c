"""The nearest-neighbour classifier of DINO on frozen features: nothing is trained, it is quick."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchmine.errors import Say, silent
from patchmine.evaluate.evaluated import Evaluated
from patchmine.evaluate.features import FeatureLoop, Features, Reader, UnitReader, device_of
from patchmine.evaluate.labelled import LabelledData
from patchmine.evaluate.measure import (
    Learned,
    Result,
    choose_pooling,
    measure,
    models_of,
    opened,
    score,
)
from patchmine.evaluate.neighbours import knn_votes
from patchmine.evaluate.paired import accuracy_interval
from patchmine.evaluate.settings import KnnSettings, ReadingSettings, VoteSettings
from patchmine.models.onednn import fast_linear
from patchmine.train.engine import Engine

_MOST_TRAIN, _MOST_TEST = 10_000, 2_000  # items of an evaluation during training, to cost little


def evaluate_knn(settings: KnnSettings, say: Say = silent) -> Result:
    """Weighted vote of the k nearest training images, DINO's protocol.

    Args:
        settings: model, data and protocol; k is at most the number of training images.
        say: hears about the progress.

    Returns:
        ``top1`` and ``top5`` in percent at ``settings.k``, ``by_k`` for every k, and what was read.

    Raises:
        UserError: the model or the data cannot be used.
    """
    pooling, models = settings.pooling, models_of(settings, opened(settings), say)
    plain = {name: Reader(model) for name, model in models.items()}
    choose_pooling(plain, pooling, say)
    readers: dict[str, Reader] = {
        name: UnitReader(model, plain[name].choose(pooling)) for name, model in models.items()
    }
    how: Any = dict(pooling=pooling, neighbours=settings.neighbours)
    learn = partial(learn_knn, settings, device_of(settings), **how)
    return measure(settings, {"knn": learn}, say, readers)[0]


def learn_knn(
    settings: VoteSettings,
    device: torch.device,
    reader: Reader,
    train: Features,
    num_classes: int,
    *,
    pooling: str = "cls",
    neighbours: Sequence[int] | None = None,
) -> Learned:
    """The vote of the k nearest rows, and of each of ``neighbours``, told as by_k."""
    pooling, temperature = reader.choose(pooling), settings.temperature
    chosen = min(settings.k, len(train))
    ks = sorted({chosen, *(min(k, len(train)) for k in neighbours or ())})
    assert train.labels is not None, "labelled data has labels"
    labels = train.labels.to(device)
    bank = reader.unit_rows(train.x, pooling).to(device)

    def votes(rows: Tensor) -> dict[str, Tensor]:
        query = reader.pooled(rows.to(device), pooling)
        found = knn_votes(bank, labels, query, num_classes, ks, temperature)
        return {str(each): votes for each, votes in found.items()}

    told = {"settings": {"k": chosen, "pooling": pooling, "temperature": temperature}}
    return Learned(votes, str(chosen), told, None if neighbours is None else "by_k")


def knn_in_training(
    evaluated: Evaluated,
    data: LabelledData,
    reading: ReadingSettings | None = None,
    engine: Engine | None = None,
) -> Result:
    """Accuracy of an encoder in training on a share of ``data``; every process must call this.

    ``top1_interval`` holds the ends of its 95 % interval.
    """
    assert evaluated.encoder is not None, "an encoder in training"
    device = next(evaluated.encoder.parameters()).device
    readers = {"": Reader(evaluated)}
    loop = FeatureLoop(readers, reading or ReadingSettings(), device, engine=engine)
    learned: dict[tuple[str, str], Learned] = {}
    with fast_linear():
        train = loop.table(data.train.sampled(_MOST_TRAIN), "train")[""]

        def learn() -> None:
            num_classes = len(data.classes)
            learned["", ""] = learn_knn(VoteSettings(), device, readers[""], train, num_classes)

        loop.in_all_processes(learn)
        found = score(loop, data.test.sampled(_MOST_TEST), learned, "test")
    accuracy = found.accuracies["", ""][learned["", ""].chosen]
    return {**accuracy, "top1_interval": accuracy_interval(accuracy["top1"], found.tested)}
