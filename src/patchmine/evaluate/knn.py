"""The nearest-neighbour classifier of DINO on frozen features: nothing is trained, so it is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchmine.evaluate.features import Features, Reader, Reading, extract_all
from patchmine.evaluate.labelled import LabelledData, Part
from patchmine.evaluate.measure import Result, measure, reading_of
from patchmine.evaluate.neighbours import Accuracy, knn_accuracy
from patchmine.evaluate.progress import Say, silent
from patchmine.evaluate.settings import HEADLINE, KnnSettings
from patchmine.evaluate.targets import Target
from patchmine.models.onednn import fast_linear

_STAND_IN = {"mean": "the mean of its patches", "pooled": "what it pools itself"}


def evaluate_knn(settings: KnnSettings, say: Say = silent) -> Result:
    """Weighted vote of the k nearest training images, DINO's protocol.

    Args:
        settings: target, data and protocol; k is at most the number of training images.
        say: hears about the progress.

    Returns:
        ``top1`` and ``top5`` in percent at ``settings.k``, ``by_k`` for every k, and what was read.

    Raises:
        UserError: the target or the data cannot be used.
    """

    def score(reader: Reader, train: Features, test: Features, num_classes: int) -> Result:
        pooling = reader.choose(settings.pooling)
        if pooling != settings.pooling and reader.target.encoder is not None:
            say(
                f"{reader.target.name} has no class token: its features are {_STAND_IN.get(pooling, pooling)}"
            )
        columns = reader.poolings[pooling]
        by_k = knn_accuracy(
            train.x[:, columns].flatten(1),
            _known(train.labels),
            test.x[:, columns].flatten(1),
            _known(test.labels),
            num_classes,
            neighbours=(*settings.neighbours, settings.k),
            temperature=settings.temperature,
            device=reading_of(settings).place(),
        )
        return _headline(by_k, settings.k, pooling, settings.temperature)

    return measure(settings, "knn", score, say, pooling=settings.pooling)


def _headline(by_k: Mapping[int, Accuracy], k: int, pooling: str, temperature: float) -> Result:
    k = min(k, max(by_k))  # by_k has the number of training images where they are fewer than k
    return {
        **by_k[k],
        "by_k": {str(each): accuracy for each, accuracy in by_k.items()},
        "settings": {"k": k, "pooling": pooling, "temperature": temperature},
    }


def _known(labels: Tensor | None) -> Tensor:
    assert labels is not None, "labelled data has labels"
    return labels


def online_features(
    target: Target,
    data: LabelledData,
    reading: Reading,
    rank: int = 0,
    processes: int = 1,
    *,
    max_train: int = 10_000,
    max_test: int = 2_000,
) -> tuple[Features, Features]:
    """One process's share of what an encoder in training makes of images to learn from and to test.

    Every part's train or eval mode is left as it was.  To cost little, at most ``max_train`` and
    ``max_test`` images are used, always the same, of each class its share.
    """
    reader = Reader(target)
    columns = reader.poolings[reader.choose("cls")]

    def read(part: Part) -> Features:
        count = len(part)
        mine = part.indices[count * rank // processes : count * (rank + 1) // processes]
        if len(mine) == 0:  # fewer images than processes
            nothing = torch.empty(0, dtype=torch.int64)
            return Features(torch.empty(0, 0), nothing, nothing)
        found = extract_all({"": reader}, replace(part, indices=mine), reading)[""]
        return replace(found, x=found.x[:, columns].flatten(1))

    with fast_linear():
        return read(data.train.sampled(max_train)), read(data.test.sampled(max_test))


def online_accuracy(
    shares: Sequence[tuple[Features, Features]], data: LabelledData, device: torch.device
) -> Accuracy:
    """``{"top1", "top5"}`` in percent, of the shares of all processes by rank."""

    def joined(side: Sequence[Features]) -> tuple[Tensor, Tensor]:
        some = [features for features in side if len(features)]
        labels = [_known(features.labels) for features in some]
        return torch.cat([features.x for features in some]), torch.cat(labels)

    train, test = (joined(side) for side in zip(*shares, strict=True))
    classes = len(data.classes)
    with fast_linear():
        by_k = knn_accuracy(*train, *test, classes, neighbours=(HEADLINE,), device=device)
    return next(iter(by_k.values()))
