"""The nearest-neighbour classifier of DINO on frozen features: nothing is trained, so it is quick."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from patchmine.evaluate.features import Features, Reader, Reading, extract_all
from patchmine.evaluate.labelled import LabelledData
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


def online_knn(
    target: Target,
    data: LabelledData,
    *,
    reading: Reading | None = None,
    max_train: int = 10_000,
    max_test: int = 2_000,
) -> Accuracy:
    """``{"top1", "top5"}`` in percent of an encoder as it is in the middle of training; every
    part's train or eval mode is left as it was.

    To cost little, at most ``max_train`` and ``max_test`` images are used, always the same, of each
    class its share.
    """
    assert target.encoder is not None, "an encoder in training"
    reader = Reader(target)
    device = next(target.encoder.parameters()).device
    reading = reading or Reading(device=str(device))
    with fast_linear():
        train = extract_all({"": reader}, data.train.sampled(max_train), reading)[""]
        test = extract_all({"": reader}, data.test.sampled(max_test), reading)[""]
        column = reader.poolings[reader.choose("cls")]
        by_k = knn_accuracy(
            train.x[:, column].flatten(1),
            _known(train.labels),
            test.x[:, column].flatten(1),
            _known(test.labels),
            len(data.classes),
            neighbours=(HEADLINE,),
            device=device,
        )
    return next(iter(by_k.values()))
