"""Videos tested as papers test them: several clips and crops of each, whose scores are averaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.data.badfiles import BadFiles
from patchmine.data.views.clips import TestClips
from patchmine.errors import UserError
from patchmine.evaluate.features import (
    Features,
    FrameReader,
    Reader,
    extract_all,
    judge_broken,
    stream,
)
from patchmine.evaluate.labelled import Part
from patchmine.evaluate.linear import BLOCKS, best_of_grid
from patchmine.evaluate.measure import (
    Result,
    file_result,
    images_of,
    labelled_for,
    notes_of,
    opened,
    readers_of,
    reading_of,
    with_baselines,
)
from patchmine.evaluate.neighbours import Accuracy, vote_shares
from patchmine.evaluate.progress import Say, progress, silent
from patchmine.evaluate.settings import VideoSettings
from patchmine.evaluate.targets import Target, open_target
from patchmine.models.onednn import fast_linear

Scorer = Callable[[Tensor], Tensor]
"""Rows (R, S, D) of features -> (R, C) float32 on the CPU, rows that sum to one."""

PER_FRAME = "per_frame"
# Crop_pct: the shorter side is the model's, nothing is cut from it (VideoMAE)
FILL = 1.0


def evaluate_video(settings: VideoSettings, say: Say = silent) -> list[Result]:
    """kNN and linear classifiers on features of several clips and crops of each test video.

    They learn from one clip from the middle of each training video.  A video's score is the mean
    over its clips of what sums to one: shares of the vote, or the softmax.

    Args:
        settings: target, data and protocol.
        say: hears about the progress.

    Returns:
        Two results with ``top1`` and ``top5`` in percent; ``one_view`` has those of the middle clip
        alone.  Filed as eval/video-knn.json and eval/video-linear.json.

    Raises:
        UserError: the target or the data cannot be used.
    """
    start = time.monotonic()
    target = _opened(settings)
    view = _test_view(target, settings)
    readers = readers_of(settings, target, BLOCKS)
    if settings.image is not None:
        image = open_target(settings.image, seed=settings.seed)
        readers[PER_FRAME] = FrameReader(image, target, BLOCKS)
    data = labelled_for(settings, target, say)
    classes = len(data.classes)
    with fast_linear():
        train = extract_all(
            readers, data.train, reading_of(settings), title="train videos", say=say
        )
        scorers: dict[tuple[str, str], Scorer] = {}
        told: dict[tuple[str, str], Result] = {}
        for protocol, learn in (("knn", _learn_knn), ("linear", _learn_linear)):
            for name, reader in readers.items():
                key = protocol, name
                scorers[key], told[key] = learn(settings, say, reader, train[name], classes)
        scores, tested = _score(settings, say, readers, data.test, view, scorers, classes)
    results = []
    for protocol in ("knn", "linear"):
        own = {
            name: _merged(scores[protocol, name], told[protocol, name], settings)
            for name in readers
        }
        for name in filter(None, own):
            say(f"baseline {name}, {protocol}: top-1 {own[name]['top1']:.2f}")
        result: Result = {
            "name": f"{settings.name or 'video'}-{protocol}",
            "protocol": f"video-{protocol}",
            **with_baselines(own),
            "target": {"name": target.name, "weights": settings.weights, "note": target.note},
            "images": images_of(target, data, tested),
            "seconds_spent": {"all": round(time.monotonic() - start, 1)},
            "notes": [*notes_of(target, data), *_said_of_image(settings)],
        }
        results.append(file_result(result, target))
    return results


def _opened(settings: VideoSettings) -> Target:
    """The target, whose clips fill the frame.  Raises UserError for an encoder of images."""
    target = opened(settings)
    if target.clip is None:
        raise UserError(
            f"{target.name} is an encoder of images: `patchmine eval video` measures a run with a video model, and "
            f"this one beside it as a baseline with image={target.name}"
        )
    if settings.crop_pct is not None:
        raise UserError(
            f"crop_pct={settings.crop_pct}: `patchmine eval video` takes its crops along the longer side, see crops=; "
            "leave the setting out"
        )
    return replace(target, crop_pct=FILL)


def _test_view(target: Target, settings: VideoSettings) -> TestClips:
    return TestClips(target.input, settings.segments, settings.crops)


def _said_of_image(settings: VideoSettings) -> list[str]:
    if settings.image is None:
        return []
    return [
        f"per frame: features of {settings.image}, averaged over the frames of a clip, whatever their order"
    ]


def _learn_knn(
    settings: VideoSettings, _: Say, reader: Reader, train: Features, classes: int
) -> tuple[Scorer, Result]:
    pooling, device = reader.choose("cls"), reading_of(settings).place()
    columns, k = reader.poolings[pooling], min(settings.k, len(train))
    bank = F.normalize(train.x[:, columns].flatten(1), dim=1).to(device)
    labels = _known(train.labels).to(device)

    def score(rows: Tensor) -> Tensor:
        query = rows[:, columns].flatten(1).to(device)
        return vote_shares(
            bank, labels, query, classes, k=k, temperature=settings.temperature
        ).cpu()

    return score, {"settings": {"k": k, "pooling": pooling, "temperature": settings.temperature}}


def _learn_linear(
    settings: VideoSettings, say: Say, reader: Reader, train: Features, classes: int
) -> tuple[Scorer, Result]:
    device = reading_of(settings).place()
    classify, told = best_of_grid(settings, say, reader, train, classes)
    return lambda rows: classify(rows.to(device)).softmax(dim=1).cpu(), told


def _known(labels: Tensor | None) -> Tensor:
    assert labels is not None, "labelled data has labels"
    return labels


class ViewScores:
    """Means of scores (R, C) over the views of each video; a view that comes twice, as padding
    does, counts once.

    ``videos`` N and ``views`` V: how many there are to come; they are numbered from 0.
    """

    def __init__(self, videos: int, views: int, classes: int) -> None:
        self._sums = torch.zeros(videos, classes)
        self._seen = torch.zeros(videos, views, dtype=torch.bool)

    def add(self, video: Tensor, view: Tensor, scores: Tensor) -> None:
        """Rows in any order: ``video`` (R,) and ``view`` (R,) int64 say whose they are."""
        places = (video * self._seen.shape[1] + view).numpy()
        first = torch.from_numpy(np.unique(places, return_index=True)[1])
        first = first[~self._seen[video[first], view[first]]]
        self._seen[video[first], view[first]] = True
        self._sums.index_add_(0, video[first], scores[first])

    def accuracy(self, labels: Tensor) -> Accuracy:
        """Percent right of the videos that have any view; ``labels`` (N,), of which unknown ones
        count as wrong.
        """
        counts = self._seen.sum(1)
        there = counts > 0
        means = self._sums[there] / counts[there, None]
        best = means.sort(dim=1, descending=True, stable=True).indices[:, :5]
        right = best == labels[there, None]
        share = 100 / max(1, int(there.sum()))
        return {"top1": share * int(right[:, 0].sum()), "top5": share * int(right.any(dim=1).sum())}


def _score(
    settings: VideoSettings,
    say: Say,
    readers: Mapping[str, Reader],
    part: Part,
    view: TestClips,
    scorers: Mapping[tuple[str, str], Scorer],
    classes: int,
) -> tuple[dict[tuple[str, str], tuple[Accuracy, Accuracy]], int]:
    """For each scorer the accuracy of all views and of the middle one; how many videos were read.

    Scores are added up as they come, so that memory holds one batch of features and not those of
    all clips.
    """
    views = view.segments * view.crops
    middle = view.segments // 2 * view.crops + view.crops // 2
    every = {key: ViewScores(len(part), views, classes) for key in scorers}
    single = {key: ViewScores(len(part), 1, classes) for key in scorers}
    reading, done, title = reading_of(settings), 0, "test videos"
    with progress(title, len(part), say) as tick:
        # The share of broken videos is judged at the end: they come in order, so broken ones may
        # come in a row.
        for index, columns in stream(
            readers, part, reading, BadFiles(None, 1.0), view=view, views=views
        ):
            videos = torch.from_numpy(np.searchsorted(part.indices, index.numpy()))
            for key, scorer in scorers.items():
                scores = scorer(columns[key[1]])  # (B * V, C)
                numbers = torch.arange(views).repeat(len(videos))
                every[key].add(videos.repeat_interleave(views), numbers, scores)
                single[key].add(videos, torch.zeros_like(videos), scores[middle::views])
            done += len(videos)
            tick(len(videos))
    judge_broken(part, done, reading, title, "video", say)
    assert part.labels is not None, "labelled data has labels"
    labels = torch.from_numpy(part.labels[part.indices])
    return {
        key: (every[key].accuracy(labels), single[key].accuracy(labels)) for key in scorers
    }, done


def _merged(scores: tuple[Accuracy, Accuracy], told: Result, settings: VideoSettings) -> Result:
    used = {"segments": settings.segments, "crops": settings.crops, **told["settings"]}
    return {**scores[0], "one_view": scores[1], **told, "settings": used}
