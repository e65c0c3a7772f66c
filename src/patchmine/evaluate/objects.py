"""The objects in images without annotations, by a run that detects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchmine.config.schema import DetectConfig
from patchmine.data.views.normalise import normalise
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.evaluate.asked import AskedImages, asked_run, open_asked_images
from patchmine.evaluate.detection import KeptObjects
from patchmine.evaluate.features import autocast, device_of
from patchmine.evaluate.settings import PredictSettings
from patchmine.evaluate.tiles import ObjectFinder, Size, auto_tile
from patchmine.models.detection import Found
from patchmine.runs.preparing import smallest_side
from patchmine.tasks.detect import Detect
from patchmine.types import Batch

_TOGETHER = 1 << 23  # pixels of images that are held at once; a larger one is alone
_MUCH_LARGER = 2  # than images of training


def detected(settings: PredictSettings, say: Say = silent) -> dict[str, list[Any]]:
    """What is found in each readable image, all of it in memory.

    Returns:
        Lists of equal length: ``file``; ``boxes`` (N, 4) float32 (left, top, right, bottom) in
        pixels of the image; ``labels`` (N,) int64 from 0, and ``names`` of these; ``scores`` (N,)
        float32; and of a run that finds masks ``masks``, N run lengths as pycocotools has them.

    Raises:
        UserError: as `open_object_question` and `ObjectQuestion.seen`.
    """
    question = open_object_question(settings, say)
    found: dict[str, list[Any]] = {
        name: [] for name in ("file", "boxes", "labels", "names", "scores")
    }
    if question.config.masks:
        found["masks"] = []
    for seen in question.seen():
        own = seen.objects
        found["file"].append(question.images.file(seen.index))
        found["boxes"].append(own.boxes.numpy())
        found["labels"].append(own.labels.numpy())
        found["names"].append([question.task.names[label] for label in own.labels.tolist()])
        found["scores"].append(own.scores.numpy())
        if question.config.masks:
            found["masks"].append(own.masks)
    return found


@dataclass(frozen=True)
class SeenObjects:
    """An image and what was found in it.

    Args:
        index: its place in the source.
        picture: (C, H, W), as it was read.
        objects: in its pixels.
    """

    index: int
    picture: Tensor
    objects: KeptObjects


@dataclass(frozen=True)
class ObjectQuestion:
    """A run that detects, and images that it is asked about.

    Args:
        settings: what was asked.
        task: the trained network.
        config: the run's settings.
        images: the images.
        tile: pieces of them that are looked at; None: they are looked at whole.
    """

    settings: PredictSettings
    task: Detect
    config: DetectConfig
    images: AskedImages
    tile: Size | None

    def seen(self) -> Iterator[SeenObjects]:
        """Every readable image in order, few in memory at a time, and of large ones one.

        Raises UserError where nothing, or too little, can be read.
        """
        config, device = self.config, device_of(self.settings)
        task = self.task.to(device).eval()
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)

        def network(views: Batch) -> list[Found]:
            with autocast(device):
                return task.predict(normalise(views, mean, std, device))

        task.head.limit(self.settings.score_threshold, config.proposals)
        overlap, at_once = self.settings.overlap, config.eval_batch
        find = ObjectFinder(network, config, self.tile, overlap, at_once)
        for some in _groups(self._read(), at_once):
            pictures = [batch.views[0][0] for batch in some]
            for batch, picture, found in zip(some, pictures, find(pictures), strict=True):
                yield SeenObjects(int(batch.index), picture, found)

    def _read(self) -> Iterator[Batch]:
        """The images; the first that is much larger than those of training is told of."""
        tall, wide = auto_tile(self.config)
        said = self.tile is not None
        for batch in self.images.read("objects"):
            height, width = batch.views[0].shape[-2:]
            factor = max(height / tall, width / wide)
            if not said and factor >= _MUCH_LARGER:
                said, name = True, shown_name(self.images.file(int(batch.index)))
                than = " than in training" if self.config.usual_size else ""  # of earlier versions
                self.images.say(
                    f"{name} has {width}x{height} pixels: shrunk to the image_size of the run, "
                    f"objects in it are {factor:.1f} times smaller{than}, and easily missed. "
                    f"tile=auto looks at large images in pieces of {wide}x{tall} pixels."
                )
            yield batch


def _groups(images: Iterator[Batch], most: int) -> Iterator[list[Batch]]:
    """Some small images at once, so that a fast device has enough to do; large ones alone."""
    some: list[Batch] = []
    for batch in images:
        some.append(batch)
        if len(some) >= most or sum(each.views[0][0, 0].numel() for each in some) > _TOGETHER:
            yield some
            some = []
    if some:
        yield some


def open_object_question(settings: PredictSettings, say: Say = silent) -> ObjectQuestion:
    """The run and the images that the settings name.

    Raises UserError for a run of another kind, and for settings that do not fit it.
    """
    run, config = asked_run(settings, DetectConfig)
    task = run.detector()
    smallest = smallest_side(task)
    tile = auto_tile(config) if settings.tile == "auto" else settings.tile
    if tile is not None and min(tile) < smallest:
        raise UserError(
            f"tile={min(tile)} is smaller than a patch of {smallest}x{smallest} pixels: give as "
            f"much as the images of training had, or tile=auto"
        )
    images = open_asked_images(settings, config, smallest, say)
    if tile is not None:
        say(f"Larger images are looked at in pieces of {tile[1]}x{tile[0]} pixels.")
    return ObjectQuestion(settings, task, config, images, tile)
